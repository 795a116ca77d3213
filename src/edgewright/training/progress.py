"""What a person sees while a run goes on: a bar on a terminal, one line every ten seconds elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

LINE_SECONDS = 10.0


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
    """Step, loss, learning rate, speed and time left on standard error; only this call is timed, not earlier ones."""

    def __init__(self, enabled: bool, label: str, start: int, steps: int) -> None:
        self._label, self._start, self._steps = label, start, steps
        self._amount, self._began, self._paused = 0, time.monotonic(), 0.0
        self._spoke = self._began
        self._lines = enabled and not sys.stderr.isatty()
        self._bar: Any = _rich_bar() if enabled and not self._lines else None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._task = self._bar.add_task(self._label, total=self._steps, completed=self._start, facts="")
            self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, learning_rate: float, amount: int, unit: str) -> None:
        """Show the state after `step` updates, the last of which used `amount` tokens or samples."""
        self._amount += amount
        if self._bar is None and not self._lines:
            return
        now = time.monotonic()
        seconds = max(now - self._began - self._paused, 1e-9)
        facts = f"loss {loss:.4g}  lr {learning_rate:.2e}  {self._amount / seconds:,.0f} {unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        elif now - self._spoke >= LINE_SECONDS:
            self._spoke = now
            left = (now - self._began) / max(step - self._start, 1) * (self._steps - step)
            line = f"{self._label}: step {step}/{self._steps}  {facts}  {_clock(left)} left"
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar off the screen for code that may draw its own; its time does not count into the speed."""
        began = time.monotonic()
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began
            if self._bar is not None:
                self._bar.start()


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        TimeRemainingColumn(),
    )
    return RichProgress(*columns, console=Console(stderr=True), refresh_per_second=4)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
