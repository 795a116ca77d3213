"""The mathematics of APOLLO: sketches of gradients, and one step over weights of any placement.

A weight of shape [O, ...] is the matrix [O, I]. One of its two dimensions is contracted, the other has the channels.
Everything here sees the matrix as [contracted C, channels N]; with projection P [r, C] the sketch R = P G is [r, N].

A step goes over all weights three times: moments (which need the sketch of the whole matrix), one message with what the
processes must add up, then factors, limiter and update. The update itself, gradient times factors, is never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from edgewright.io.hashing import mixed_seed
from edgewright.training.distributed import BUCKET, RowRange, add_up, is_split, local

TINY = 1e-8  # keeps the two quotients of norms finite (official code)
STACKED = 2**24  # numbers of gradients that one batched product stacks


@dataclass(frozen=True)
class Sketch:
    """Shape of one weight's sketch. `by_row`: channels are the rows of the weight, columns are contracted."""

    rank: int
    contracted: int
    channels: int
    by_row: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.rank, self.channels

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like the weight (or some rows of it) as [contracted, channels]."""
        matrix = tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
        return matrix.t() if self.by_row else matrix

    def spread(self, factor: Tensor, weight: Tensor) -> Tensor:
        """Factors [channels], or one [], in a shape that multiplies `weight`."""
        if factor.ndim == 0:
            return factor
        return factor.view(-1, *(1,) * (weight.ndim - 1)) if self.by_row else factor.view(weight.shape[1:])


def sketch_of(shape: Sequence[int], rank: int, side: str = "smaller") -> Sketch:
    """The smaller dimension is contracted, of a square the columns (as the official code); side "local": the columns.

    The rank is at most the contracted dimension.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    by_row = side == "local" or rows >= columns
    contracted, channels = (columns, rows) if by_row else (rows, columns)
    return Sketch(min(rank, contracted), contracted, channels, by_row)


