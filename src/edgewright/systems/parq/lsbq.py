"""Where the target values come from: least-squares binary quantisation (LSBQ) and evenly spaced grids.

Both fit the targets of each row of a matrix to its weights. Source: PARQ (arXiv 2503.15748, appendix) and
Pouransari et al., "Least squares binary quantization of neural networks" (arXiv 2001.02786).

Shapes: weights [R, C]; result of `fit` [R, 1] scales where the levels are `even`, else [R, 2^bits] ascending levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from edgewright.checks import check_fields, number, one_of, whole
from edgewright.errors import Unsupported, UsageError
from edgewright.quantization.config import SCALE_DTYPES, WeightConfig
from edgewright.quantization.grids import GRIDS, grid_named
from edgewright.quantization.scales import SCALE_RULES, SMALLEST_ALPHA, initial_alpha, snap
from edgewright.quantization.shards import GRANULARITY, Granularity
from edgewright.systems.parq.proximal import EvenLevels

# Adds up ("sum") or compares ("max") a tensor over the shards of a row that lies on several devices.
Reduce = Callable[[Tensor, str], Tensor]

# The paper's even levels that no packed grid has (halves of a scale at 3 and 4 bits), and the symmetric part of the LSQ
# grids.
EXTRA_LEVELS = {
    "half3": EvenLevels(-3.5, 1.0, 8),
    "half4": EvenLevels(-7.5, 1.0, 16),
    "symmetric3": EvenLevels(-3.0, 1.0, 7, "int3"),
    "symmetric4": EvenLevels(-7.0, 1.0, 15, "int4"),
    "symmetric8": EvenLevels(-127.0, 1.0, 255, "int8"),
}
PARQ_RULES = ("mean", "max", "range")
COMMON = {"granularity": GRANULARITY, "scale_dtype": one_of(*SCALE_DTYPES)}


class TargetConfig(Protocol):
    """How target values are chosen: frozen data in a parameter group under the key "targets"."""

    @property
    def granularity(self) -> Granularity: ...

    @property
    def even(self) -> EvenLevels | None: ...

    def fit(self, weights: Tensor, reduce: Reduce | None = None) -> Tensor: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LSBQ:
    """Levels +-v1 +-v2 ... of least squared error (PARQ, arXiv 2503.15748, appendix); bits 0 is ternary.

    Args:
        bits: 0 to 8.
        optimal: the exact solution (2 bits and ternary; at 1 bit greedy is exact). Otherwise greedy, each v the mean of
            what the ones before leave over, and for ternary `ternary_factor` times the mean magnitude.
        granularity: one set per "row", per "tensor", or per block of that many consecutive weights of a row.
        ternary_factor: above 0; the paper's is 1.1.
        scale_dtype: the single scale of binary and ternary sets is rounded to it ("bfloat16", "float16" or "float32"),
            so that trained and packed weights are equal; wider sets stay as they are.
        official_ternary_level: the official per-tensor ternary returns half the level; for comparisons with it only.

    Raises:
        UsageError: a setting out of its range, or optimal above 2 bits.
    """

    bits: int = 1
    optimal: bool = False
    granularity: Granularity = "row"
    ternary_factor: float = 1.1
    scale_dtype: str = "bfloat16"
    official_ternary_level: bool = False

    def __post_init__(self) -> None:
        check_fields(self, {"bits": whole(0, 8), "ternary_factor": number(above=0), **COMMON})
        if self.optimal and self.bits > 2:
            raise UsageError(f"LSBQ optimal=True is known for ternary, 1 and 2 bits only, not {self.bits}")

    @property
    def even(self) -> EvenLevels | None:
        """Binary and ternary sets are evenly spaced, wider ones are not."""
        names = {0: "ternary", 1: "binary"}
        return EvenLevels.of_grid(GRIDS[names[self.bits]]) if self.bits in names else None

    def fit(self, weights: Tensor, reduce: Reduce | None = None) -> Tensor:
        """Fit the targets of each row.

        Args:
            weights: float [R, C].
            reduce: (tensor, "sum" or "max") -> the same over the devices that a row is spread over; None: none.

        Returns:
            Scales [R, 1] of binary and ternary sets, else levels [R, 2^bits], ascending.

        Raises:
            Unsupported: optimal targets of a row that is spread.
        """
        if self.optimal and self.bits != 1:
            if reduce is not None:
                raise Unsupported(
                    "optimal LSBQ sorts the whole tensor, which is sharded here; use granularity='row' or optimal=False"
                )
            if self.bits == 2:
                return signed_sums(optimal_pair(weights))
            official = self.official_ternary_level and self.granularity == "tensor"
            return _snapped((_official_ternary if official else optimal_ternary)(weights), self.scale_dtype)
        if self.bits == 0:
            return _snapped(mean_magnitude(weights, reduce).mul_(self.ternary_factor), self.scale_dtype)
        magnitudes = greedy(weights, self.bits, reduce)
        return _snapped(magnitudes, self.scale_dtype) if self.bits == 1 else signed_sums(magnitudes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, with the kind of targets."""
        return {"kind": "lsbq", **asdict(self)}


