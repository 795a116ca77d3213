"""DLRM over several processes: tables are split among them, the networks are the same everywhere.

    torch.distributed.init_process_group("gloo")             # or "nccl"; torchrun sets the environment
    sharded = ShardedDLRM(DLRM(config))                       # print(sharded.plan.text())
    loss = mean_loss(sharded(dense, bags), labels)            # each process with its own samples
    loss.backward(); sharded.sync_gradients(); optimizer.step()

Each process looks up its rows for the samples of all (DLRM's "butterfly", section 4 of arXiv 1906.00091): one
all-to-all turns "my tables, all samples" into "all tables, my samples". Processes may have different numbers of
samples. Ids travel without gradients. Sums travel back in one all-to-all that is started before the bottom network runs
and awaited after it; gradients go the other way, and again the bottom network's backward pass runs meanwhile.

Checkpoints of changed rows, for which the optimizer of the tables comes last (a process without tables has none):

    shards = row_shards(sharded)
    ck = DiffCheckpointer("runs/ck", sharded, [networks, tables], shards=shards)   # every process
    info = restore("runs/ck", sharded, [networks, tables], shards=shards)          # any number of processes, any plan
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from edgewright.checks import check, one_of, whole
from edgewright.errors import UsageError
from edgewright.systems.dlrm.clicks import JaggedBatch
from edgewright.systems.dlrm.model import DLRM, EmbeddingTable, ProjectedTable, QREmbeddingBag, row_parameters
from edgewright.systems.dlrm.optimizers import RowwiseAdagrad
from edgewright.training.checkpoint.capture import RowShard
from edgewright.training.checkpoint.files import open_files
from edgewright.training.checkpoint.ranks import Ranks
from edgewright.training.checkpoint.whole import SavedState, capture_state, save_state
from edgewright.training.distributed import join_rows

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
            check("table of the plan", name, one_of(*names))
            check(f"plan of table {name!r}", where, one_of("row", *range(world)))
            wanted[names.index(name)] = where
    else:
        check("plan", plan, one_of("auto", "table", "row"), f"or a mapping such as {{{names[0]!r}: 'row'}}")
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


@dataclass
class CommTimer:
    """Seconds spent from the start of each exchange of sums to its end, and of that the part spent waiting."""

    flying: float = 0.0
    waiting: float = 0.0
    began: float = field(default=0.0, repr=False)

    @property
    def hidden(self) -> float:
        """Share of the time in flight that other work covered."""
        return 1.0 - self.waiting / self.flying if self.flying else 0.0


def exchange_ids(
    bags: JaggedBatch, plan: ShardingPlan, rank: int, group: Any = None
) -> tuple[list[JaggedBatch], list[int]]:
    """(per local shard the bags of all processes' samples, samples of every process).

    A shard's ids are rows of the shard: for a table split by rows each process gets those of its range. The result has
    one JaggedBatch of one table for each of `plan.of_rank(rank)`.
    """
    world, size = plan.world, bags.size
    lengths_out: list[Tensor] = []
    values_out: list[Tensor] = []
    weights_out: list[Tensor] = []
    weighted = bags.weights is not None
    id_splits = []
    for destination in range(world):
        sent = 0
        for shard in plan.of_rank(destination):
            values, offsets = bags.values[shard.table].long(), bags.offsets[shard.table].long()
            weight = bags.weight(shard.table)
            counts = offsets.diff()
            if plan.is_row_wise(shard.table):
                here = (values >= shard.first) & (values < shard.end)
                sums = torch.cat([here.new_zeros(1, dtype=torch.int64), here.cumsum(0)])
                counts = sums[offsets].diff()
                values = values[here] - shard.first
                weight = None if weight is None else weight[here]
            lengths_out.append(counts)
            values_out.append(values)
            if weighted:
                weights_out.append(torch.ones(len(values)) if weight is None else weight.float())
            sent += len(values)
        id_splits.append(sent)

    # what comes from whom: samples, and ids in all
    header_out = torch.tensor([[size, count] for count in id_splits], dtype=torch.int64)
    header_in = torch.empty_like(header_out)
    dist.all_to_all_single(header_in, header_out, group=group)
    samples, incoming = header_in[:, 0].tolist(), header_in[:, 1].tolist()

    mine = len(plan.of_rank(rank))
    lengths = _exchange(
        torch.cat([*lengths_out, header_out.new_empty(0)]),
        [size * len(plan.of_rank(r)) for r in range(world)],
        [count * mine for count in samples],
        group,
    )
    values = _exchange(torch.cat([*values_out, header_out.new_empty(0)]), id_splits, incoming, group)
    weights = _exchange(torch.cat([*weights_out, torch.empty(0)]), id_splits, incoming, group) if weighted else None

    # [source][shard][samples of the source] -> for each shard one batch over all sources
    lengths_in = lengths.split([count for count in samples for _ in range(mine)])
    totals = [int(part.sum()) for part in lengths_in]
    values_in, weights_in = values.split(totals), None if weights is None else weights.split(totals)
    result = []
    for place in range(mine):
        counts = torch.cat(lengths_in[place::mine])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        joined = None if weights_in is None else (torch.cat(weights_in[place::mine]),)
        result.append(JaggedBatch((torch.cat(values_in[place::mine]),), (offsets,), joined))
    return result, samples


@dataclass
class AllToAllSpec:
    """One exchange of sums: splits in elements, and the work in flight."""

    send: list[int]
    receive: list[int]
    group: Any
    scale: float
    clock: CommTimer
    work: Any = None
    buffer: Tensor | None = None
    source: Tensor | None = None  # alive until the work is done

    def start(self, outgoing: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Begin to exchange; the result is filled when `finish` returns."""
        self.source = outgoing.contiguous()
        self.buffer = self.source.new_empty(sum(receive))
        self.clock.began = time.perf_counter()
        self.work = dist.all_to_all_single(self.buffer, self.source, receive, send, group=self.group, async_op=True)
        return self.buffer

    def finish(self) -> None:
        """Wait for the exchange that is under way."""
        before = time.perf_counter()
        self.work.wait()
        now = time.perf_counter()
        self.clock.waiting += now - before
        self.clock.flying += now - self.clock.began
        self.work = self.source = None


class AllToAllStart(torch.autograd.Function):
    """Start the exchange of sums [n] -> [m]; in the backward pass, wait for the gradients that `AllToAllWait` sent.

    Each process averages its loss over its own samples and a table gathers gradients from all of them, so that they are
    divided by the number of processes here: W processes then equal one on the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, spec: AllToAllSpec) -> Tensor:
        ctx.spec = spec
        return spec.start(sums, spec.send, spec.receive)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        spec = ctx.spec
        spec.finish()
        return spec.buffer * spec.scale, None  # `upstream` only carried the order of events


class AllToAllWait(torch.autograd.Function):
    """Wait for the exchange; in the backward pass, start that of the gradients."""

    @staticmethod
    def forward(ctx: Any, landed: Tensor, spec: AllToAllSpec) -> Tensor:
        ctx.spec = spec
        spec.finish()
        return landed.view_as(landed)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        spec = ctx.spec
        spec.start(upstream, spec.receive, spec.send)
        return upstream, None


def _exchange(outgoing: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    landed = outgoing.new_empty(sum(receive))
    dist.all_to_all_single(landed, outgoing, receive, send, group=group)
    return landed


class ShardedDLRM(nn.Module):
    """A DLRM of which this process holds its share of the tables; takes the model over.

    Args:
        model: whole; the weights of the first process are the ones that count.
        group: process group, by default all processes.
        plan: "auto" (whole tables by bytes, those above an even share by rows), "table", "row", or a mapping from table
            name to a rank or to "row".

    Raises:
        UsageError: there is no process group, or the plan cannot be.
    """

    def __init__(
        self,
        model: DLRM,
        group: Any = None,
        plan: str | Mapping[str, int | str] = "auto",
    ) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise UsageError(
                "a sharded model needs a process group: start with torchrun and call "
                "torch.distributed.init_process_group('gloo')"
            )
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        whole = frozenset(k for k, table in enumerate(model.tables) if isinstance(table, QREmbeddingBag))
        widths = tuple(_width(table) for table in model.tables)
        self.plan: ShardingPlan = make_plan(
            model.config.table_sizes, widths, self.world, plan, model.config.names, whole
        )
        self.clock = CommTimer()  # of the exchanges of sums
        with torch.no_grad():
            for parameter in model.parameters():
                dist.broadcast(parameter, src=self._root(), group=group)
        self.lifts = nn.ModuleDict(
            {str(k): _Lift(t) for k, t in enumerate(model.tables) if isinstance(t, ProjectedTable)}
        )
        self.shards = nn.ModuleList(_cut(model.tables[s.table], s, self.plan) for s in self.plan.of_rank(self.rank))
        model.tables = nn.ModuleList()  # the rows of others are given up
        self.model = model

    def forward(self, dense: Tensor, bags: JaggedBatch) -> Tensor:
        """Logits of this process's samples. Every process must call, with as many samples as it has.

        Args:
            dense: float32 [B, num_dense].
            bags: the ids of the same samples.

        Returns:
            float32 [B].

        Raises:
            UsageError: as `DLRM.forward`.
        """
        model = self.model
        model.check_inputs(dense, bags)
        rows = tuple(model.row_ids(k, v, bags.offsets[k]) for k, v in enumerate(bags.values))
        ours, samples = exchange_ids(JaggedBatch(rows, bags.offsets, bags.weights), self.plan, self.rank, self.group)
        sums = [
            table(asked.values[0], asked.offsets[0], asked.weight(0))
            for table, asked in zip(self.shards, ours, strict=True)
        ]
        total = sum(samples)
        packed = torch.cat(sums, 1) if sums else dense.new_zeros(total, 0)
        widths = [sum(s.width for s in self.plan.of_rank(r)) for r in range(self.world)]
        size = len(dense)
        spec = AllToAllSpec(
            [count * widths[self.rank] for count in samples],
            [size * width for width in widths],
            self.group,
            1.0 / self.world,
            self.clock,
        )
        if not packed.requires_grad:  # a process without tables takes part in the backward pass as well
            packed = packed.detach().requires_grad_(torch.is_grad_enabled())
        landed = AllToAllStart.apply(packed.flatten(), spec)
        z0 = model.bottom(dense)
        landed = AllToAllWait.apply(landed, spec)
        return model.join(z0, self._unpack(landed, size, widths))

    def _unpack(self, landed: Tensor, size: int, widths: list[int]) -> list[Tensor]:
        """Sums [B, d] of every table in order, partial ones of row-wise tables added in the order of their rows."""
        sums: dict[int, Tensor] = {}
        parts = landed.split([size * width for width in widths])
        for rank, part in enumerate(parts):
            shards = self.plan.of_rank(rank)
            pieces = part.view(size, widths[rank]).split([s.width for s in shards], 1) if shards else ()
            for shard, piece in zip(shards, pieces, strict=True):
                sums[shard.table] = sums[shard.table] + piece if shard.table in sums else piece
        lifts = self.lifts
        return [lifts[str(k)](sums[k]) if str(k) in lifts else sums[k] for k in range(len(sums))]

    def sparse_parameters(self) -> Iterator[nn.Parameter]:
        """Rows that this process holds."""
        for table in self.shards:
            yield from row_parameters(table)  # type: ignore[arg-type]

    def dense_parameters(self) -> Iterator[nn.Parameter]:
        """What is the same on every process."""
        yield from self.model.parameters()
        yield from self.lifts.parameters()

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """Average the gradients of the networks over the processes, in one all-reduce; those of tables are whole."""
        parameters = list(self.dense_parameters())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat, group=self.group)
        flat /= self.world
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def checkpoint_state(self, optimizer: RowwiseAdagrad | None = None) -> dict[str, Tensor]:
        """Tensors of a checkpoint, under the names of the whole DLRM's state dict.

        A table split by rows is a DTensor, so that any number of processes (or one without a process group) can load
        it.

        Args:
            optimizer: the row-wise Adagrad of `sparse_parameters`; its sums join as "adagrad.<name>".
        """
        state: dict[str, Tensor] = dict(self.model.state_dict())
        for k, lift in self.lifts.items():
            state[f"tables.{k}.lift"] = lift.lift.detach()  # type: ignore[union-attr, operator]
        for shard, table in zip(self.plan.of_rank(self.rank), self.shards, strict=True):
            names = _row_names(shard.table, table, str(shard.table) in self.lifts)
            for name, parameter in zip(names, row_parameters(table), strict=True):  # type: ignore[arg-type]
                state[name] = self._held(parameter.detach(), shard)
                if optimizer is not None:
                    state[f"adagrad.{name}"] = self._held(optimizer.state[parameter]["sum"], shard)
        return state

    def _held(self, tensor: Tensor, shard: Shard) -> Tensor:
        if not self.plan.is_row_wise(shard.table):
            return tensor
        ranks = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        mesh = DeviceMesh(tensor.device.type, ranks)
        return join_rows(tensor, mesh, self.model.config.table_sizes[shard.table])

    def save(self, root: str | Path, optimizer: RowwiseAdagrad | None = None) -> None:
        """Write a checkpoint, every process its part; the one before is deleted when it exists.

        Args:
            root: a folder or fsspec URL of checkpoints.
            optimizer: see `checkpoint_state`.

        Raises:
            OutputError: the disk refused; the checkpoint before is intact.
        """
        with Ranks(group=self.group) as ranks:
            captured = capture_state(0, self.checkpoint_state(optimizer), None, None, ranks, copy=False)
            save_state(open_files(root), ranks, captured)

    def load(self, root: str | Path, optimizer: RowwiseAdagrad | None = None) -> None:
        """Read the newest checkpoint, which any number of processes wrote with any plan, in place.

        Args:
            root: what `save` wrote to.
            optimizer: see `checkpoint_state`.

        Raises:
            UsageError: there is none.
            FormatError: it is damaged or of another model; then nothing has been changed.
        """
        SavedState(open_files(root)).read(self.checkpoint_state(optimizer))

    def _root(self) -> int:
        return dist.get_process_group_ranks(self.group or dist.group.WORLD)[0]


def mean_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None, group: Any = None) -> Tensor:
    """This process's share of the mean cross-entropy over the samples of all, so that gradients average to its own.

    Args:
        logits: [B] of this process's samples.
        labels: [B] of 0 and 1.
        weights: [B], 0 for samples that only pad a batch to its size, 1 for the others.
        group: process group, by default all processes; none is needed for one process.

    Returns:
        A scalar.
    """
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    weights = torch.ones_like(each) if weights is None else weights
    count = weights.sum()
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if world > 1:
        count = count.clone()
        dist.all_reduce(count, group=group)
    return (each * weights).sum() * world / count


def local_rows(count: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """(row numbers of a process's part of a global batch of `count`, weights): equal parts, the last ones padded.

    Where the processes do not divide the batch, its last row is repeated with weight 0.
    """
    check("rank", rank, whole(0, world - 1))
    check("count", count, whole(1))
    part = -(-count // world)
    rows = torch.arange(rank * part, (rank + 1) * part)
    return rows.clamp_max(count - 1), (rows < count).float()


class _Lift(nn.Module):
    """The matrix of a projected table, which every process applies to its own samples."""

    def __init__(self, table: ProjectedTable) -> None:
        super().__init__()
        self.lift = nn.Parameter(table.lift.detach().clone())

    def forward(self, sums: Tensor) -> Tensor:
        return F.linear(sums, self.lift)


def _width(table: nn.Module) -> int:
    if isinstance(table, QREmbeddingBag):
        return table.dim
    held = table.table if isinstance(table, ProjectedTable) else table
    return int(held.embedding_dim)  # type: ignore[arg-type]


def _cut(table: nn.Module, shard: Shard, plan: ShardingPlan) -> nn.Module:
    """A table of the shard's rows, in memory of their own."""
    if isinstance(table, QREmbeddingBag):
        return table
    held = table.table if isinstance(table, ProjectedTable) else table
    part = EmbeddingTable(max(shard.end - shard.first, 1), shard.width)
    rows = held.weight.detach()[shard.first : shard.end]  # type: ignore[index, union-attr, operator]
    part.weight = nn.Parameter(rows.clone())
    part.num_embeddings = len(rows)
    return part


def _row_names(k: int, table: nn.Module, lifted: bool) -> list[str]:
    if isinstance(table, QREmbeddingBag):
        return [f"tables.{k}.quotient", f"tables.{k}.remainder"]
    return [f"tables.{k}.table.weight" if lifted else f"tables.{k}.weight"]


def row_shards(sharded: ShardedDLRM) -> list[RowShard]:
    """The rows that this process holds, under the names of the whole DLRM's tables."""
    found = []
    for shard, table in zip(sharded.plan.of_rank(sharded.rank), sharded.shards, strict=True):
        split = (shard.first, sharded.model.config.table_sizes[shard.table])
        part = () if isinstance(table, QREmbeddingBag) else split  # quotient and remainder are never split
        names = _row_names(shard.table, table, False)
        parameters = row_parameters(table)  # type: ignore[arg-type]
        found += [RowShard(parameter, name, *part) for parameter, name in zip(parameters, names, strict=True)]
    return found