def projection(seed: int, window: int, sketch: Sketch) -> Tensor:
    """P [r, C] float32 with entries N(0, 1/r), on the CPU: the same bits on every machine with the same torch."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, window))
    return torch.randn(sketch.rank, sketch.contracted, generator=generator).mul_(sketch.rank**-0.5)


def svd_projection(gradient: Tensor, sketch: Sketch) -> Tensor:
    """P [r, C]: the leading left singular vectors of a gradient [C, N], as rows (GaLore's choice)."""
    return torch.linalg.svd(gradient, full_matrices=False).U[:, : sketch.rank].t().contiguous()


def sketches(projections: Sequence[Tensor], gradients: Sequence[Tensor], batched: bool) -> list[Tensor]:
    """P G for pairs of equal shapes, P [r, C] and G [C, N]; `batched`: in few products of stacked matrices."""
    if not batched:
        return [p @ g.to(p.dtype) for p, g in zip(projections, gradients, strict=True)]
    at_once = max(1, STACKED // max(1, gradients[0].numel()))
    products: list[Tensor] = []
    for start in range(0, len(gradients), at_once):
        part = slice(start, start + at_once)
        stacked = torch.stack(list(projections[part]))
        products += torch.bmm(stacked, torch.stack(list(gradients[part])).to(stacked.dtype)).unbind()
    return products


def column_norms(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms [N] of the columns of [C, N], computed in `dtype`.

    torch's own reduction is 5 to 9 times as slow on a CPU where the columns do not lie in one piece.
    """
    if matrix.stride(0) == 1:
        return torch.linalg.vector_norm(matrix, dim=0, dtype=dtype)
    return matrix.to(dtype).square().sum(0).sqrt()


def moment_norms(
    sketch: list[Tensor], average: list[Tensor], square: list[Tensor], betas: tuple[float, float], eps: float
) -> list[tuple[Tensor, Tensor]]:
    """Advance the moments in place; for each sketch the norms [N] of its Adam direction's columns and of its own.

    M = b1 M + (1 - b1) R, V = b2 V + (1 - b2) R R, direction M / (sqrt(V) + eps): steps 3 and 4 of the algorithm,
    without bias correction, which belongs to the learning rate.
    """
    foreach: Any = torch  # the list operations have no stubs
    foreach._foreach_lerp_(average, sketch, 1 - betas[0])
    foreach._foreach_mul_(square, betas[1])
    foreach._foreach_addcmul_(square, sketch, sketch, 1 - betas[1])
    direction = foreach._foreach_sqrt(square)
    foreach._foreach_add_(direction, eps)
    direction = foreach._foreach_div(average, direction)
    return [(column_norms(d, d.dtype), column_norms(r, r.dtype)) for d, r in zip(direction, sketch, strict=True)]


def limited(norm: Tensor, previous: Tensor, growth: float) -> tuple[Tensor, Tensor]:
    """(divisor, norm to remember) of the norm-growth limiter: no update is larger than `growth` x the one before.

    `previous` 0: there was none yet. deviation: a norm of 0 is not remembered; after one all-zero gradient the
    official code lets updates grow again from 1e-8 by 1 % a step.
    """
    divisor = torch.clamp(norm / (previous + TINY), min=growth) / growth
    divisor = torch.where(previous > 0, divisor, torch.ones_like(divisor))
    after = norm / divisor
    return divisor, torch.where(after > 0, after, previous)


# -- a step ------------------------------------------------------------------------------------------------------------


def read_moment(state: Mapping[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    """A moment in the dtype of the arithmetic: the tensor of the state itself where nothing need be converted."""
    return local(state[name]).to(dtype)


def write_moment(state: Mapping[str, Any], name: str, value: Tensor) -> None:
    """Keep what `read_moment` gave and a step changed."""
    stored = local(state[name])
    if stored.data_ptr() != value.data_ptr():
        stored.copy_(value)


class WeightFacts(NamedTuple):
    """Of one weight's last step, scalars on its device: mean factor s, whether the limiter cut, norm of U.

    The norm includes sqrt(alpha); the weight moved by the learning rate times that.
    """

    scale: Tensor
    limited: Tensor
    norm: Tensor


@dataclass(eq=False)
class WeightStep:
    """One weight in one step. `gradient` is a view [contracted, channels] of the part that lies here."""

    weight: nn.Parameter
    group: dict[str, Any]
    sketch: Sketch
    rows: RowRange
    gradient: Tensor
    dtype: torch.dtype  # of the arithmetic
    norms: Tensor | None  # of the gradient's channels [N]; None where nobody needs them
    state: Any = None
    direction: Any = None  # norms of the Adam direction in the sketch, by channel; a scalar for one factor
    own: Any = None  # norms of the sketch, likewise

    @property
    def channels_split(self) -> bool:
        return self.sketch.by_row and self.rows.group is not None

    @property
    def contraction_split(self) -> bool:
        return not self.sketch.by_row and self.rows.group is not None

    @property
    def factor(self) -> Tensor:
        return self.direction / (self.own + TINY)


def batched(group: Mapping[str, Any], device: torch.device) -> bool:
    return device.type != "cpu" if group["foreach"] is None else group["foreach"]


def chunks(works: list[WeightStep]) -> Iterator[list[WeightStep]]:
    """Weights whose sketches are made together: of one shape where batched, as one all-reduce carries where split."""
    waiting: dict[Any, list[WeightStep]] = {}
    for work in works:
        key: Any = (id(work.group), work.dtype, work.gradient.device)
        if batched(work.group, work.gradient.device):
            key = (*key, work.sketch, work.gradient.shape, work.gradient.dtype)
        elif not work.contraction_split:
            yield [work]
            continue
        chunk = waiting.setdefault(key, [])
        chunk.append(work)
        if sum(w.sketch.rank * w.sketch.channels for w in chunk) >= BUCKET:
            yield waiting.pop(key)
    yield from waiting.values()


def advance(chunk: list[WeightStep], project: Callable[[WeightStep], Tensor]) -> None:
    """Steps 2 to 4 for a chunk whose states are there: sketch the gradients, run Adam's moments on the sketches."""
    group = chunk[0].group
    projections = [project(work) for work in chunk]
    products = sketches(projections, [work.gradient for work in chunk], batched(group, chunk[0].gradient.device))
    add_up(products, [work.rows.group if work.contraction_split else None for work in chunk])
    average, square = ([read_moment(w.state, name, w.dtype) for w in chunk] for name in ("exp_avg", "exp_avg_sq"))
    norms = moment_norms(products, average, square, group["betas"], group["eps"])
    for work, first, second, (direction, own) in zip(chunk, average, square, norms, strict=True):
        write_moment(work.state, "exp_avg", first)
        write_moment(work.state, "exp_avg_sq", second)
        work.direction, work.own = direction, own


def share_norms(works: list[WeightStep]) -> None:
    """Turn norms by channel into the norm of the whole update before sqrt(alpha), in `norms`.

    What lies on several processes is added up, in one message for all weights. `direction` and `own` become scalars
    where the matrix has one factor.
    """
    totals = []
    for work in works:
        scaled = torch.zeros_like(work.own) if work.norms is None else work.norms
        if work.group["scale_type"] == "channel":
            scaled = scaled * work.factor
        totals.append(torch.stack([part.square().sum() for part in (scaled, work.direction, work.own)]))
    shared = [total.clone() for total in totals]
    add_up(shared, [work.rows.group for work in works])
    for work, here, everywhere in zip(works, totals, shared, strict=True):
        work.norms, direction, own = everywhere.sqrt().unbind()
        if work.group["scale_type"] == "tensor":
            # Where the contraction is split, every process has the whole sketch already.
            work.direction, work.own = here.sqrt().unbind()[1:] if work.contraction_split else (direction, own)
            work.norms = work.norms * work.factor


def apply(work: WeightStep) -> WeightFacts:
    """Steps 5 to 8: factors, limiter, sqrt(alpha), update, decoupled weight decay after it."""
    group, state, weight = work.group, work.state, local(work.weight)
    assert work.norms is not None
    alpha = work.sketch.contracted / work.sketch.rank if group["scale"] == "auto" else group["scale"]
    root = math.sqrt(alpha)
    front, behind = (root, 1.0) if group["scale_front"] else (1.0, root)
    norm, divisor = work.norms * front, torch.ones_like(work.norms)
    if group["norm_growth"] is not None:
        divisor, state["last_norm"] = limited(norm, state["last_norm"], group["norm_growth"])
    beta1, beta2 = group["betas"]
    step = int(state["step"])
    rate = group["lr"] * (math.sqrt(1 - beta2**step) / (1 - beta1**step))
    factor = work.factor * (-rate * root / divisor)
    # The factors do not depend on the sign of the gradient, so maximising only turns the update round.
    spread = work.sketch.spread(-factor if group["maximize"] else factor, weight)
    assert work.weight.grad is not None
    weight.addcmul_(local(work.weight.grad), spread)
    if group["weight_decay"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"])
    return WeightFacts(work.factor.mean(), divisor > 1, norm / divisor * behind)


def adamw_step(group: Mapping[str, Any], weights: Any, gradients: Any, average: Any, square: Any, steps: Any) -> None:
    """The functional AdamW of torch; on CPU its fused kernel, unless the group says foreach=True or False."""
    plain = all(w.device.type == "cpu" and not is_split(w) for w in weights)
    fused = group["foreach"] is None and plain
    adamw(
        weights,
        gradients,
        average,
        square,
        [],
        steps,
        foreach=None if fused else group["foreach"],
        fused=fused or None,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
