"""Proximal maps that pull weights towards a set of target values, softly at first and onto it in the end.

A map takes the latent weights of a matrix and the targets of each of its rows, and writes what the next forward pass
sees. Source: PARQ (arXiv 2503.15748, section 4) for the piecewise-affine map and its schedule; BinaryRelax
(arXiv 1801.06313); the hard map is the straight-through estimator. The theory behind it stands at the end: the convex
regulariser (`par_penalty`), the closed form of its proximal map (`prox_par`), and `AProx`.

Shapes: latent and result [R, C] in one floating dtype; targets [R, K] or one scale a row [R, 1].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from edgewright.checks import check, check_fields, number, one_of
from edgewright.errors import UsageError
from edgewright.quantization.grids import Grid

# Elements that a map works on at once: its temporaries stay in cache, and memory does not grow with the matrix.
ELEMENTS_AT_ONCE = {"cpu": 1 << 17}
ELEMENTS_ON_DEVICE = 1 << 24
FEW_LEVELS = 32  # up to here comparing with each border in turn beats a binary search


@dataclass(frozen=True)
class EvenLevels:
    """Evenly spaced levels in units of a scale: first, first + spacing, ... (count of them).

    grid: the packed grid that stores them, "" where there is none. shift + code is the level of an integer code.
    mirrored: scales may be negative, so that level k + 1 can lie below level k.
    """

    first: float
    spacing: float
    count: int
    grid: str = ""
    mirrored: bool = False

    @classmethod
    def of_grid(cls, grid: Grid, mirrored: bool = False) -> EvenLevels:
        levels = grid.levels.tolist()
        return cls(levels[0], levels[1] - levels[0], len(levels), grid.name, mirrored)

    @property
    def last(self) -> float:
        return self.first + self.spacing * (self.count - 1)

    @property
    def shift(self) -> float:
        """Distance of the levels from the multiples of the spacing, 0 <= shift < spacing."""
        return self.first % self.spacing

    def levels(self, like: Tensor) -> Tensor:
        """[count], ascending, in the dtype and on the device of `like`."""
        return torch.arange(self.count, dtype=like.dtype, device=like.device).mul_(self.spacing).add_(self.first)


@dataclass(frozen=True)
class Targets:
    """Target values of each row of a matrix: levels [R, K] ascending, or where they are even one scale a row [R, 1]."""

    values: Tensor
    even: EvenLevels | None = None

    def levels(self) -> Tensor:
        """[R, K] ascending, unless a scale is negative."""
        return self.values if self.even is None else self.values * self.even.levels(self.values)

    def rows(self, start: int, stop: int) -> Targets:
        return self if self.values.shape[0] == 1 else Targets(self.values[start:stop], self.even)

    def neighbours(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high), broadcastable to `weights`: the two targets around each; the outermost two beyond the ends."""
        even = self.even
        if even is not None and even.count == 2:
            return self.values * even.first, self.values * even.last
        if even is not None:  # by arithmetic: spacing is 1 wherever there are more than two levels
            below = _floor_to(even, weights / self.values)
            above = (below + even.spacing).mul_(self.values)
            below.mul_(self.values)
            return (torch.minimum(below, above), torch.maximum(below, above)) if even.mirrored else (below, above)
        index = _count_below(weights, self.values[:, 1:-1])
        return self.values.gather(1, index), self.values.gather(1, index.add_(1))

    def nearest(self, weights: Tensor, out: Tensor) -> Tensor:
        """The target nearest to each weight; halfway between two, the lower (where levels are even: the even code)."""
        if self.even is None:
            middles = (self.values[:, :-1] + self.values[:, 1:]).mul_(0.5)
            return out.copy_(self.values.gather(1, _count_below(weights, middles)))
        torch.div(weights, self.values, out=out)
        if self.even.count == 2:  # sign(0) is +1, as on every binary grid of the package
            out.ge_(0).mul_(self.even.spacing).add_(self.even.first)
        else:
            shift = self.even.shift
            _add_(_add_(out, -shift).round_().clamp_(self.even.first - shift, self.even.last - shift), shift)
        return out.mul_(self.values)


class ProxMap(Protocol):
    """A proximal map with its schedule: frozen data. `step` counts optimizer steps from 0."""

    @property
    def anneal_end(self) -> int:
        """From this step on every weight is on a target."""

    def starts_by(self, step: int) -> bool:
        """Whether the map does anything at `step`."""

    def inverse_slope(self, step: int) -> float:
        """1: weights are left alone at `step`, 0: all are on targets."""

    def apply(self, latent: Tensor, targets: Targets, step: int, out: Tensor) -> Tensor:
        """Write the mapped weights.

        Args:
            latent: float [R, C].
            targets: of its rows.
            step: of the optimizer, which the schedule follows.
            out: [R, C] in the dtype of `latent`, or `latent` itself.

        Returns:
            `out`.
        """


