"""Which parameters are tables whose rows can be followed, and which optimizers move no row that they were not asked to.

An optimizer is row-local where a row without a gradient keeps its bits: SGD without momentum and decay, Adagrad,
row-wise Adagrad, SparseAdam. One of your own says so with an attribute `row_local = True`. Everything else (Adam,
momentum, decay) moves rows that no sample touched, and a difference of touched rows would miss them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.training.sharded import is_split
from edgewright.training.snapshot import model_tensors

ROW_LOCAL = ("SGD", "Adagrad", "SparseAdam", "RowwiseAdagrad")
TouchedRows = Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class RowShard:
    """A table, or this process's part of one: rows first .. first + len(parameter) of `rows` rows called `name`.

    touched: gives the rows (int64, counted from `first`) that the optimizer step just done has changed; None: the rows
    with a gradient. The first axis of `parameter` counts the rows, whatever follows is a row: experts of a mixture,
    adapters of a bank.
    """

    parameter: Tensor
    name: str
    first: int = 0
    rows: int | None = None
    touched: TouchedRows | None = None

    @property
    def total(self) -> int:
        """Rows of the whole table."""
        return len(self.parameter) if self.rows is None else self.rows


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
    sparse = model.sparse_parameters() if callable(getattr(model, "sparse_parameters", None)) else ()  # type: ignore[operator]
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
