"""Which parameters are tables whose rows can be followed, and which rows the optimizer changed.

An optimizer is row-local where a row without a gradient keeps its bits: SGD without momentum and decay, Adagrad,
row-wise Adagrad, SparseAdam. One of your own says so with an attribute `row_local = True`. Everything else (Adam,
momentum, decay) moves rows that no sample touched, and a difference of touched rows would miss them.

deviation: the paper marks rows at the lookup. At the step the set is exact: the ids of the coalesced sparse gradient;
a row that was only evaluated is not in it. Two bitmaps a table: `last` holds the rows since the last checkpoint, `base`
those since the last full one. `take` copies and clears at the snapshot; what the optimizer changes while that is being
written is marked anew, and a write that fails puts its rows back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed, UsageError
from edgewright.protocols import HasSparseParameters
from edgewright.training.checkpoint.capture import RowShard
from edgewright.training.distributed import is_split
from edgewright.training.snapshot import model_tensors


class RowBits:
    """uint8 [ceil(n / 8)]: row r is bit r % 8 of byte r // 8."""

    def __init__(self, rows: int, device: torch.device | None = None) -> None:
        self.rows = rows
        self.bits = torch.zeros(-(-rows // 8), dtype=torch.uint8, device=device)
        self._powers = (1 << torch.arange(8, device=device)).to(torch.uint8)

    def mark(self, rows: Tensor) -> None:
        """Set the bits of `rows`, int64 [m], each named once.

        Distinct rows that are not set yet have distinct bits, so that adding them to a byte is the same as OR.
        """
        place = rows >> 3
        self.bits.index_add_(0, place, self._powers[rows & 7] & ~self.bits[place])

    def merge(self, other: RowBits) -> None:
        """OR with the bits of as many rows."""
        self.bits |= other.bits

    def copy(self) -> RowBits:
        copied = RowBits(self.rows, self.bits.device)
        copied.bits = self.bits.clone()
        return copied

    def clear(self) -> None:
        self.bits.zero_()

    def fill(self) -> None:
        self.bits.fill_(255)

    def mask(self) -> Tensor:
        """Bool [n]."""
        return (self.bits.unsqueeze(1) & self._powers).ne(0).flatten()[: self.rows]

    def indices(self) -> Tensor:
        """The rows whose bit is set, int64, ascending."""
        return self.mask().nonzero().squeeze(1)

    def __len__(self) -> int:
        """How many bits are set."""
        return int(self.mask().sum())


ROW_LOCAL = ("SGD", "Adagrad", "SparseAdam", "RowwiseAdagrad")


def leaves(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[torch.optim.Optimizer]:
    """The optimizers that hold state of their own: those inside a wrapper or a pair instead of it."""
    for optimizer in optimizers:
        inner = [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
        if inner:
            yield from leaves(inner)
        else:
            yield optimizer


def moves_untouched(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> str | None:
    """Why this optimizer may change rows without a gradient; None where it does not."""
    name = type(optimizer).__name__
    for option in ("momentum", "weight_decay"):
        if group.get(option):
            return f"{name} with {option}={group[option]}"
    return None if name in ROW_LOCAL or getattr(optimizer, "row_local", False) else name


def find_tables(
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    shards: Iterable[RowShard] = (),
    dense_tables: str = "refuse",
) -> list[RowShard]:
    """The tables of a model: `shards`, what `model.sparse_parameters()` gives, nn.Embedding and nn.EmbeddingBag.

    dense_tables "refuse": raise UsageError where an optimizer moves rows that were not touched; "full": such a
    parameter is no table, it is stored whole in every checkpoint.
    """
    names = {id(tensor): name for name, tensor in model_tensors(model).items()}
    found = {id(shard.parameter): shard for shard in shards}
    sparse = model.sparse_parameters() if isinstance(model, HasSparseParameters) else ()
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    for parameter in [*sparse, *(module.weight for module in embeddings)]:
        if id(parameter) not in found and id(parameter) in names and not is_split(parameter):
            found[id(parameter)] = RowShard(parameter, names[id(parameter)])
    for module in embeddings:
        if module.max_norm is None or id(module.weight) not in found:
            continue
        if dense_tables == "full":
            del found[id(module.weight)]
            continue
        raise UsageError(
            f"{found[id(module.weight)].name} has max_norm={module.max_norm}, which changes rows when they are looked "
            "up, also in evaluation: such rows cannot be followed; leave max_norm out, or policy='full'"
        )
    for leaf in leaves(optimizers):
        for group in leaf.param_groups:
            reason = moves_untouched(leaf, group)
            for parameter in group["params"] if reason else ():
                if id(parameter) in found and dense_tables == "full":
                    del found[id(parameter)]
                elif id(parameter) in found:
                    raise UsageError(
                        f"{reason} moves rows of {found[id(parameter)].name} that no sample touched, so a checkpoint "
                        "of touched rows would miss them; use sparse gradients with SparseAdam, Adagrad, row-wise "
                        "Adagrad or plain SGD, or CheckpointConfig(policy='full'), which stores everything each time"
                    )
    return _checked(list(found.values()))


def row_state(optimizers: Iterable[torch.optim.Optimizer], shard: RowShard) -> dict[str, Tensor]:
    """The optimizer's entries that have a row for each row of a table, by name, as they live."""
    found: dict[str, Tensor] = {}
    for leaf in leaves(optimizers):
        for name, value in leaf.state.get(shard.parameter, {}).items():
            if isinstance(value, Tensor) and value.ndim and len(value) == len(shard.parameter):
                found[name] = value
    return found


def _checked(shards: list[RowShard]) -> list[RowShard]:
    for shard in shards:
        if shard.parameter.ndim < 1 or shard.first < 0 or shard.first + len(shard.parameter) > shard.total:
            raise UsageError(
                f"{shard.name}: {len(shard.parameter)} rows from row {shard.first} on do not lie in a table of "
                f"{shard.total}"
            )
    names = [(shard.name, shard.first) for shard in shards]
    if len(set(names)) != len(names):
        raise UsageError(f"two tables are called {next(n for n, _ in names if names.count((n, _)) > 1)!r}")
    return sorted(shards, key=lambda shard: (shard.name, shard.first))


_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # an odd number without pattern, as a signed 64-bit one


@dataclass(frozen=True)
class RowSnapshot:
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

    def take(self, full: bool, consecutive: bool) -> tuple[list[Tensor | None], RowSnapshot]:
        """(rows that a checkpoint must hold, None for all; what was taken), and begin to mark anew."""
        if self.verify:
            self._verify()
        rows = RowSnapshot(full, [bits.copy() for bits in self.last], [])
        for last, base in zip(self.last, self.base, strict=True):
            base.merge(last)
            if full:
                rows.base.append(base.copy())
                base.clear()
            last.clear()
        if full:
            return [None] * len(self.shards), rows
        return [bits.indices() for bits in (rows.last if consecutive else self.base)], rows

    def put_back(self, rows: RowSnapshot) -> None:
        """The write failed: its rows are as unsaved as before."""
        for place, bits in enumerate(rows.last):
            self.last[place].merge(bits)
        for place, bits in enumerate(rows.base):
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
                if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(shard.parameter)):
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