@dataclass(frozen=True)
class ProxHard:
    """Always the nearest target: straight-through training (BinaryConnect) without a fake-quantised layer.

    See `ProxMap` for the methods of all maps.
    """

    @property
    def anneal_end(self) -> int:
        return 0

    def starts_by(self, step: int) -> bool:
        """As `ProxMap.starts_by`."""
        return True

    def inverse_slope(self, step: int) -> float:
        """As `ProxMap.inverse_slope`."""
        return 0.0

    def apply(self, latent: Tensor, targets: Targets, step: int, out: Tensor) -> Tensor:
        """As `ProxMap.apply`."""
        for weights, part, place in _slices(latent, targets, out):
            part.nearest(weights, place)
        return out


@dataclass(frozen=True)
class Annealing:
    """What the maps with a schedule share.

    Args:
        anneal_start: before this step nothing happens, at least 0.
        anneal_end: from this step on the map is hard, above anneal_start.
    """

    anneal_start: int
    anneal_end: int

    def __post_init__(self) -> None:
        if not 0 <= self.anneal_start < self.anneal_end:
            raise UsageError(
                f"anneal_start={self.anneal_start}, anneal_end={self.anneal_end}: annealing starts at step 0 or later "
                f"and ends after that, for example {type(self).__name__}(anneal_start=50, anneal_end=400)"
            )

    def starts_by(self, step: int) -> bool:
        """As `ProxMap.starts_by`."""
        return step >= self.anneal_start

    def share(self, step: int) -> float:
        """How much of the annealing is over, 0..1."""
        return min(1.0, max(0.0, (step - self.anneal_start) / (self.anneal_end - self.anneal_start)))

    def inverse_slope(self, step: int) -> float:
        """As `ProxMap.inverse_slope`."""
        return 1.0 - self.share(step)


@dataclass(frozen=True)
class ProxPARQ(Annealing):
    """Affine between targets with slope 1 / r around each midpoint, flat on them; r falls from 1 to 0.

    PARQ (arXiv 2503.15748), section 4. deviation: another center than 0.5 is normalised with itself, so r runs from 1
    to 0 for every center.

    Args:
        anneal_start: step from which r falls.
        anneal_end: step at which it is 0.
        steepness: of the sigmoid, above 0, at most 1000; the paper has 10 and, in long runs, 50 to 100.
        center: where the sigmoid passes its middle, as a fraction of the annealing.
        schedule: "sigmoid", or "cosine", which has neither.

    Raises:
        UsageError: a setting out of its range.
    """

    steepness: float = 10.0
    center: float = 0.5
    schedule: Literal["sigmoid", "cosine"] = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = {
            "steepness": number(above=0, most=1000),
            "center": number(above=0, below=1),
            "schedule": one_of("sigmoid", "cosine"),
        }
        check_fields(self, rules)

    def inverse_slope(self, step: int) -> float:
        """As `ProxMap.inverse_slope`."""
        share = self.share(step)
        if share in (0.0, 1.0):
            return 1.0 - share
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        falling, first, last = (_logistic(self.steepness * (self.center - f)) for f in (share, 0.0, 1.0))
        return (falling - last) / (first - last)

    def apply(self, latent: Tensor, targets: Targets, step: int, out: Tensor) -> Tensor:
        """As `ProxMap.apply`."""
        slope = self.inverse_slope(step)
        if slope == 0.0:
            return ProxHard().apply(latent, targets, step, out)
        slope = max(slope, torch.finfo(latent.dtype).tiny)  # a smaller one would be zero in the weights' own type
        for weights, part, place in _slices(latent, targets, out):
            low, high = part.neighbours(weights)
            center = (low + high).mul_(0.5)
            # The difference to the midpoint comes first: it is exact where dividing by a small slope would magnify.
            torch.sub(weights, center, out=place).div_(slope).add_(center)
            _between_(place, low, high)
        return out


