"""All-to-all exchange of a sharded lookup: ids to the processes that hold their rows, sums of rows back to the samples.

Every process has samples of its own (their number may differ). Ids travel without gradients. Sums travel back in one
all-to-all that is started before the bottom network runs and awaited after it; gradients go the other way, and again
the bottom network's backward pass runs meanwhile.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from edgewright.systems.dlrm.bags import JaggedBatch
from edgewright.systems.dlrm.plan import ShardingPlan


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
    parts: list[list[tuple[Tensor, Tensor, Tensor | None]]] = [[] for _ in range(mine)]
    at_length = at_value = 0
    for count in samples:
        for shard_index in range(mine):
            own = lengths[at_length : at_length + count]
            total = int(own.sum())
            chosen = slice(at_value, at_value + total)
            parts[shard_index].append((own, values[chosen], None if weights is None else weights[chosen]))
            at_length, at_value = at_length + count, at_value + total
    result = []
    for pieces in parts:
        counts = torch.cat([piece[0] for piece in pieces])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        joined = None if weights is None else (torch.cat([p[2] for p in pieces if p[2] is not None]),)
        result.append(JaggedBatch((torch.cat([piece[1] for piece in pieces]),), (offsets,), joined))
    return result, samples


@dataclass
class AllToAllSpec:
    """One exchange of sums: splits in elements, and the work in flight."""

    send: list[int]
    receive: list[int]
    group: Any
    scale: float
    clock: CommTimer | None = None
    work: Any = None
    buffer: Tensor | None = None
    source: Tensor | None = None  # alive until the work is done

    def start(self, outgoing: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Begin to exchange; the result is filled when `finish` returns."""
        self.source = outgoing.contiguous()
        self.buffer = self.source.new_empty(sum(receive))
        if self.clock is not None:
            self.clock.began = time.perf_counter()
        self.work = dist.all_to_all_single(self.buffer, self.source, receive, send, group=self.group, async_op=True)
        return self.buffer

    def finish(self) -> None:
        """Wait for the exchange that is under way."""
        before = time.perf_counter()
        self.work.wait()
        if self.clock is not None:
            now = time.perf_counter()
            self.clock.waiting += now - before
            self.clock.flying += now - self.clock.began
        self.work = self.source = None


class Depart(torch.autograd.Function):
    """Start the exchange of sums [n] -> [m]; in the backward pass, wait for the gradients that `Arrive` sent.

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


class Arrive(torch.autograd.Function):
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
