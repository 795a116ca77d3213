"""DLRM over several processes: tables are split among them, the networks are the same everywhere.

    torch.distributed.init_process_group("gloo")             # or "nccl"; torchrun sets the environment
    sharded = ShardedDLRM(DLRM(config))                       # print(sharded.plan.text())
    loss = mean_loss(sharded(dense, bags), labels)            # each process with its own samples
    loss.backward(); sharded.sync_gradients(); optimizer.step()

Each process looks up its rows for the samples of all (DLRM's "butterfly", section 4 of arXiv 1906.00091): one
all-to-all turns "my tables, all samples" into "all tables, my samples".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from edgewright.errors import UsageError
from edgewright.systems.dlrm.bags import JaggedBatch
from edgewright.systems.dlrm.exchange import AllToAllSpec, Arrive, CommTimer, Depart, exchange_ids
from edgewright.systems.dlrm.model import DLRM
from edgewright.systems.dlrm.optimizers import RowwiseAdagrad
from edgewright.systems.dlrm.plan import Shard, ShardingPlan, make_plan
from edgewright.systems.dlrm.tables import EmbeddingTable, ProjectedTable, QREmbeddingBag, row_parameters
from edgewright.training.checkpoint.files import open_files
from edgewright.training.checkpoint.ranks import Ranks
from edgewright.training.checkpoint.whole import SavedState, capture_state, save_state
from edgewright.training.distributed import join_rows


class ShardedDLRM(nn.Module):
    """A DLRM of which this process holds its share of the tables; takes the model over.

    plan: see `make_plan`. The weights of the first process are the ones that count. `clock` of the exchanges of sums is
    kept when `timed`. Raises UsageError where the plan cannot be, or outside a process group.
    """

    def __init__(
        self,
        model: DLRM,
        group: Any = None,
        plan: str | Mapping[str, int | str] = "auto",
        timed: bool = False,
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
        self.clock = CommTimer() if timed else None
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
        """This process's samples: dense [B, num_dense] and their bags -> logits [B]. Every process must call."""
        model = self.model
        model.check_dense(dense)
        bags.check(len(model.config.table_sizes), model.config.names)
        if bags.size != len(dense):
            raise UsageError(f"{len(dense)} rows of dense features and bags of {bags.size} samples; give as many")
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
        landed = Depart.apply(packed.flatten(), spec)
        z0 = model.bottom(dense)
        landed = Arrive.apply(landed, spec)
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
        it. optimizer: the row-wise Adagrad of `sparse_parameters`; its sums join as "adagrad.<name>".
        """
        state: dict[str, Tensor] = {f"{name}": tensor for name, tensor in self.model.state_dict().items()}
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
        """Write a checkpoint into a folder or fsspec URL, every process its part; the one before is deleted then."""
        with Ranks(group=self.group) as ranks:
            captured = capture_state(0, self.checkpoint_state(optimizer), None, None, ranks, copy=False)
            save_state(open_files(root), ranks, captured)

    def load(self, root: str | Path, optimizer: RowwiseAdagrad | None = None) -> None:
        """Read a checkpoint that any number of processes wrote, with any plan, in place.

        Raises UsageError where there is none, FormatError for one that is damaged or of another model; then nothing has
        been changed.
        """
        SavedState(open_files(root)).read(self.checkpoint_state(optimizer))

    def _root(self) -> int:
        return dist.get_process_group_ranks(self.group or dist.group.WORLD)[0]


def mean_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None, group: Any = None) -> Tensor:
    """This process's share of the mean cross-entropy over the samples of all, so that gradients average to its own.

    weights: 0 for samples that only pad a batch to its size, 1 for the others. Works outside a process group as well.
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
    if not 0 <= rank < world or count < 1:
        raise UsageError(f"rank {rank} of {world} processes and a batch of {count}: there is no such part")
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
