"""How the processes of a Distributed Lion run vote: packed bytes over torch.distributed, and a count of them.

There is no server. "two_phase" makes every process the server of its share of the elements: it receives everybody's
votes on that share (all_to_all), counts, and sends the outcome to all (all_gather). "all_gather" sends all votes to
everybody, and each counts for itself: one round instead of two, fewer bytes while the processes are few.

Votes are signs at one bit, trits at five a byte, small counts in bit planes. One bit cannot say 0, so there the rule of
`alternate_votes` decides: a hash of place and step, the same on every machine and without a bias over time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from edgewright.checks import check, one_of
from edgewright.errors import CheckFailed, EdgewrightError, UsageError, in_one_line
from edgewright.io.bits import TRITS, pack_codes, pack_planes, pack_trits, unpack_codes, unpack_planes, unpack_trits
from edgewright.io.hashing import GOLDEN, ordered_bit_sum, signed64, splitmix64_
from edgewright.training.distributed import is_split, local

AGGREGATES = ("mavo", "avg")
TOPOLOGIES = ("auto", "two_phase", "all_gather")
REPLIES = ("bits", "int8")
SCHEMES = ("fp32", "bf16", *(f"{aggregate} {way}" for aggregate in AGGREGATES for way in TOPOLOGIES[1:]))
HASHES = 2**16  # worked on at a time, so that they stay in the cache
SMALL_MESSAGE = 16 * 2**10  # bytes below which a second round costs more than it saves
MOST_IN_INT8 = 127
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


@dataclass(frozen=True)
class Bucket:
    """Parameters that vote together, flattened one after the other.

    `members` are their numbers in the optimizer, `sizes` their elements, `offsets` where each begins when all
    parameters of the optimizer stand in one row. `ternary`: votes of 0 are sent; otherwise they are replaced.
    """

    members: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    ternary: bool

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    def index(self, positions: Tensor) -> Tensor:
        """Places within the bucket -> places in the row of all parameters; int64."""
        ends = torch.tensor(self.sizes, device=positions.device).cumsum(0)
        member = torch.searchsorted(ends, positions, right=True)
        moved = torch.tensor(self.offsets, device=positions.device) - (ends - ends.new_tensor(self.sizes))
        return positions + moved[member]


@dataclass
class VoteTraffic:
    """Payload bytes of this process since the optimizer was made, without the headers of the network.

    `pad_bytes` (filling up to whole bytes and shares) and `control_bytes` (who takes part, checksums, shared momenta)
    are parts of `sent_bytes`; `seconds` were spent in packing, waiting and counting.
    """

    sent_bytes: float = 0
    recv_bytes: float = 0
    pad_bytes: float = 0
    control_bytes: float = 0
    seconds: float = 0.0
    steps: int = 0
    elements: int = 0

    def as_dict(self, world: int) -> dict[str, float]:
        """The figures, and how many times more a ring all-reduce of float32 gradients sends."""
        figures: dict[str, float] = {item.name: getattr(self, item.name) for item in fields(self)}
        ring = 2 * (world - 1) / world * 4 * self.elements
        return figures | {"ratio_vs_fp32_ring": ring / self.sent_bytes if self.sent_bytes else math.nan}


def wire_bytes(scheme: str, numel: int, world: int, ternary: bool = False) -> float:
    """Payload bytes that each of `world` processes sends for `numel` elements, padding left out.

    scheme: "fp32" or "bf16" (ring all-reduce), or an aggregate and a topology as "mavo two_phase".
    """
    check("scheme", scheme, one_of(*SCHEMES))
    up = (8 / TRITS if ternary else 1) / 8
    if scheme in ("fp32", "bf16"):
        return 2 * (world - 1) / world * numel * (4 if scheme == "fp32" else 2)
    aggregate, _, topology = scheme.partition(" ")
    if topology == "all_gather":
        return (world - 1) * numel * up
    down = up if aggregate == "mavo" else reply_bits(world, ternary) / 8
    return (world - 1) / world * numel * (up + down)


def reply_bits(world: int, ternary: bool) -> int:
    """Bits of a sum of votes: world + 1 outcomes of binary votes, 2 * world + 1 of ternary ones."""
    return math.ceil(math.log2((2 * world if ternary else world) + 1))


def alternate_votes(index: Tensor, step: int) -> Tensor:
    """+1 where splitmix64(index XOR step * GOLDEN) is even, else -1: int64 [n] -> int8 [n].

    `index` counts elements over all parameters of the optimizer, so that no layout of buckets changes the rule.
    """
    votes = torch.empty(index.shape, dtype=torch.int8, device=index.device)
    for piece, out in zip(index.split(HASHES), votes.split(HASHES), strict=True):
        lowest = splitmix64_(piece.bitwise_xor(signed64(step * GOLDEN))).bitwise_and_(1)
        out.copy_(1 - 2 * lowest)
    return votes


def count_bits(packed: Tensor) -> Tensor:
    """How many of the N rows have a one in each place: uint8 [N, n] -> uint8 [8n], or int32 where N > 255."""
    total = None
    for rows in packed.split(255):  # eight counters of a byte in one word: 255 rows cannot overflow them
        words = unpack_codes(rows[0], 1).view(torch.int64)
        for row in rows[1:]:
            words += unpack_codes(row, 1).view(torch.int64)
        counts = words.view(torch.uint8)
        total = counts if total is None else total.to(torch.int32) + counts
    assert total is not None
    return total


@dataclass
class Round:
    """One bucket on its way. `sent` is kept alive until the network has read it."""

    bucket: Bucket
    step: int
    padded: int
    topology: str
    work: Any
    received: Tensor
    sent: list[Tensor] = field(default_factory=list)
    outcome: Tensor | None = None  # of the own share; two_phase only


class Exchange:
    """Votes in, outcome out, over one process group. All processes call everything in the same order.

    Raises EdgewrightError when another process has not answered for `timeout` seconds or is gone.
    """

    def __init__(
        self, group: Any, aggregate: str, topology: str, reply: str, timeout: float, traffic: VoteTraffic | None = None
    ) -> None:
        self.group, self.aggregate, self.reply_form, self.timeout = group, aggregate, reply, timeout
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.traffic = VoteTraffic() if traffic is None else traffic
        self._topology, self._probed = topology, False
        if reply == "int8" and self.world > MOST_IN_INT8:
            raise UsageError(f"reply='int8' holds sums of at most {MOST_IN_INT8} votes, here are {self.world}: 'bits'")

    def ranks(self) -> list[int]:
        """The processes, by their numbers in the whole run."""
        ranks: list[int] = dist.get_process_group_ranks(dist.group.WORLD if self.group is None else self.group)
        return ranks

    def outcomes(self, votes: Sequence[tuple[Bucket, Tensor]], step: int) -> list[Tensor]:
        """The outcome of every bucket, integers [numel]: the majority's sign under "mavo", the sum under "avg".

        votes: int8 [numel] of -1, 0, 1 for each bucket, this process's. While they are packed and counted for one
        bucket, the network carries another.
        """
        began, waited = time.monotonic(), self.traffic.seconds
        rounds = [self._start(part, bucket, step) for bucket, part in votes]
        for round_ in rounds:
            self._reply(round_)
        outcomes = [self._finish(round_) for round_ in rounds]
        self.traffic.seconds = waited + time.monotonic() - began
        return outcomes

    def _start(self, votes: Tensor, bucket: Bucket, step: int) -> Round:
        """Send this process's votes for a bucket."""
        if not bucket.ternary:
            silent = (votes == 0).nonzero().flatten()
            if len(silent):
                votes[silent] = alternate_votes(bucket.index(silent), step)
        topology = self._way(bucket, votes.device)
        shares = self.world if topology == "two_phase" else 1
        unit = shares * (TRITS * 8 if bucket.ternary else 8)  # whole bytes up, and whole bytes of bit planes down
        padded = math.ceil(bucket.numel / unit) * unit
        votes = torch.nn.functional.pad(votes, (0, padded - bucket.numel))
        packed = pack_trits(votes) if bucket.ternary else pack_codes(votes > 0, 1)
        if topology == "two_phase":
            received = torch.empty_like(packed)
            work = dist.all_to_all_single(received, packed, group=self.group, async_op=True)
            self._count(packed.numel() / self.world, padded, bucket)
        else:
            received = packed.new_empty(self.world * packed.numel())
            work = all_gather(received, packed, group=self.group, async_op=True)
            self._count(packed.numel(), padded, bucket)
        return Round(bucket, step, padded, topology, work, received, [packed])

    def _reply(self, round_: Round) -> None:
        """Count the votes on this process's share and send the outcome; nothing to do under "all_gather"."""
        if round_.topology == "all_gather":
            return
        self.wait(round_.work)
        share = round_.padded // self.world
        outcome = self._tally(round_, share * self.rank, share)
        if self.aggregate == "mavo":
            packed = pack_trits(outcome) if round_.bucket.ternary else pack_codes(outcome > 0, 1)
        elif self.reply_form == "int8":
            packed = outcome.to(torch.int8).view(torch.uint8)
        else:
            ternary = round_.bucket.ternary
            codes = outcome + self.world if ternary else (outcome + self.world) >> 1
            packed = pack_planes(codes, reply_bits(self.world, ternary))
        round_.received = packed.new_empty(self.world * packed.numel())
        round_.work = all_gather(round_.received, packed, group=self.group, async_op=True)
        round_.sent.append(packed)
        self._count(packed.numel(), round_.padded, round_.bucket)

    def _finish(self, round_: Round) -> Tensor:
        """The outcome of a bucket."""
        self.wait(round_.work)
        ternary = round_.bucket.ternary
        if round_.topology == "all_gather":
            outcome = self._tally(round_, 0, round_.padded)
        elif self.aggregate == "mavo":
            outcome = (
                unpack_trits(round_.received) if ternary else unpack_codes(round_.received, 1).view(torch.int8) * 2 - 1
            )
        elif self.reply_form == "int8":
            outcome = round_.received.view(torch.int8)
        else:
            rows, bits = round_.received.view(self.world, -1), reply_bits(self.world, ternary)
            codes = torch.cat([unpack_planes(row, bits) for row in rows])
            outcome = codes - self.world if ternary else 2 * codes - self.world
        return outcome[: round_.bucket.numel]

    def all_reduce(self, tensor: Tensor, op: Any = None) -> Tensor:
        """`tensor` reduced in place over the processes (default: the largest), waited for no longer than `timeout`."""
        op = dist.ReduceOp.MAX if op is None else op
        self.wait(dist.all_reduce(tensor, op=op, group=self.group, async_op=True))
        sent = 2 * (self.world - 1) / self.world * tensor.numel() * tensor.element_size()
        self.traffic.sent_bytes += sent
        self.traffic.recv_bytes += sent
        self.traffic.control_bytes += sent
        return tensor

    def wait(self, work: Any) -> None:
        """Wait for a collective; EdgewrightError when it fails or takes longer than `timeout`."""
        began = time.monotonic()
        try:
            work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            waited = time.monotonic() - began
            raise EdgewrightError(
                f"process {self.rank} of {self.world} lost another one after {waited:.0f} s of waiting "
                f"({in_one_line(error)}): start all of them again from the last checkpoint"
            ) from error
        finally:
            self.traffic.seconds += time.monotonic() - began

    def _way(self, bucket: Bucket, device: torch.device) -> str:
        """The way this bucket goes: as asked for, or the one of fewer bytes; one round where that is as good."""
        if self._topology == "all_gather":
            return "all_gather"
        if not self._probed and not self._has_all_to_all(device):
            self._topology = "all_gather"
            return "all_gather"
        if self._topology == "two_phase":
            return "two_phase"
        two, one = (
            wire_bytes(f"{self.aggregate} {way}", bucket.numel, self.world, bucket.ternary) for way in TOPOLOGIES[1:]
        )
        return "two_phase" if two < one and one > SMALL_MESSAGE else "all_gather"

    def _has_all_to_all(self, device: torch.device) -> bool:
        """Whether the backend has all_to_all_single; not every one does."""
        self._probed = True
        tiny = torch.zeros(self.world, dtype=torch.uint8, device=device)
        try:
            work = dist.all_to_all_single(torch.empty_like(tiny), tiny, group=self.group, async_op=True)
        except (RuntimeError, NotImplementedError) as error:
            if "support" in str(error).lower() or "implement" in str(error).lower():
                return False
            raise
        self.wait(work)
        return True

    def _tally(self, round_: Round, start: int, count: int) -> Tensor:
        """The votes of all processes on `count` places from `start`: sums, or signs of sums with ties decided."""
        rows = round_.received.view(self.world, -1)
        if round_.bucket.ternary:
            total = unpack_trits(rows).sum(0, dtype=torch.int16)
            return total.sign().to(torch.int8) if self.aggregate == "mavo" else total
        ones = count_bits(rows)
        if self.aggregate == "avg":
            return 2 * ones.to(torch.int32 if self.world > 2**14 else torch.int16) - self.world
        half = self.world // 2
        signs = (ones > half).to(torch.int8) * 2 - 1
        if self.world % 2 == 0:
            ties = (ones == half).nonzero().flatten()
            places = ties[: int((ties < round_.bucket.numel - start).sum())]  # what is beyond is padding
            signs[places] = alternate_votes(round_.bucket.index(places + start), round_.step)
        assert len(signs) == count
        return signs

    def _count(self, chunk: float, padded: int, bucket: Bucket) -> None:
        """Every round moves world - 1 chunks in and out of a process."""
        sent = (self.world - 1) * chunk
        self.traffic.sent_bytes += sent
        self.traffic.recv_bytes += sent
        self.traffic.pad_bytes += sent * (padded - bucket.numel) / padded


