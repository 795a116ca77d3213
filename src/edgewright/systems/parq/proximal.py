"""Proximal maps that pull weights towards a set of target values, softly at first and onto it in the end.

A map takes the latent weights of a matrix and the targets of each of its rows, and writes what the next forward pass
sees. Source: PARQ (arXiv 2503.15748, section 4) for the piecewise-affine map and its schedule; BinaryRelax
(arXiv 1801.06313); the hard map is the straight-through estimator.

Shapes: latent and result [R, C] in one floating dtype; targets [R, K] or one step a row [R, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.quantization.grids import Grid

# Elements that a map works on at once: its temporaries stay in cache, and memory does not grow with the matrix.
ELEMENTS_AT_ONCE = {"cpu": 1 << 17}
ELEMENTS_ON_DEVICE = 1 << 24
FEW_LEVELS = 32  # up to here comparing with each border in turn beats a binary search


@dataclass(frozen=True)
class Ladder:
    """Evenly spaced levels in units of a step: first, first + spacing, ... (count of them).

    grid: the packed grid that stores them, "" where there is none. shift + code is the level of an integer code.
    mirrored: steps may be negative, so that level k + 1 can lie below level k.
    """

    first: float
    spacing: float
    count: int
    grid: str = ""
    mirrored: bool = False

    @classmethod
    def of_grid(cls, grid: Grid, mirrored: bool = False) -> Ladder:
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
    """Target values of each row of a matrix: levels [R, K] ascending, or with a ladder one step a row [R, 1]."""

    values: Tensor
    ladder: Ladder | None = None

    def levels(self) -> Tensor:
        """[R, K] ascending, unless a step is negative."""
        return self.values if self.ladder is None else self.values * self.ladder.levels(self.values)

    def rows(self, start: int, stop: int) -> Targets:
        return self if self.values.shape[0] == 1 else Targets(self.values[start:stop], self.ladder)

    def neighbours(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high), broadcastable to `weights`: the two targets around each; the outermost two beyond the ends."""
        ladder = self.ladder
        if ladder is not None and ladder.count == 2:
            return self.values * ladder.first, self.values * ladder.last
        if ladder is not None:  # by arithmetic: spacing is 1 wherever there are more than two levels
            below = _floor_to(ladder, weights / self.values)
            above = (below + ladder.spacing).mul_(self.values)
            below.mul_(self.values)
            return (torch.minimum(below, above), torch.maximum(below, above)) if ladder.mirrored else (below, above)
        index = _count_below(weights, self.values[:, 1:-1])
        return self.values.gather(1, index), self.values.gather(1, index.add_(1))

    def nearest(self, weights: Tensor, out: Tensor) -> Tensor:
        """The target nearest to each weight; halfway between two, the lower (with a ladder: the even code)."""
        if self.ladder is None:
            middles = (self.values[:, :-1] + self.values[:, 1:]).mul_(0.5)
            return out.copy_(self.values.gather(1, _count_below(weights, middles)))
        torch.div(weights, self.values, out=out)
        if self.ladder.count == 2:  # sign(0) is +1, as on every binary grid of the package
            out.ge_(0).mul_(self.ladder.spacing).add_(self.ladder.first)
        else:
            shift = self.ladder.shift
            _add_(_add_(out, -shift).round_().clamp_(self.ladder.first - shift, self.ladder.last - shift), shift)
        return out.mul_(self.values)


class ProxMap(Protocol):
    """A proximal map with its schedule: frozen data. `step` counts optimizer steps from 0."""

    @property
    def anneal_end(self) -> int:
        """From this step on every weight is on a target."""

    def starts_by(self, step: int) -> bool:
        """Whether the map does anything at `step`."""

    def inverse_slope(self, step: int) -> float:
        """1: weights are left alone, 0: all are on targets."""

    def apply(self, latent: Tensor, targets: Targets, step: int, out: Tensor) -> Tensor:
        """Write the mapped `latent` [R, C] into `out`, which may be `latent` itself; returns `out`."""


@dataclass(frozen=True)
class ProxHard:
    """Always the nearest target: straight-through training (BinaryConnect) without a fake-quantised layer."""

    @property
    def anneal_end(self) -> int:
        return 0

    def starts_by(self, step: int) -> bool:
        return True

    def inverse_slope(self, step: int) -> float:
        return 0.0

    def apply(self, latent: Tensor, targets: Targets, step: int, out: Tensor) -> Tensor:
        for weights, part, place in _slices(latent, targets, out):
            part.nearest(weights, place)
        return out