@dataclass(frozen=True)
class ProxBinaryRelax(Annealing):
    """(1 - theta) weight + theta nearest target; theta grows linearly from 0 to 1 (BinaryRelax, arXiv 1801.06313).

    Args:
        anneal_start: step from which theta grows.
        anneal_end: step at which it is 1.

    Raises:
        UsageError: annealing that does not end after it starts.
    """

    def apply(self, latent: Tensor, targets: Targets, step: int, out: Tensor) -> Tensor:
        """As `ProxMap.apply`."""
        theta = self.share(step)
        if theta == 1.0:
            return ProxHard().apply(latent, targets, step, out)
        for weights, part, place in _slices(latent, targets, out):
            near = part.nearest(weights, torch.empty_like(weights))
            torch.mul(weights, 1 - theta, out=place).add_(near, alpha=theta)
        return out


@dataclass(frozen=True)
class ProxSoft(Annealing):
    """A sigmoid between neighbouring targets whose temperature grows geometrically, then hard.

    deviation: the sigmoid is stretched to reach both neighbours, so that the map begins close to the identity; the bare
    one would move every weight to within an eighth of a midpoint in the first step.

    Args:
        anneal_start: step from which the temperature grows.
        anneal_end: step at which it is highest.
        coldest: first temperature in units of the distance of neighbours, 1 in the paper.
        hottest: last one, 1000 in the paper.

    Raises:
        UsageError: a setting out of its range.
    """

    coldest: float = 1.0
    hottest: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.coldest <= self.hottest:
            raise UsageError(f"temperatures {self.coldest} to {self.hottest}: positive and growing, such as 1 to 1000")

    def temperature(self, step: int) -> float:
        """Of the sigmoid at `step` of the optimizer."""
        return self.coldest * (self.hottest / self.coldest) ** self.share(step)

    def inverse_slope(self, step: int) -> float:
        """Of the sigmoid at a midpoint."""
        if step < self.anneal_start or step >= self.anneal_end:
            return 1.0 - self.share(step)
        heat = self.temperature(step)
        return 4.0 / heat * (2.0 * _logistic(heat / 2) - 1.0)

    def apply(self, latent: Tensor, targets: Targets, step: int, out: Tensor) -> Tensor:
        """As `ProxMap.apply`."""
        if step >= self.anneal_end:
            return ProxHard().apply(latent, targets, step, out)
        heat = self.temperature(step)
        reach = 2.0 * _logistic(heat / 2) - 1.0  # how far the bare sigmoid gets from end to end
        for weights, part, place in _slices(latent, targets, out):
            low, high = part.neighbours(weights)
            width = high - low
            place.copy_(weights - (low + high).mul_(0.5)).div_(width.clamp_min(torch.finfo(latent.dtype).tiny))
            place.mul_(heat).sigmoid_().sub_(0.5).div_(reach).add_(0.5).clamp_(0, 1).mul_(width).add_(low)
            _between_(place, low, high)
        return out


