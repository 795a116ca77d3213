"""Which range of a row to quantise: all of it, symmetric around zero, or the one that a greedy search finds.

At 4 bits and below a row's extremes cost more than they are worth. The greedy search (Guan et al., arXiv 1911.02079,
algorithm 1, there with the kept share named; used for checkpoints as "adaptive asymmetric" by arXiv 2010.08679) cuts
one step off whichever end leaves the smaller squared error, and remembers the best range seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.io.row_codes import PackedRows, pack_rows, stored_range

METHODS = ("minmax", "greedy", "symmetric")
TUNING_BINS, TUNING_RATIOS = (10, 25, 50), (0.3, 0.6, 1.0)
_CHUNK = 1 << 16  # weights whose errors are in the processor's cache at once


def quantize_rows(
    weight: Tensor, bits: int = 4, method: str = "greedy", nbins: int = 200, ratio: float = 0.16
) -> PackedRows:
    """The rows of a table W [n, d] at 2, 3, 4 or 8 bits (see `row_codes` for the bytes).

    method: "minmax"; "greedy", with `nbins` steps a range of which at most the share `ratio` is cut (torch's operators
    call both so; their defaults help little at 2 bits, where 25 and 0.6 do); "symmetric", between -max and max.
    Raises UsageError for other bits or methods and for the first row that holds NaN or infinity.
    """
    if method not in METHODS:
        raise UsageError(f"method={method!r}; use one of {', '.join(METHODS)}")
    if method == "minmax" or not weight.numel():
        return pack_rows(weight, bits)
    if method == "symmetric":
        reach = weight.detach().float().abs().amax(1)
        return pack_rows(weight, bits, -reach, reach)
    low, high = greedy_range(weight, bits, nbins, ratio)
    return pack_rows(weight, bits, low, high)


@torch.no_grad()
def greedy_range(weight: Tensor, bits: int, nbins: int = 200, ratio: float = 0.16) -> tuple[Tensor, Tensor]:
    """(low, high), float32 [n] each, of the rows of W [n, d].

    step = (max - min) / nbins; while the range is longer than (1 - ratio) of the whole, drop one step on the side
    where that leaves the smaller error. A range counts as the best when both neighbours are worse than it and it is
    better than all before. Sums run column after column in float32, as in torch's operator, so that ties fall alike.
    """
    if nbins < 1 or not 0 <= ratio <= 1:
        raise UsageError(f"nbins={nbins}, ratio={ratio}: the range has at least one step and the share is from 0 to 1")
    found = [
        _search(part, bits, nbins, ratio) for part in weight.detach().split(max(_CHUNK // max(weight.shape[1], 1), 1))
    ]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def _search(rows: Tensor, bits: int, nbins: int, ratio: float) -> tuple[Tensor, Tensor]:
    columns = rows.float().t().contiguous()  # [d, n]: a step of the sum is one row of memory
    best_low, best_high = (end.clone() for end in columns.aminmax(dim=0))
    low, high = best_low.clone(), best_high.clone()
    step = (high - low) / nbins
    kept = int(nbins * (1.0 - ratio)) * step
    loss = _error(columns, low, high, bits)
    best = loss.clone()
    going = low + kept < high
    while bool(going.any()):
        right, left = low + step, high - step
        loss_low, loss_high = _error(columns, right, high, bits), _error(columns, low, left, bits)
        better = going & (loss < loss_low) & (loss < loss_high) & (loss < best)
        best = torch.where(better, loss, best)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
        cut_low = loss_low < loss_high
        loss = torch.where(going, torch.where(cut_low, loss_low, loss_high), loss)
        low = torch.where(going & cut_low, right, low)
        high = torch.where(going & ~cut_low, left, high)
        going = going & (low + kept < high)
    return best_low, best_high


def _error(columns: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Euclidean distance of every row, given as columns [d, n], from what is stored of it: [n]."""
    scale, bias, inverse = stored_range(low, high, bits)
    squares = (
        columns.sub(bias).mul_(inverse).round_().clamp_(0, 2**bits - 1).mul_(scale).add_(bias).sub_(columns).square_()
    )
    total = torch.zeros_like(low)
    for column in squares:
        total += column
    return total.sqrt_()


def tune_range(
    weight: Tensor, bits: int, generator: torch.Generator, share: float = 1e-5, least: int = 256, within: float = 0.02
) -> tuple[int, float]:
    """(nbins, ratio) for `greedy_range`: the cheapest of the grid whose error is within 2 % of the grid's best.

    Measured on a random sample of max(share of the rows, `least`) rows (arXiv 2010.08679 samples 0.001 %). Cheapest
    means fewest steps cut, nbins * ratio.
    """
    count = min(len(weight), max(int(len(weight) * share), least))
    sample = weight.detach()[torch.randperm(len(weight), generator=generator)[:count].to(weight.device)].float()
    errors = {
        (nbins, ratio): float((quantize_rows(sample, bits, "greedy", nbins, ratio).dequantize() - sample).norm())
        for nbins in TUNING_BINS
        for ratio in TUNING_RATIOS
    }
    limit = min(errors.values()) * (1 + within)
    good = [setting for setting, error in errors.items() if error <= limit]
    return min(good, key=lambda setting: (setting[0] * setting[1], setting))
