"""One step of APOLLO over weights of any placement: moments on sketches, norms shared between processes, the update.

A step goes over all weights three times: moments (which need the sketch of the whole matrix), one message with what the
processes must add up, then factors, limiter and update. The update itself, gradient times factors, is never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from edgewright.systems.apollo import state as kept
from edgewright.systems.apollo.sketch import TINY, Sketch, limited, moment_norms, sketches
from edgewright.training.distributed import BUCKET, RowRange, add_up, is_split, local


class Facts(NamedTuple):
    """Of one weight's last step, scalars on its device: mean factor s, whether the limiter cut, norm of U.

    The norm includes sqrt(alpha); the weight moved by the learning rate times that.
    """

    scale: Tensor
    limited: Tensor
    norm: Tensor


@dataclass(eq=False)
class Work:
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


def chunks(works: list[Work]) -> Iterator[list[Work]]:
    """Weights whose sketches are made together: of one shape where batched, as one all-reduce carries where split."""
    waiting: dict[Any, list[Work]] = {}
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


def advance(chunk: list[Work], project: Callable[[Work], Tensor]) -> None:
    """Steps 2 to 4 for a chunk whose states are there: sketch the gradients, run Adam's moments on the sketches."""
    group = chunk[0].group
    projections = [project(work) for work in chunk]
    found = sketches(projections, [work.gradient for work in chunk], batched(group, chunk[0].gradient.device))
    add_up(found, [work.rows.group if work.contraction_split else None for work in chunk])
    average, square = ([kept.read(w.state, name, w.dtype) for w in chunk] for name in ("exp_avg", "exp_avg_sq"))
    norms = moment_norms(found, average, square, group["betas"], group["eps"])
    for work, first, second, (direction, own) in zip(chunk, average, square, norms, strict=True):
        kept.write(work.state, "exp_avg", first)
        kept.write(work.state, "exp_avg_sq", second)
        work.direction, work.own = direction, own


def share_norms(works: list[Work]) -> None:
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


def apply(work: Work) -> Facts:
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
    return Facts(work.factor.mean(), divisor > 1, norm / divisor * behind)


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
