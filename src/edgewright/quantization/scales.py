"""Rules that choose the clip scale alpha of each group of weights without training.

All functions take weights grouped as [rows, groups, group size] in float32 and return alpha [rows, groups].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.quantization.grids import Grid

# Smallest clip scale: keeps an all-zero row valid (ParetoQ clamps there too).
SMALLEST_ALPHA = 1e-5
DYNAMIC_RULES = ("absmax", "full_range", "absmean", "entropy")  # cheap enough to be recomputed at each forward
SCALE_RULES = (*DYNAMIC_RULES, "mse")

# Clip ranges tried by the search, as fractions of the range that clips nothing: coarse grids gain from clipping more.
CLIP_FRACTIONS: dict[str, tuple[float, ...]] = {
    "binary": (1.0,),
    "ternary": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "seq2": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "int2": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "int3": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "int4": (0.5, 0.6, 0.68, 0.76, 0.83, 0.89, 0.95, 1.0),
    "int8": (0.8, 0.9, 0.95, 1.0),
}
ELEMENTS_AT_ONCE = 1 << 17  # the search works on slices that stay in cache


def grouped(weight: Tensor, groups: int) -> Tensor:
    """View a matrix by groups of columns.

    Args:
        weight: [rows, columns].
        groups: that divide a row.

    Returns:
        [rows, groups, columns / groups]
    """
    return weight.reshape(weight.shape[0], groups, -1)


def clamp_alpha(alpha: Tensor) -> Tensor:
    """Keep |alpha| >= 1e-5.

    deviation: ParetoQ clamps to positive values; a negative alpha mirrors an uneven grid such as -8..7 and is kept.
    """
    return torch.where(alpha < 0, alpha.clamp(max=-SMALLEST_ALPHA), alpha.clamp(min=SMALLEST_ALPHA))


def snap(scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round scales to the type in which they are stored, nearest even.

    Args:
        scale: any shape.
        dtype: None leaves them as they are.

    Returns:
        float32, shaped as `scale`.
    """
    return scale if dtype is None else scale.to(dtype).to(torch.float32)


def absmax_alpha(weights: Tensor, grid: Grid) -> Tensor:
    """Smallest range that clips nothing: max|w|, for LSQ grids over the largest positive code (the paper's start)."""
    peak = weights.abs().amax(-1)
    return clamp_alpha(peak / grid.high if grid.kind == "integer" else peak)


def full_range_alpha(weights: Tensor, grid: Grid) -> Tensor:
    """Full-range symmetric: max|w| over half the number of intervals, 7.5 at 4 bits (torchao's rule).

    A largest weight of 7.5 scales is clipped to 7 when positive and reaches -8 when negative.
    """
    if grid.kind != "integer":
        raise UsageError(f"scale='full_range' is for integer grids such as int4, not {grid.name}; use absmax")
    return clamp_alpha(weights.abs().amax(-1) / ((grid.high - grid.low) / 2))


def absmean_alpha(weights: Tensor, grid: Grid) -> Tensor:
    """From the mean magnitude m: binary m, ternary scale m (BitNet), SEQ 2m (LLM-QAT), integers 2m/sqrt(Qp) (LSQ)."""
    mean = weights.abs().mean(-1)
    factor = {"binary": 1.0, "ternary": 1.5, "seq2": 2.0}.get(grid.name, 2.0 / math.sqrt(grid.high))
    return clamp_alpha(mean * factor)


def entropy_alpha(weights: Tensor, grid: Grid) -> Tensor:
    """Equally probable levels for a row uniform around zero, each at the mean of its weights (TBT, arXiv 2306.01841).

    With m = mean|w|: binary scale m, ternary scale 4m/3, so that its thresholds lie at 2m/3.
    """
    if grid.name not in ("binary", "ternary"):
        raise UsageError(f"scale='entropy' is for the grids binary and ternary, not {grid.name}; use absmean or mse")
    scale = weights.abs().mean(-1) * (1.0 if grid.name == "binary" else 4.0 / 3.0)
    return clamp_alpha(scale * grid.scales_per_alpha)


def mse_alpha(
    weights: Tensor, grid: Grid, importance: Tensor | None = None, scale_dtype: torch.dtype | None = torch.bfloat16
) -> Tensor:
    """The alpha of least squared error, by trying clip ranges and refitting the scale to each one's codes.

    For fixed codes c (offset included) the best scale is <w, c> / <c, c>, its error |w|^2 - <w, c>^2 / <c, c>. Uneven
    grids also try the mirrored range (negative alpha).

    Args:
        weights: float32 [rows, groups, group size].
        grid: of the codes.
        importance: weight of each column's error, broadcastable to `weights` (for example mean squared inputs); None:
            all equal.
        scale_dtype: that scales are rounded to; None: float32.

    Returns:
        [rows, groups]
    """
    if grid.kind == "binary" and importance is None:  # closed form: the mean magnitude
        return absmean_alpha(weights, grid)
    rows = max(1, ELEMENTS_AT_ONCE // (weights.shape[1] * weights.shape[2]))
    parts = []
    for start in range(0, weights.shape[0], rows):
        part = weights[start : start + rows]
        share = None if importance is None else importance.expand_as(weights)[start : start + rows]
        parts.append(_search(part, grid, share))
    alpha = clamp_alpha(torch.cat(parts))
    return snap(alpha / grid.scales_per_alpha, scale_dtype) * grid.scales_per_alpha if scale_dtype else alpha


def _search(weights: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    outermost = grid.high + grid.offset
    peak = weights.abs().amax(-1).clamp_min(SMALLEST_ALPHA) / outermost  # scale at which nothing is clipped
    signs = (1.0, -1.0) if -grid.low != grid.high and grid.offset == 0 else (1.0,)
    best_gain = torch.zeros_like(peak)
    best_scale = peak.clone()
    weighted = weights if importance is None else weights * importance
    codes, product = torch.empty_like(weights), torch.empty_like(weights)
    for fraction in CLIP_FRACTIONS[grid.name]:
        for sign in signs:
            torch.div(weights, (peak * (fraction * sign)).unsqueeze(-1), out=codes)
            grid.encode_(codes)
            if grid.offset:
                codes.add_(grid.offset)
            fit = torch.mul(codes, weighted, out=product).sum(-1)  # <w, c>
            torch.mul(codes, codes, out=product)
            energy = (product if importance is None else product.mul_(importance)).sum(-1)  # <c, c>
            scale = fit / energy.clamp_min(torch.finfo(torch.float32).tiny)
            gain = scale * fit
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best_scale = torch.where(better, scale, best_scale)
    return best_scale * grid.scales_per_alpha


def initial_alpha(weights: Tensor, grid: Grid, rule: str, scale_dtype: torch.dtype | None) -> Tensor:
    """Alpha by one of SCALE_RULES or by "paper": ParetoQ's start (binary: absmean, others: absmax).

    Args:
        weights: float32 [rows, groups, group size].
        grid: that they go to.
        rule: its name.
        scale_dtype: that searched scales are rounded to; None: float32.

    Returns:
        [rows, groups]

    Raises:
        UsageError: a rule that the grid does not have.
    """
    if rule == "paper":
        rule = "absmean" if grid.kind == "binary" else "absmax"
    if rule == "mse":
        return mse_alpha(weights, grid, scale_dtype=scale_dtype)
    rules = {"absmax": absmax_alpha, "full_range": full_range_alpha, "absmean": absmean_alpha, "entropy": entropy_alpha}
    return rules[rule](weights, grid)
