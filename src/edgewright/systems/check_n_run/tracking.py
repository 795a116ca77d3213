"""Which rows the optimizer changed: two bitmaps a table, marked at the optimizer's step.

deviation: the paper marks rows at the lookup. At the step the set is exact: the ids of the coalesced sparse gradient;
a row that was only evaluated is not in it. `last` holds the rows since the last checkpoint, `base` those since the last
full one. `take` copies and clears at the snapshot; what the optimizer changes while that is being written is marked
anew, and a write that fails puts its rows back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgewright.errors import CheckFailed, UsageError
from edgewright.systems.check_n_run.row_bits import RowBits
from edgewright.systems.check_n_run.tables import RowShard, leaves, row_state

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # an odd number without pattern, as a signed 64-bit one


@dataclass(frozen=True)
class Taken:
    """What a snapshot took off the bitmaps, to be put back should its write fail."""

    full: bool
    last: list[RowBits]
    base: list[RowBits]


class Tracker:
    """Follows the rows of `shards` through `optimizers`. verify: hash all rows at each snapshot (slow, for tests)."""

    def __init__(
        self, shards: list[RowShard], optimizers: Iterable[torch.optim.Optimizer], verify: bool = False
    ) -> None:
        self.shards: list[RowShard] = []
        self.last: list[RowBits] = []
        self.base: list[RowBits] = []
        self.verify = verify
        self._optimizers = list(leaves(optimizers))
        self._places: dict[int, int] = {}
        self._seen: dict[int, Tensor | None] = {}
        self._hashes: list[Tensor] = []
        self._hooks: list[Any] = []
        for shard in shards:
            self.add(shard)
        for leaf in self._optimizers:
            self._hooks.append(leaf.register_step_pre_hook(self._before))
            self._hooks.append(leaf.register_step_post_hook(self._after))

    def add(self, shard: RowShard) -> None:
        """Follow one table more; nothing has been changed since."""
        if id(shard.parameter) in self._places:  # registered anew, with rows of its own telling
            place = self._places[id(shard.parameter)]
            self.shards[place] = shard
            return
        device = shard.parameter.device
        self._places[id(shard.parameter)] = len(self.shards)
        self.shards.append(shard)
        self.last.append(RowBits(len(shard.parameter), device))
        self.base.append(RowBits(len(shard.parameter), device))
        if self.verify:
            self._hashes.append(self._hash(shard))

    def mark(self, place: int, rows: Tensor) -> None:
        """Rows of table number `place` have changed; each is named once."""
        self.last[place].mark(rows)

    def mark_all(self) -> None:
        """Every row counts as changed: nothing is known of what was before."""
        for bits in self.last:
            bits.fill()

    def take(self, full: bool, consecutive: bool) -> tuple[list[Tensor | None], Taken]:
        """(rows that a checkpoint must hold, None for all; what was taken), and begin to mark anew."""
        if self.verify:
            self._verify()
        taken = Taken(full, [bits.copy() for bits in self.last], [])
        for last, base in zip(self.last, self.base, strict=True):
            base.merge(last)
            if full:
                taken.base.append(base.copy())
                base.clear()
            last.clear()
        if full:
            return [None] * len(self.shards), taken
        return [bits.indices() for bits in (taken.last if consecutive else self.base)], taken

    def put_back(self, taken: Taken) -> None:
        """The write failed: its rows are as unsaved as before."""
        for place, bits in enumerate(taken.last):
            self.last[place].merge(bits)
        for place, bits in enumerate(taken.base):
            self.base[place].merge(bits)

    @property
    def nbytes(self) -> int:
        """Bytes of the bitmaps."""
        return sum(bits.bits.numel() for bits in (*self.last, *self.base))

    def close(self) -> None:
        """Follow no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Mark before the step, so that one which fails half-way leaves no changed row unmarked."""
        for place, parameter in self._of(optimizer):
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse and not gradient.is_coalesced():
                parameter.grad = gradient = gradient.coalesce()  # what the optimizer would do; now it need not
            self._seen[place] = gradient
            if gradient is not None:
                self.mark(place, _rows(gradient))

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """A closure may have made other gradients inside the step; `touched` speaks of the step just done."""
        for place, shard in enumerate(self.shards):
            if shard.touched is not None and self._holds(optimizer, shard.parameter):
                rows = torch.as_tensor(shard.touched(), dtype=torch.int64, device=shard.parameter.device)
                if len(rows) and not (0 <= int(rows.min()) and int(rows.max()) < len(shard.parameter)):
                    raise UsageError(f"touched rows of {shard.name} must lie in 0..{len(shard.parameter) - 1}")
                self.mark(place, rows.unique())
        for place, parameter in self._of(optimizer):
            gradient = parameter.grad
            if gradient is not None and gradient is not self._seen.pop(place, None):
                self.mark(place, _rows(gradient.coalesce() if gradient.is_sparse else gradient))
        self._seen.clear()

    def _of(self, optimizer: torch.optim.Optimizer) -> Iterable[tuple[int, Tensor]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                place = self._places.get(id(parameter))
                if place is not None and self.shards[place].touched is None:
                    yield place, parameter

    def _holds(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
        return any(parameter is p for group in optimizer.param_groups for p in group["params"])

    def _verify(self) -> None:
        for place, shard in enumerate(self.shards):
            now = self._hash(shard)
            wrong = ((now != self._hashes[place]) & ~self.last[place].mask()).nonzero().flatten()
            if len(wrong):
                raise CheckFailed(
                    f"{len(wrong)} rows of {shard.name} changed outside the optimizer's step, the first is row "
                    f"{shard.first + int(wrong[0])}: name them with register_rows(param, touched_fn), or use "
                    "policy='full'"
                )
            self._hashes[place] = now

    def _hash(self, shard: RowShard) -> Tensor:
        """A number a row, of the bits of its values and of its optimizer's state; int64 [n]."""
        total = torch.zeros(len(shard.parameter), dtype=torch.int64, device=shard.parameter.device)
        # state of zeros that is not there yet hashes as state of zeros that is
        for tensor in (shard.parameter, *row_state(self._optimizers, shard).values()):
            words = tensor.detach().reshape(len(tensor), -1).contiguous().view(torch.uint8).to(torch.int64)
            weights = torch.arange(1, words.shape[1] + 1, device=words.device) * _ODD
            total += (words * weights).sum(1) * _ODD
        return total


def _rows(gradient: Tensor) -> Tensor:
    """The rows that a gradient says something about."""
    if gradient.is_sparse:
        return gradient.indices()[0]
    return gradient.reshape(len(gradient), -1).ne(0).any(1).nonzero().squeeze(1)
