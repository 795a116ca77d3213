"""Batches that are made ahead of the training, whose position is still that of the batches it has consumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from edgewright.training.batches import ResumableBatches


class Prefetched:
    """An iterator over `batches` that keeps `ahead` of them ready.

    `batches` stands `ahead` batches further than the training; its position saved in a checkpoint would skip those.
    Every batch therefore brings the position behind it along, and `state_dict` gives that of the last one handed out.
    """

    def __init__(self, batches: ResumableBatches, ahead: int = 2) -> None:
        self.batches, self.ahead = batches, ahead
        self._pool = ThreadPoolExecutor(1, "edgewright-batches")
        self._ready: list[Future[tuple[Any, dict[str, Any]]]] = []
        self._state = dict(batches.state_dict())

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while len(self._ready) <= self.ahead:
            self._ready.append(self._pool.submit(self._make))
        batch, self._state = self._ready.pop(0).result()
        return batch

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for made in self._ready:
            made.result()
        self._ready.clear()
        self.batches.load_state_dict(state)
        self._state = dict(self.batches.state_dict())

    def _make(self) -> tuple[Any, dict[str, Any]]:
        batch = next(self.batches)
        return batch, dict(self.batches.state_dict())
