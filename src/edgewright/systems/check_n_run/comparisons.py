"""How far few-bit rows are from the rows they stand for, by method: what the choice of the adaptive range rests on."""

from __future__ import annotations

import torch
from torch import Tensor

from edgewright.io.row_ranges import quantize_rows
from edgewright.systems.check_n_run.records import RANGE

METHODS = ("symmetric", "minmax", "adaptive", "k-means")


def row_error(rows: Tensor, bits: int, method: str) -> float:
    """|W - W_hat| / |W| (Frobenius) of rows W [n, d] stored at `bits` bits by one of METHODS."""
    if method == "k-means":
        restored = kmeans_rows(rows, bits)
    else:
        nbins, ratio = RANGE
        name = "greedy" if method == "adaptive" else method
        restored = quantize_rows(rows, bits, name, nbins, ratio).dequantize()
    return float((restored - rows).norm() / rows.norm())


def kmeans_rows(rows: Tensor, bits: int, iterations: int = 15) -> Tensor:
    """Every row [n, d] with 2^bits levels of its own (Lloyd from equal steps): the paper's bound, too slow to use.

    No layout stores it here: its levels alone would take 2^bits floats a row.
    """
    low, high = rows.aminmax(dim=1, keepdim=True)
    levels = low + (high - low) * torch.linspace(0, 1, 2**bits)  # [n, k]
    for _ in range(iterations):
        nearest = (rows.unsqueeze(2) - levels.unsqueeze(1)).abs().argmin(2)  # [n, d]
        count = torch.zeros_like(levels).scatter_add_(1, nearest, torch.ones_like(rows))
        total = torch.zeros_like(levels).scatter_add_(1, nearest, rows)
        levels = torch.where(count > 0, total / count.clamp_min(1), levels)
    nearest = (rows.unsqueeze(2) - levels.unsqueeze(1)).abs().argmin(2)
    return levels.gather(1, nearest)