def _slices(latent: Tensor, targets: Targets, out: Tensor) -> Iterator[tuple[Tensor, Targets, Tensor]]:
    """Parts of the matrix with their targets, small enough to be worked on in cache; a single row is cut, too."""
    rows, columns = latent.shape
    budget = ELEMENTS_AT_ONCE.get(latent.device.type, ELEMENTS_ON_DEVICE)
    if targets.values.shape[0] == 1:
        flat, place = latent.reshape(1, -1), out.view(1, -1)
        for start in range(0, flat.shape[1], budget):
            yield flat[:, start : start + budget], targets, place[:, start : start + budget]
        return
    height = max(1, budget // max(1, columns))
    for start in range(0, rows, height):
        stop = min(rows, start + height)
        yield latent[start:stop], targets.rows(start, stop), out[start:stop]


def _between_(tensor: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp in place; two passes that are three times faster than torch.clamp with tensors."""
    torch.maximum(tensor, low, out=tensor)
    return torch.minimum(tensor, high, out=tensor)


def _count_below(weights: Tensor, borders: Tensor) -> Tensor:
    """int64 [R, C]: how many of a row's ascending borders [R, K] lie below each weight."""
    if borders.shape[1] > FEW_LEVELS:
        return torch.searchsorted(borders.contiguous(), weights)
    count, above = torch.zeros_like(weights), torch.empty_like(weights)
    for k in range(borders.shape[1]):
        count.add_(torch.gt(weights, borders[:, k : k + 1], out=above))
    return count.long()


def _floor_to(even: EvenLevels, units: Tensor) -> Tensor:
    """The level at or below each value, at most the last but one and at least the first; in place."""
    shift = even.shift
    _add_(units, -shift).floor_().clamp_(even.first - shift, even.last - even.spacing - shift)
    return _add_(units, shift)


def _add_(tensor: Tensor, number: float) -> Tensor:
    return tensor.add_(number) if number else tensor


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


# -- the theory (sections 2 and 3) -------------------------------------------------------------------------------------
#
# Targets 0 = q_0 < q_1 < ... < q_m (and their negatives) are the kinks of
#     Psi(w) = sum over k < m of a_k * clamp(|w| - q_k, 0, q_(k+1) - q_k),   infinite beyond q_m,
# which is the paper's maximum of affine pieces for slopes 0 <= a_0 < a_1 < ... < a_(m-1).


def par_penalty(w: Tensor, q: Sequence[float], a: Sequence[float]) -> Tensor:
    """Psi of every element (PARQ, arXiv 2503.15748, section 2).

    Args:
        w: float [...].
        q: targets q_0 = 0 < ... < q_m.
        a: the m slopes 0 <= a_0 < ... < a_(m-1).

    Returns:
        [...], infinite where |w| > q_m.

    Raises:
        UsageError: targets and slopes that make no convex penalty.
    """
    _check_penalty(q, a)
    size = w.abs()
    pieces = (slope * (size - low).clamp(0, high - low) for slope, low, high in _pieces(q, a))
    return torch.where(size <= q[-1], sum(pieces, torch.zeros_like(size)), math.inf)


def prox_par(u: Tensor, q: Sequence[float], a: Sequence[float], t: float = 1.0) -> Tensor:
    """Argmin over w of t Psi(w) + (w - u)^2 / 2, element by element, in closed form.

    |u| in [t a_(k-1) + q_k, t a_k + q_k] goes to q_k; between such plateaus the slope is 1 (a_(-1) = 0, a_m infinite).

    Args:
        u: float [...].
        q: targets q_0 = 0 < ... < q_m.
        a: the m slopes 0 <= a_0 < ... < a_(m-1).
        t: weight of the penalty, at least 0.

    Returns:
        [...]

    Raises:
        UsageError: targets and slopes that make no convex penalty.
    """
    _check_penalty(q, a)
    return _prox_par(u, q, a, t)


def _prox_par(u: Tensor, q: Sequence[float], a: Sequence[float], t: float) -> Tensor:
    size = u.abs()
    pieces = ((size - t * slope - low).clamp(0, high - low) for slope, low, high in _pieces(q, a))
    return sum(pieces, torch.zeros_like(size)).copysign(u)


class AProx(torch.optim.Optimizer):
    """u <- u - lr * gradient at w;  w <- prox of (sum of lr so far) * strength * Psi at u.

    The plateaus widen with every step, so the last iterate settles on targets; for convex losses its gap is bounded by
    G R (2 + 1.5 ln t) / sqrt(t) with lr = R / (2 G sqrt(t)) (PARQ, arXiv 2503.15748, section 3). Latents and the sum
    are in `state` and the groups.

    Args:
        params: parameters or groups of them.
        lr: learning rate, above 0.
        q: targets q_0 = 0 < ... < q_m.
        a: the m slopes 0 <= a_0 < ... < a_(m-1).
        strength: of the penalty, at least 0.

    Raises:
        UsageError: a setting out of its range, targets and slopes that make no convex penalty.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, q: Sequence[float], a: Sequence[float], strength: float = 1.0
    ) -> None:
        check("lr", lr, number(above=0))
        check("strength", strength, number(0))
        _check_penalty(q, a)
        super().__init__(params, {"lr": lr, "q": tuple(q), "a": tuple(a), "strength": strength, "total_lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            The closure's value, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["total_lr"] += float(group["lr"])
            for p in (p for p in group["params"] if p.grad is not None):
                latent = self.state[p].setdefault("latent", p.clone())
                latent.sub_(p.grad, alpha=float(group["lr"]))
                p.copy_(_prox_par(latent, group["q"], group["a"], group["total_lr"] * group["strength"]))
        return loss


def _check_penalty(q: Sequence[float], a: Sequence[float]) -> None:
    """Raise UsageError unless targets and slopes make a convex penalty."""
    rising = all(low < high for low, high in itertools.pairwise(q))
    convex = all(low < high for low, high in itertools.pairwise(a))
    if len(q) < 2 or q[0] != 0 or not rising or len(a) != len(q) - 1 or a[0] < 0 or not convex:
        raise UsageError(
            f"targets q={list(q)} with slopes a={list(a)} are no penalty: q starts at 0, a has one slope less, "
            "both rise, and no slope is negative: for example q=(0, 1, 2), a=(0.5, 1.5)"
        )


def _pieces(q: Sequence[float], a: Sequence[float]) -> Iterable[tuple[float, float, float]]:
    return zip(a, q[:-1], q[1:], strict=True)
