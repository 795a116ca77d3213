"""What a checkpoint holds besides rows of tables, and the processes that hold a part of it each.

Dense parameters, optimizers, random numbers and the reader's position are kept by the names of the model's parameters,
so that another number of processes, or another optimizer object, finds its own. Tensors are copied to the CPU at the
snapshot; the rest is JSON. Several processes agree on when and what, each writes its part, the first one commits.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgewright import errors
from edgewright.errors import OutputError, Unsupported, UsageError
from edgewright.systems.check_n_run.manifest import ROWS, Table
from edgewright.systems.check_n_run.records import RowBatch
from edgewright.systems.check_n_run.tables import RowShard, leaves, row_state
from edgewright.training import snapshot
from edgewright.training.checkpoint import check_state, encode_state
from edgewright.training.distributed import is_split, local, local_box


class Ranks:
    """The processes of a run; outside a process group there is one, and everything here is immediate."""

    def __init__(self, timeout: float, group: Any = None) -> None:
        self.world, self.rank = 1, 0
        self._now: Any = None
        self._behind: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
            members = dist.get_process_group_ranks(group or dist.group.WORLD)
            limit = datetime.timedelta(seconds=timeout)
            self._now = dist.new_group(members, backend="gloo", timeout=limit)
            self._behind = dist.new_group(members, backend="gloo", timeout=limit)

    @property
    def first(self) -> bool:
        """Whether this process writes the manifest."""
        return self.rank == 0

    def gather(self, value: Any, behind: bool = False) -> list[Any]:
        """Everybody's values, on every process. behind: from the background. Raises OutputError when one is gone."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(found, value, group=self._behind if behind else self._now)
        except (RuntimeError, EOFError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise OutputError(
                f"process {self.rank} of {self.world} lost another one while they made a checkpoint ({reason}); the "
                "checkpoints before it are untouched: start the job again and restore"
            ) from error
        return found

    def agree(self, value: Any) -> Any:
        """The first process's value."""
        return self.gather(value)[0] if self.world > 1 else value

    def together(self, error: BaseException | None, behind: bool = False) -> None:
        """Raise everywhere what went wrong anywhere; also a barrier."""
        if self.world == 1:
            if error is not None:
                raise error
            return
        said = None if error is None else (type(error).__name__, str(error) or type(error).__name__)
        heard = self.gather(said, behind)
        if error is not None:
            raise error
        for rank, found in enumerate(heard):
            if found is not None:
                kind = getattr(errors, found[0], OutputError)
                raise kind(f"process {rank} of {self.world}: {found[1]}")

    def close(self) -> None:
        """Leave the groups."""
        if self.world > 1 and dist.is_initialized():
            for group in (self._now, self._behind):
                try:
                    dist.destroy_process_group(group)
                except (RuntimeError, ValueError, AssertionError):
                    continue


@dataclass
class Captured:
    """A step's state on the CPU. tensors: to be written by this process; offsets: of those that are parts.

    tree: {"optimizers": [...], "rank": {...}}, JSON. rows: of tables.
    """

    step: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, list[int]] = field(default_factory=dict)
    tree: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    rows: list[RowBatch] = field(default_factory=list)


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
            _keep(state, f"model.{name}", tensor, rank == 0)
    names = parameter_names(model, shards)
    state.tree["optimizers"] = [_optimizer(state, i, o, names, tables, rank) for i, o in enumerate(leaves(optimizers))]
    state.tree["rank"] = _tree(state, dict(own), f"rank.{rank}", True)
    state.tables = describe_tables(shards, optimizers)
    for shard, ids in zip(shards, chosen, strict=True):
        entries, parameter = row_state(optimizers, shard), shard.parameter.detach()
        if len(parameter) and (ids is None or len(ids)):
            taken = None if ids is None else (ids + shard.first).cpu()
            values = {name: _copy(tensor, ids) for name, tensor in entries.items()}
            state.rows.append(RowBatch(shard.name, shard.first, taken, _copy(parameter, ids), values))
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
        groups.append(_tree(state, options, f"opt.{number}.group.{len(groups)}", rank == 0))
        for parameter in group["params"]:
            name, mine = names[id(parameter)], rank == 0 or id(parameter) in tables
            entries = {}
            for label, value in leaf.state.get(parameter, {}).items():
                by_row = isinstance(value, Tensor) and value.ndim and len(value) == len(parameter)
                if id(parameter) in tables and by_row:
                    entries[label] = {ROWS: label}
                else:
                    entries[label] = _tree(state, value, f"opt.{number}.{name}.{label}", mine)
            if entries:
                held[name] = entries
    return {"class": type(leaf).__name__, "groups": groups, "state": held}


def _tree(state: Captured, value: Any, place: str, mine: bool) -> Any:
    """JSON of a value; its tensors go to the state, under names that are the same on every process."""
    tensors: dict[str, Tensor] = {}
    tree = encode_state(value, tensors, place)
    for name, tensor in tensors.items():
        _keep(state, name, tensor, mine)
    return tree


def _keep(state: Captured, name: str, tensor: Tensor, mine: bool) -> None:
    """What is the same everywhere is written by one process, parts by those that hold them."""
    if is_split(tensor):
        shape, offset = local_box(tensor)
        if all(shape):
            state.tensors[name] = _copy(local(tensor), None)
            state.offsets[name] = list(offset)
    elif mine:
        state.tensors[name] = _copy(tensor, None)


def _copy(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """On the CPU, in memory of its own."""
    tensor = tensor.detach()
    if rows is not None:
        return tensor.index_select(0, rows).cpu()
    return tensor.to("cpu", copy=True).contiguous()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def merge_trees(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """The trees of all processes as one: state of parameters that only some of them hold is joined."""
    merged = {"optimizers": [dict(entry, state=dict(entry["state"])) for entry in trees[0]["optimizers"]]}
    for tree in trees[1:]:  # a process without tables has no optimizer for them, which comes last
        for entry, more in zip(merged["optimizers"], tree["optimizers"], strict=False):
            entry["state"].update(more["state"])
        merged["optimizers"] += tree["optimizers"][len(merged["optimizers"]) :]
    return {**merged, "ranks": [tree["rank"] for tree in trees]}


def merge_tables(parts: list[dict[str, Table]]) -> dict[str, Table]:
    """The tables of all processes. Raises UsageError where two describe one differently."""
    merged: dict[str, Table] = {}
    for part in parts:
        for name, table in part.items():
            if merged.setdefault(name, table) != table:
                raise UsageError(f"table {name!r} is {table} on one process and {merged[name]} on another")
    return dict(sorted(merged.items()))
