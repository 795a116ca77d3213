"""Batches that remember where they are: the iterator protocol of the training loop and its usual implementation.

The loop takes any iterator. One that also has `state_dict()` and `load_state_dict()` can be resumed; one that has
`skip(count)` lets a process of a distributed run pass over the batches of the others without building them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from edgewright.checks import check, whole
from edgewright.errors import FormatError, UsageError
from edgewright.io.hashing import crc32, mixed_seed


@runtime_checkable
class ResumableBatches(Protocol):
    """An iterator of batches whose position can be saved and put back. The state holds JSON values and tensors."""

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class BlockBatches:
    """Endless shuffled batches from rows held in memory.

    Every row comes once an epoch, each epoch in its own order, drawn from (seed, epoch) alone; a batch may span two
    epochs, so all have the same size. Row k of the endless stream is a pure function of k: the position is the whole
    state.

    Args:
        blocks: a tensor [N, ...], or a dict of tensors that share N; a batch has the same structure, with `batch_size`
            in the place of N.
        batch_size: rows of a batch.
        seed: of the orders.

    Raises:
        UsageError: no rows, tensors with different numbers of them, or a batch size below 1.
    """

    def __init__(self, blocks: Tensor | Mapping[str, Tensor], batch_size: int, seed: int = 0) -> None:
        self.blocks = blocks if isinstance(blocks, Tensor) else dict(blocks)
        self.batch_size, self.seed, self.position = batch_size, seed, 0
        counts = {name: len(value) for name, value in self._columns().items()}
        if len(set(counts.values())) != 1 or min(counts.values()) == 0:
            raise UsageError(f"blocks need one row or more, and every tensor as many as the others; got {counts}")
        check("batch_size", batch_size, whole(1))
        check("seed", seed, whole(0))
        self._rows = next(iter(counts.values()))
        self._order: tuple[int, Tensor] | None = None
        self._digest: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        rows = torch.cat(list(self._next_rows()))
        self.position += self.batch_size
        if isinstance(self.blocks, Tensor):
            return self.blocks[rows.to(self.blocks.device)]
        return {name: value[rows.to(value.device)] for name, value in self.blocks.items()}

    @property
    def per_epoch(self) -> float:
        """Batches in one pass over the rows."""
        return self._rows / self.batch_size

    def skip(self, count: int = 1) -> None:
        """Pass over `count` batches without building them."""
        self.position += count * self.batch_size

    def state_dict(self) -> dict[str, Any]:
        """The position, with what identifies the rows: seed, batch size, number of rows and a checksum of them."""
        return {
            "position": self.position,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "rows": self._rows,
            "digest": self._content_digest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises UsageError where the rows, their number, seed or batch size are others."""
        for field, now in self.state_dict().items():
            if field != "position" and state.get(field) != now:
                meaning = "content of the blocks (digest)" if field == "digest" else field
                raise UsageError(f"cannot resume: the {meaning} of the batches was {state.get(field)}, now {now}")
        position = state["position"]
        if type(position) is not int or not 0 <= position < 2**62:
            raise FormatError(f"cannot resume: the position of the batches is {position!r:.80}, no row that there is")
        self.position = position

    def _columns(self) -> dict[str, Tensor]:
        return {"blocks": self.blocks} if isinstance(self.blocks, Tensor) else self.blocks

    def _next_rows(self) -> Iterator[Tensor]:
        """Row numbers of the next batch, one tensor for each epoch that it touches."""
        position, end = self.position, self.position + self.batch_size
        while position < end:
            epoch, start = divmod(position, self._rows)
            taken = min(self._rows - start, end - position)
            yield self._epoch_order(epoch)[start : start + taken]
            position += taken

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            self._order = epoch, torch.randperm(self._rows, generator=generator)
        return self._order[1]

    def _content_digest(self) -> int:
        """CRC-32 of the names and bytes: a resume on other data must not pass unnoticed."""
        if self._digest is None:
            columns = sorted(self._columns().items())
            self._digest = crc32(*(part for name, x in columns for part in (f"{name} {x.dtype} {tuple(x.shape)}", x)))
        return self._digest
