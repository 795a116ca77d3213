"""Means with honest standard errors: tokens of one text are correlated, so a block (or document) is the unit of chance.

Every quantity here is a ratio of sums, mean = sum_c S_c / sum_c n_c over clusters c. Its cluster-robust (linearised)
standard error is

    se^2 = C / (C - 1) * sum_c (S_c - mean * n_c)^2 / (sum_c n_c)^2

(Cochran, Sampling Techniques, 3rd ed., section 6.3, without the finite-population factor). Sums are exact
(`math.fsum`), so neither the order of the clusters nor the way they were batched changes a bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (nan with fewer than two clusters), how many items and in how many clusters."""

    value: float
    se: float
    n: int
    clusters: int


def ratio_of_sums(totals: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Mean and cluster-robust standard error from each cluster's total and item count.

    Raises ValueError when the lengths differ, a count is negative or nothing was counted.
    """
    if len(totals) != len(counts):
        raise ValueError(f"{len(totals)} totals but {len(counts)} counts: each cluster needs one of both")
    if any(count < 0 for count in counts):
        raise ValueError("a cluster cannot hold a negative number of items")
    n = sum(counts)
    if n == 0:
        raise ValueError("a mean of nothing: add at least one value first")
    clusters = len(totals)
    if not all(map(math.isfinite, totals)):
        return Estimate(float(np.sum(totals)) / n, math.nan, n, clusters)
    mean = math.fsum(totals) / n
    if clusters < 2:
        return Estimate(mean, math.nan, n, clusters)
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    return Estimate(mean, math.sqrt(clusters / (clusters - 1) * squares) / n, n, clusters)


class ClusterMean:
    """Streaming mean of values that arrive cluster by cluster; keeps two numbers per cluster."""

    def __init__(self) -> None:
        self.totals: list[float] = []
        self.counts: list[int] = []

    def add(self, values: Iterable[float]) -> None:
        """Add one whole cluster, such as the per-token values of one block. float64 inside."""
        values = np.asarray(values, dtype=np.float64).ravel()
        self.totals.append(float(values.sum()))
        self.counts.append(values.size)

    def estimate(self) -> Estimate:
        """The mean over all items so far, with its standard error over clusters."""
        return ratio_of_sums(self.totals, self.counts)


def paired_difference(first: ClusterMean, second: ClusterMean) -> Estimate:
    """mean(first) - mean(second) where both saw the same items in the same order.

    Differences are taken inside each cluster, so what makes a block hard for both cancels: the standard error is
    usually far below that of either mean. Raises ValueError when the clusters do not match.
    """
    if first.counts != second.counts:
        raise ValueError("a paired difference needs the same clusters with the same item counts on both sides")
    return ratio_of_sums([a - b for a, b in zip(first.totals, second.totals, strict=True)], first.counts)


class ExactQuantiles:
    """Streaming store of scalars, 4 bytes each, for exact quantiles at the end."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, values: Iterable[float]) -> None:
        self._parts.append(np.asarray(values, dtype=np.float32).ravel())

    def values(self) -> np.ndarray:
        """All values so far, float32 [n], in the order they came."""
        if len(self._parts) != 1:
            self._parts = [np.concatenate([np.empty(0, np.float32), *self._parts])]
        return self._parts[0]

    def quantile(self, probabilities: Sequence[float]) -> dict[float, float]:
        """Probability -> the smallest value with at least that share of all values at or below it; 1.0 is the maximum.

        An order statistic rather than an interpolation: it is a value that occurred, and one infinite outlier cannot
        turn its neighbours into nan. Raises ValueError when nothing was added.
        """
        values = self.values()
        if not values.size:
            raise ValueError("a quantile of nothing: add at least one value first")
        found = np.quantile(values, list(probabilities), method="inverted_cdf")
        return {float(p): float(q) for p, q in zip(probabilities, found, strict=True)}