@dataclass(frozen=True)
class ProxPARQ:
    """Affine between targets with slope 1 / r around each midpoint, flat on them; r falls from 1 to 0.

    Before anneal_start nothing happens, from anneal_end on the map is hard. schedule: "sigmoid" with that steepness and
    center (as a fraction of the annealing), or "cosine".
    deviation: another center than 0.5 is normalised with itself, so r runs from 1 to 0 for every center.
    """

    anneal_start: int
    anneal_end: int
    steepness: float = 10.0
    center: float = 0.5
    schedule: Literal["sigmoid", "cosine"] = "sigmoid"

    def __post_init__(self) -> None:
        _check_annealing(self)
        if not 0 < self.steepness <= 1000:
            raise UsageError(f"steepness={self.steepness}; it must be positive, at most 1000, for example 10")
        if not 0 < self.center < 1:
            raise UsageError(f"center={self.center}; it must lie between 0 and 1, for example 0.5")
        if self.schedule not in ("sigmoid", "cosine"):
            raise UsageError(f"schedule={self.schedule!r}; choose 'sigmoid' or 'cosine'")

    def starts_by(self, step: int) -> bool:
        return step >= self.anneal_start

    def inverse_slope(self, step: int) -> float:
        share = _share(self, step)
        if share in (0.0, 1.0):
            return 1.0 - share
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        falling, first, last = (_logistic(self.steepness * (self.center - f)) for f in (share, 0.0, 1.0))
        return (falling - last) / (first - last)

    def apply(self, latent: Tensor, targets: Targets, step: int, out: Tensor) -> Tensor:
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
class ProxBinaryRelax:
    """(1 - theta) weight + theta nearest target; theta grows linearly from 0 to 1 (arXiv 1801.06313)."""

    anneal_start: int
    anneal_end: int

    def __post_init__(self) -> None:
        _check_annealing(self)

    def starts_by(self, step: int) -> bool:
        return step >= self.anneal_start

    def inverse_slope(self, step: int) -> float:
        return 1.0 - _share(self, step)

    def apply(self, latent: Tensor, targets: Targets, step: int, out: Tensor) -> Tensor:
        theta = _share(self, step)
        if theta == 1.0:
            return ProxHard().apply(latent, targets, step, out)
        for weights, part, place in _slices(latent, targets, out):
            near = part.nearest(weights, torch.empty_like(weights))
            torch.mul(weights, 1 - theta, out=place).add_(near, alpha=theta)
        return out


@dataclass(frozen=True)
class ProxSoft:
    """A sigmoid between neighbouring targets whose temperature grows geometrically from 1 to 1000, then hard.

    deviation: the sigmoid is stretched to reach both neighbours, so that the map begins close to the identity; the bare
    one would move every weight to within an eighth of a midpoint in the first step.
    """

    anneal_start: int
    anneal_end: int
    coldest: float = 1.0
    hottest: float = 1000.0

    def __post_init__(self) -> None:
        _check_annealing(self)
        if not 0 < self.coldest <= self.hottest:
            raise UsageError(f"temperatures {self.coldest} to {self.hottest}: positive and growing, such as 1 to 1000")

    def starts_by(self, step: int) -> bool:
        return step >= self.anneal_start

    def temperature(self, step: int) -> float:
        return self.coldest * (self.hottest / self.coldest) ** _share(self, step)

    def inverse_slope(self, step: int) -> float:
        """Of the sigmoid at a midpoint."""
        if step < self.anneal_start or step >= self.anneal_end:
            return 1.0 - _share(self, step)
        heat = self.temperature(step)
        return 4.0 / heat * (2.0 * _logistic(heat / 2) - 1.0)

    def apply(self, latent: Tensor, targets: Targets, step: int, out: Tensor) -> Tensor:
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


def _floor_to(ladder: Ladder, units: Tensor) -> Tensor:
    """The level at or below each value, at most the last but one and at least the first; in place."""
    shift = ladder.shift
    _add_(units, -shift).floor_().clamp_(ladder.first - shift, ladder.last - ladder.spacing - shift)
    return _add_(units, shift)


def _add_(tensor: Tensor, number: float) -> Tensor:
    return tensor.add_(number) if number else tensor


def _share(prox: ProxPARQ | ProxBinaryRelax | ProxSoft, step: int) -> float:
    """How much of the annealing is over, 0..1."""
    return min(1.0, max(0.0, (step - prox.anneal_start) / (prox.anneal_end - prox.anneal_start)))


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _check_annealing(prox: ProxPARQ | ProxBinaryRelax | ProxSoft) -> None:
    if not 0 <= prox.anneal_start < prox.anneal_end:
        raise UsageError(
            f"anneal_start={prox.anneal_start}, anneal_end={prox.anneal_end}: annealing starts at step 0 or later and "
            f"ends after that, for example {type(prox).__name__}(anneal_start=50, anneal_end=400)"
        )
