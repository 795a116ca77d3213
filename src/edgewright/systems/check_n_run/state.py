"""A copy of the state of a training whose tables change row by row.

Dense parameters, optimizers, random numbers and the reader's position are kept by the names of the model's parameters,
so that another number of processes, or another optimizer object, finds its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.systems.check_n_run.tables import leaves, row_state
from edgewright.training import snapshot
from edgewright.training.checkpoint.capture import Captured, RowShard, copied_rows, keep, keep_tree
from edgewright.training.checkpoint.manifest import ROWS, Table
from edgewright.training.checkpoint.records import RowBatch
from edgewright.training.checkpoint.tree import check_state


def parameter_names(model: nn.Module, shards: Iterable[RowShard]) -> dict[int, str]:
    """Names of all parameters by their identity; of tables the names that they have in checkpoints."""
    names = {id(tensor): name for name, tensor in snapshot.model_tensors(model).items()}
    return names | {id(shard.parameter): shard.name for shard in shards}


def check_optimizers(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], shards: list[RowShard]) -> None:
    """Raise UsageError or Unsupported now rather than at the first checkpoint where their state cannot be kept."""
    names = parameter_names(model, shards)
    for leaf in leaves(optimizers):
        kind = type(leaf)
        if kind.state_dict is not torch.optim.Optimizer.state_dict and not getattr(leaf, "row_local", False):
            raise Unsupported(
                f"{kind.__name__} keeps state in a form of its own (it has its own state_dict), which is not stored by "
                "parameter here; train with edgewright.fit, whose checkpoints keep it"
            )
        for group in leaf.param_groups:
            check_state({n: v for n, v in group.items() if n != "params"}, f"the options of {kind.__name__}")
            if any(id(parameter) not in names for parameter in group["params"]):
                raise UsageError(
                    f"{kind.__name__} holds a parameter that is not in the model, so that a checkpoint would miss it; "
                    "put all of them into one nn.Module, or name it with shards=[RowShard(parameter, name)]"
                )


def capture(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    shards: list[RowShard],
    chosen: list[Tensor | None],
    step: int,
    rank: int,
    own: Mapping[str, Any],
) -> Captured:
    """Copies of the state now. chosen: rows of each shard, None for all; own: this process's state (random, reader)."""
    state = Captured(step)
    tables = {id(shard.parameter) for shard in shards}
    for name, tensor in snapshot.model_tensors(model).items():
        if id(tensor) not in tables:
            keep(state, f"model.{name}", tensor, rank == 0)
    names = parameter_names(model, shards)
    state.tree["optimizers"] = [_optimizer(state, i, o, names, tables, rank) for i, o in enumerate(leaves(optimizers))]
    state.tree["rank"] = keep_tree(state, dict(own), f"rank.{rank}", True)
    state.tables = describe_tables(shards, optimizers)
    for shard, ids in zip(shards, chosen, strict=True):
        entries, parameter = row_state(optimizers, shard), shard.parameter.detach()
        if len(parameter) and (ids is None or len(ids)):
            taken = None if ids is None else (ids + shard.first).cpu()
            values = {name: copied_rows(tensor, ids) for name, tensor in entries.items()}
            state.rows.append(RowBatch(shard.name, shard.first, taken, copied_rows(parameter, ids), values))
    return state


def describe_tables(shards: list[RowShard], optimizers: list[torch.optim.Optimizer]) -> dict[str, Table]:
    """The tables of this process by name, with the optimizer's state of their rows."""
    found = {}
    for shard in shards:
        parameter = shard.parameter
        entries = {name: [_dtype(t), list(t.shape[1:])] for name, t in sorted(row_state(optimizers, shard).items())}
        found[shard.name] = Table(shard.total, list(parameter.shape[1:]), _dtype(parameter), entries)
    return found


def _optimizer(
    state: Captured, number: int, leaf: torch.optim.Optimizer, names: dict[int, str], tables: set[int], rank: int
) -> dict[str, Any]:
    groups: list[Any] = []
    held: dict[str, Any] = {}
    for group in leaf.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        groups.append(keep_tree(state, options, f"opt.{number}.group.{len(groups)}", rank == 0))
        for parameter in group["params"]:
            name, mine = names[id(parameter)], rank == 0 or id(parameter) in tables
            entries = {}
            for label, value in leaf.state.get(parameter, {}).items():
                by_row = isinstance(value, Tensor) and value.ndim and len(value) == len(parameter)
                if id(parameter) in tables and by_row:
                    entries[label] = {ROWS: label}
                else:
                    entries[label] = keep_tree(state, value, f"opt.{number}.{name}.{label}", mine)
            if entries:
                held[name] = entries
    return {"class": type(leaf).__name__, "groups": groups, "state": held}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
