"""Copies of a live state on the CPU: what each process will write of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from edgewright.errors import UsageError
from edgewright.training.checkpoint.manifest import Table
from edgewright.training.checkpoint.records import RowBatch
from edgewright.training.checkpoint.tree import encode_state
from edgewright.training.distributed import is_split, local, local_box

TouchedRows = Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class RowShard:
    """A table, or this process's part of one. The first axis counts the rows, whatever follows is a row: experts of a
    mixture, adapters of a bank.

    Args:
        parameter: rows first .. first + len(parameter) of the table.
        name: of the table in checkpoints.
        first: the table's row that is the parameter's row 0.
        rows: of the whole table; None: as many as the parameter has.
        touched: gives the rows (int64, counted from `first`) that the optimizer step just done has changed; None: the
            rows with a gradient.
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


@dataclass
class Captured:
    """A step's state on the CPU. tensors: to be written by this process; offsets: of those that are parts.

    tree: JSON, what this process has for itself under "rank". rows: of tables. copy: whether tensors that lie on the
    CPU get memory of their own.
    """

    step: int
    copy: bool = True
    tensors: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, list[int]] = field(default_factory=dict)
    tree: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    rows: list[RowBatch] = field(default_factory=list)


def keep_tree(state: Captured, value: Any, place: str, mine: bool) -> Any:
    """JSON of a value; its tensors go to the state, under names that are the same on every process."""
    tensors: dict[str, Tensor] = {}
    tree = encode_state(value, tensors, place)
    for name, tensor in tensors.items():
        keep(state, name, tensor, mine)
    return tree


def keep(state: Captured, name: str, tensor: Tensor, mine: bool) -> None:
    """What is the same everywhere is written by one process, parts by those that hold them."""
    if is_split(tensor):
        shape, offset = local_box(tensor)
        if all(shape):
            state.tensors[name] = _on_cpu(local(tensor), state.copy)
            state.offsets[name] = list(offset)
    elif mine:
        state.tensors[name] = _on_cpu(tensor, state.copy)


def copied_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of a tensor, None for all, on the CPU in memory of their own."""
    return _on_cpu(tensor, True) if rows is None else tensor.detach().index_select(0, rows).cpu()


def _on_cpu(tensor: Tensor, copy: bool) -> Tensor:
    return tensor.detach().to("cpu", copy=copy).contiguous()


def merge_tables(parts: list[dict[str, Table]]) -> dict[str, Table]:
    """The tables of all processes. Raises UsageError where two describe one differently."""
    merged: dict[str, Table] = {}
    for part in parts:
        for name, table in part.items():
            if merged.setdefault(name, table) != table:
                raise UsageError(f"table {name!r} is {table} on one process and {merged[name]} on another")
    return dict(sorted(merged.items()))


def merge_trees(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """The trees of all processes as one.

    What they share is the first one's; the state of optimizers whose parameters only some of them hold is joined; what
    each has for itself ("rank") becomes the list "ranks".
    """
    merged = {name: value for name, value in trees[0].items() if name != "rank"}
    if "optimizers" in merged:
        merged["optimizers"] = [dict(entry, state=dict(entry["state"])) for entry in merged["optimizers"]]
        for tree in trees[1:]:  # a process without tables has no optimizer for them, which comes last
            for entry, more in zip(merged["optimizers"], tree["optimizers"], strict=False):
                entry["state"].update(more["state"])
            merged["optimizers"] += tree["optimizers"][len(merged["optimizers"]) :]
    return {**merged, "ranks": [tree["rank"] for tree in trees]}