def check_shards(parameter: Tensor, exchange: Exchange | None) -> None:
    """UsageError for a parameter that is split among the processes that vote: no two of them hold the same part."""
    if not is_split(parameter) or exchange is None:
        return
    split = set(parameter.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
    if len(split & set(exchange.ranks())) > 1:
        raise UsageError(
            "the weights are split over the processes that would vote on them (FSDP): split over one row of a mesh and "
            "vote over the other, as mesh = init_device_mesh('cuda', (2, 4), mesh_dim_names=('replicate', 'shard')), "
            "fully_shard(model, mesh=mesh['shard']), DistributedLion(..., process_group=mesh['replicate'].get_group())"
        )


def check_replicas(exchange: Exchange | None, parameters: Sequence[Tensor], names: Sequence[str]) -> list[int]:
    """The checksums of `parameters`; CheckFailed, naming the first that differs, unless all processes have the same."""
    sums = [ordered_bit_sum(local(parameter)) for parameter in parameters]
    if exchange is None:
        return sums
    device = local(parameters[0]).device
    if spread(exchange, [len(sums)], device):
        raise CheckFailed(f"process {exchange.rank} trains {len(sums)} parameters, others have more or fewer")
    differing = spread(exchange, sums, device)
    if differing:
        raise CheckFailed(
            f"the processes hold different values of {names[differing[0]]}: start all from the same weights (DDP "
            "broadcasts those of the first) and change them by the optimizer alone"
        )
    return sums


def check_gradients_differ(exchange: Exchange, gradients: Sequence[Tensor | None]) -> None:
    """UsageError when all processes have the same gradients to the last bit: somebody has averaged them."""
    sums = [0 if gradient is None else ordered_bit_sum(gradient) for gradient in gradients]
    device = next((gradient.device for gradient in gradients if gradient is not None), torch.device("cpu"))
    if not spread(exchange, sums, device) and any(sums):
        raise UsageError(
            "all processes have the same gradient, bit for bit: DDP has averaged it already, which spends the bytes "
            "that Lion saves; call disable_gradient_allreduce(model) before the first backward. If every process "
            "really reads the same data, pass DistributedLion(..., check_gradients=False)"
        )


def spread(exchange: Exchange, values: Sequence[int], device: torch.device) -> list[int]:
    """The places at which the processes hold different integers."""
    row = torch.tensor(list(values), dtype=torch.int64, device=device)
    largest = exchange.all_reduce(torch.cat([row, ~row]))  # ~x orders the other way round: the least comes with it
    high, low = largest.chunk(2)
    return (high != ~low).nonzero().flatten().tolist()