@dataclass(frozen=True)
class Uniform:
    """Evenly spaced targets (PARQ, arXiv 2503.15748, appendix), fitted anew at every update.

    Args:
        grid: a grid of the package, or half3, half4, symmetric3, symmetric4, symmetric8.
        scale: "mean" (outermost level at min(bits * mean|w|, max|w|)), "max" (at max|w|; ternary: scale max|w| / 1.5)
            or "range" (scale (max w - min w) / (levels - 1)), the paper's rules; or a rule of the package: "absmax",
            "absmean", "entropy", "mse" (searched).
        granularity: one scale per "row", per "tensor", or per block of that many consecutive weights of a row.
        scale_dtype: scales are rounded to it: "bfloat16", "float16" or "float32".

    Raises:
        UsageError: an unknown name, or a rule that the grid does not have.
    """

    grid: str = "seq2"
    scale: str = "mean"
    granularity: Granularity = "row"
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        rules = PARQ_RULES if self.grid in EXTRA_LEVELS else (*PARQ_RULES, *SCALE_RULES)
        check_fields(self, {"grid": one_of(*GRIDS, *EXTRA_LEVELS), "scale": one_of(*rules), **COMMON})
        if self.grid == "ternary" and self.scale == "mean":
            raise UsageError("scale='mean' is not defined for ternary; use 'max', 'absmean' or 'mse', or LSBQ(bits=0)")

    @classmethod
    def of(cls, config: WeightConfig) -> Uniform:
        """The same grid, granularity and scale rule as for fake-quantised layers.

        deviation: a scale that would be trained there is searched again ("mse") at every update of the targets here,
        since the weights take no gradient with respect to a scale.

        Args:
            config: of a weight matrix.

        Raises:
            UsageError: center=True, which moves codes off the weights.
        """
        if config.center:
            raise UsageError("WeightConfig(center=True) moves the codes off the weights; PARQ has no such targets")
        scale = "mse" if config.scale == "learned" else config.scale
        return cls(config.grid, scale, config.granularity, config.scale_dtype)

    @property
    def even(self) -> EvenLevels:
        if self.grid in EXTRA_LEVELS:
            return EXTRA_LEVELS[self.grid]
        grid = grid_named(self.grid)
        return EvenLevels.of_grid(grid, mirrored=self.scale == "mse" and grid.kind == "integer")

    def fit(self, weights: Tensor, reduce: Reduce | None = None) -> Tensor:
        """Fit the scale of each row.

        Args:
            weights: float [R, C].
            reduce: (tensor, "sum" or "max") -> the same over the devices that a row is spread over; None: none.

        Returns:
            Scales [R, 1].

        Raises:
            Unsupported: a rule of the package for a row that is spread.
        """
        if self.scale in SCALE_RULES:
            if reduce is not None:
                raise Unsupported(f"scale={self.scale!r} needs the whole tensor, which is sharded; use 'mean' or 'max'")
            grid = grid_named(self.grid)
            dtype = SCALE_DTYPES[self.scale_dtype]
            alpha = initial_alpha(weights.float().unsqueeze(1), grid, self.scale, dtype)  # [R, 1]
            return snap(alpha / grid.scales_per_alpha, dtype).to(weights.dtype)
        even = self.even
        if self.scale == "range":
            high = _extreme(weights, reduce)
            low = -_extreme(-weights, reduce)
            return _snapped((high - low) / (even.count - 1) / even.spacing, self.scale_dtype)
        reach = torch.maximum(_extreme(weights, reduce), _extreme(-weights, reduce))
        if self.scale == "mean":
            bits = float(self.grid[-1]) if self.grid in EXTRA_LEVELS else GRIDS[self.grid].bits
            reach = torch.minimum(bits * mean_magnitude(weights, reduce), reach)
        outermost = 1.5 if self.grid == "ternary" else even.last
        return _snapped(reach / outermost, self.scale_dtype)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, with the kind of targets."""
        return {"kind": "uniform", **asdict(self)}


def greedy(weights: Tensor, bits: int, reduce: Reduce | None = None) -> Tensor:
    """V [R, bits]: v_j is the mean magnitude of what v_1 .. v_(j-1) leave over, sign(0) counting as +1."""
    residual, magnitudes = weights, list[Tensor]()
    for j in range(bits):
        if j:
            last = magnitudes[-1]
            residual = residual - torch.copysign(last, residual + 0.0)  # adding 0 turns -0 into +0
        magnitudes.append(mean_magnitude(residual, reduce))
    return torch.cat(magnitudes, 1)


def optimal_pair(weights: Tensor) -> Tensor:
    """(v1, v2) [R, 2] of least squared error for the levels +-v1 +-v2.

    |w| falls into two clusters with means A >= B, v1 = (A + B) / 2, v2 = (A - B) / 2. Every split of the sorted
    magnitudes is tried; the best one satisfies the paper's condition |w|_(i) <= v1 < |w|_(i+1) by itself.
    """
    ordered, smaller, larger = _splits(weights)
    if not smaller.shape[1]:  # a single weight a row
        return torch.cat([ordered, torch.zeros_like(ordered)], 1)
    count = torch.arange(1, ordered.shape[1], device=weights.device)
    below, above = smaller / count, larger / (ordered.shape[1] - count)
    best = (below * smaller + above * larger).argmax(1, keepdim=True)  # squared error = constant - this
    low, high = below.gather(1, best), above.gather(1, best)
    return torch.cat([(high + low) / 2, (high - low) / 2], 1).to(weights.dtype)


def optimal_ternary(weights: Tensor) -> Tensor:
    """A [R, 1] of least squared error for the levels -A, 0, A with thresholds +-A/2; A is the mean of what is kept."""
    ordered, _, larger = _splits(weights)
    larger = torch.cat([ordered.double().sum(1, keepdim=True), larger], 1)  # nothing set to zero comes first
    count = ordered.shape[1] - torch.arange(ordered.shape[1], device=weights.device)
    best = (larger * larger / count).argmax(1, keepdim=True)
    return (larger / count).gather(1, best).to(weights.dtype)


def signed_sums(magnitudes: Tensor) -> Tensor:
    """All values +-v1 +-v2 ... of v [R, n], ascending: [R, 2^n]."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=magnitudes.shape[1])), dtype=magnitudes.dtype)
    return (magnitudes.unsqueeze(1) * signs.to(magnitudes.device)).sum(-1).sort(1).values


