"""The progress of training: what a batch amounts to, and a bar with loss, learning rate and speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from edgewright.measure.progress import ProgressBar


def batch_amount(batch: Any) -> tuple[int, str]:
    """How much a batch holds and in which unit: token ids [B, T] count as tokens, everything else as samples."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return batch["input_ids"].numel(), "tokens"
    if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point():
        return batch.numel(), "tokens"
    return _first_length(batch), "samples"


def _first_length(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((_first_length(part) for part in parts if isinstance(part, (Tensor, Mapping, list, tuple))), 1)


class Progress:
    """Step, loss, learning rate, speed and time left; only this call is timed, not earlier ones."""

    def __init__(self, enabled: bool, label: str, start: int, steps: int) -> None:
        self._bar = ProgressBar(label, steps, shown=enabled, start=start, transient=False)
        self._enabled = enabled
        self._amount, self._began, self._paused = 0, time.monotonic(), 0.0

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.__exit__(*details)

    def update(self, step: int, loss: float, learning_rate: float, amount: int, unit: str) -> None:
        """Show the state after `step` updates, the last of which used `amount` tokens or samples."""
        if not self._enabled:
            return
        self._amount += amount
        seconds = max(time.monotonic() - self._began - self._paused, 1e-9)
        self._bar.update(step, f"loss {loss:.4g}  lr {learning_rate:.2e}  {self._amount / seconds:,.0f} {unit}/s")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar off the screen for code that may draw its own; its time does not count into the speed."""
        began = time.monotonic()
        with self._bar.paused():
            yield
        self._paused += time.monotonic() - began
