"""Which process holds which rows of which table, with the bytes that each of them gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgewright.errors import UsageError

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Shard:
    """Rows `first` .. `end` - 1 of table `table`, held by process `rank`; `width` floats a row."""

    table: int
    rank: int
    first: int
    end: int
    width: int

    @property
    def bytes(self) -> int:
        """Of the weights alone; row-wise Adagrad adds 1 / width of it."""
        return (self.end - self.first) * self.width * FLOAT


@dataclass(frozen=True)
class ShardingPlan:
    """The shards of all tables, in the order of tables and, within one, of rows."""

    shards: tuple[Shard, ...]
    names: tuple[str, ...]
    world: int

    def of_rank(self, rank: int) -> list[Shard]:
        """What one process holds."""
        return [shard for shard in self.shards if shard.rank == rank]

    def is_row_wise(self, table: int) -> bool:
        """Whether a table is split by rows."""
        return sum(shard.table == table for shard in self.shards) > 1

    def bytes_per_rank(self) -> list[int]:
        """Bytes of tables on every process."""
        return [sum(shard.bytes for shard in self.of_rank(rank)) for rank in range(self.world)]

    def text(self) -> str:
        """The plan for people: a line a process."""
        lines = []
        for rank, size in enumerate(self.bytes_per_rank()):
            held = ", ".join(
                self.names[s.table] + (f"[{s.first}:{s.end}]" if self.is_row_wise(s.table) else "")
                for s in self.of_rank(rank)
            )
            lines.append(f"rank {rank}: {size / 1e6:.2f} MB  {held or 'nothing'}")
        return "\n".join(lines)


def make_plan(
    sizes: tuple[int, ...],
    widths: tuple[int, ...],
    world: int,
    plan: str | Mapping[str, int | str] = "auto",
    names: tuple[str, ...] | None = None,
    whole: frozenset[int] = frozenset(),
) -> ShardingPlan:
    """Shards for tables of these rows and widths over `world` processes.

    plan: "auto" (largest table first to the process with the fewest bytes; what is larger than an even share is split
    by rows), "table" (whole tables only), "row" (every table split by rows), or a mapping from table name to a rank or
    to "row"; tables that it leaves out are placed as by "auto". whole: tables that cannot be split by rows.
    Raises UsageError for ranks and tables that do not exist, and for fewer whole tables than processes.
    """
    names = names or tuple(str(k) for k in range(len(sizes)))
    wanted: dict[int, int | str] = {}
    if not isinstance(plan, str):
        for name, where in plan.items():
            if name not in names:
                raise UsageError(f"the plan names table {name!r}; tables: {', '.join(names)}")
            if where != "row" and not (isinstance(where, int) and 0 <= where < world):
                raise UsageError(f"the plan sends table {name!r} to {where!r}: a rank from 0 to {world - 1}, or 'row'")
            wanted[names.index(name)] = where
    elif plan not in ("auto", "table", "row"):
        raise UsageError(f"plan={plan!r}; use 'auto', 'table', 'row' or a mapping such as {{{names[0]!r}: 'row'}}")
    if plan == "table" and len(sizes) < world:
        raise UsageError(
            f"{len(sizes)} tables cannot keep {world} processes busy when each is held whole; split them by rows: "
            "plan='row', or plan='auto'"
        )
    sized = [rows * width * FLOAT for rows, width in zip(sizes, widths, strict=True)]
    even = sum(sized) / world
    for k, rows in enumerate(sizes):
        if (plan == "row" and k not in whole) or (
            plan != "table" and world > 1 and k not in wanted and k not in whole and sized[k] > even and rows >= world
        ):
            wanted[k] = "row"
        if wanted.get(k) == "row" and k in whole:
            raise UsageError(f"table {names[k]} is stored as quotient and remainder, which cannot be split by rows")
    placed: dict[int, list[Shard]] = {}
    load = [0] * world
    for k in [k for k in range(len(sizes)) if wanted.get(k) == "row"]:
        chunk = -(-sizes[k] // world)  # as torch.chunk and DTensor cut, so that checkpoints fit both
        ends = [(min(r * chunk, sizes[k]), min((r + 1) * chunk, sizes[k])) for r in range(world)]
        placed[k] = [Shard(k, rank, first, end, widths[k]) for rank, (first, end) in enumerate(ends)]
    for k in [k for k in range(len(sizes)) if isinstance(wanted.get(k), int)]:
        placed[k] = [Shard(k, int(wanted[k]), 0, sizes[k], widths[k])]
    for shards in placed.values():
        for shard in shards:
            load[shard.rank] += shard.bytes
    for k in sorted((k for k in range(len(sizes)) if k not in placed), key=lambda k: (-sized[k], k)):
        rank = min(range(world), key=lambda r: (load[r], r))
        placed[k] = [Shard(k, rank, 0, sizes[k], widths[k])]
        load[rank] += sized[k]
    return ShardingPlan(tuple(shard for k in range(len(sizes)) for shard in placed[k]), names, world)