def mean_magnitude(weights: Tensor, reduce: Reduce | None = None) -> Tensor:
    """mean|w| of each row, [R, 1]."""
    if reduce is None:
        return weights.abs().mean(1, keepdim=True)
    total = reduce(weights.abs().sum(1, keepdim=True), "sum")
    return total / reduce(torch.full_like(total, weights.shape[1]), "sum")


def _extreme(weights: Tensor, reduce: Reduce | None) -> Tensor:
    """Max w of each row, [R, 1]."""
    if reduce is None:
        return weights.amax(1, keepdim=True)
    floor = weights.new_full((weights.shape[0], 1), -torch.inf)  # a shard may be empty
    return reduce(torch.cat([weights, floor], 1).amax(1, keepdim=True), "max")


def _splits(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted magnitudes [R, C], and for each split into i smaller and C - i larger ones their sums [R, C - 1]."""
    ordered = weights.abs().sort(1).values
    running = ordered.double().cumsum(1)
    return ordered, running[:, :-1], running[:, -1:] - running[:, :-1]


def _official_ternary(weights: Tensor) -> Tensor:
    """The official per-tensor level v [R, 1]: half of A for the feasible A, v of least error with thresholds +-v/2."""
    ordered, _, larger = _splits(weights)
    columns = ordered.shape[1]
    total = ordered.double().sum(1, keepdim=True)
    half = torch.cat([total, larger], 1) / (columns - torch.arange(columns, device=weights.device)) / 2
    low = torch.cat([torch.zeros_like(total), ordered[:, :-1].double()], 1)
    feasible = (low <= half) & (half < ordered)
    place = torch.searchsorted(ordered.double(), half / 2, right=True)
    running = torch.cat([torch.zeros_like(total), ordered.double().cumsum(1)], 1)
    error = half * half * (columns - place) - 2 * half * (total - running.gather(1, place))
    best = torch.where(feasible, error, torch.inf).argmin(1, keepdim=True)
    return half.gather(1, best).to(weights.dtype)


def _snapped(scale: Tensor, scale_dtype: str) -> Tensor:
    dtype = SCALE_DTYPES[scale_dtype]
    scale = scale.clamp_min(SMALLEST_ALPHA)  # a row of zeros keeps a valid scale
    return scale if dtype is None else scale.to(dtype).to(scale.dtype)
