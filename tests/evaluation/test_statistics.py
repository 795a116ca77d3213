"""Means and errors against numpy and the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgewright.evaluation.statistics import ClusterMean, ExactQuantiles, paired_difference, ratio_of_sums


def clustered(seed: int, clusters: int = 200) -> list[np.ndarray]:
    """Clusters of unequal size whose items share a common shift: what tokens of one text do."""
    rng = np.random.default_rng(seed)
    return [rng.normal(3.0 + rng.normal(), 0.5, rng.integers(5, 40)) for _ in range(clusters)]


def mean_of(parts: list[np.ndarray]) -> ClusterMean:
    mean = ClusterMean()
    for part in parts:
        mean.add(part)
    return mean


def bootstrap_se(totals: np.ndarray, counts: np.ndarray, draws: int = 4000) -> float:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(totals), (draws, len(totals)))
    return float((totals[chosen].sum(1) / counts[chosen].sum(1)).std(ddof=1))


def test_mean_is_the_mean_of_all_items() -> None:
    parts = clustered(0)
    estimate = mean_of(parts).estimate()
    # rtol: numpy's pairwise float64 sum against exact summation
    np.testing.assert_allclose(estimate.value, np.concatenate(parts).mean(), rtol=1e-14)
    assert (estimate.n, estimate.clusters) == (sum(map(len, parts)), len(parts))


@pytest.mark.parametrize("seed", range(5))
def test_se_agrees_with_the_cluster_bootstrap(seed: int) -> None:
    parts = clustered(seed)
    estimate = mean_of(parts).estimate()
    expected = bootstrap_se(np.array([p.sum() for p in parts]), np.array([p.size for p in parts]))
    assert estimate.se == pytest.approx(expected, rel=0.10)  # 4000 draws leave ~1 %; linearisation the rest
    naive = np.concatenate(parts).std(ddof=1) / math.sqrt(estimate.n)
    assert estimate.se > 2 * naive  # items counted as independent would claim far too much


def test_se_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = sum(abs(e.value - 3.0) < 1.96 * e.se for e in (mean_of(clustered(s, 60)).estimate() for s in range(300)))
    assert 0.91 < hits / 300 < 0.99  # 95 % +- 3 binomial errors


def test_clusters_of_one_item_give_the_textbook_error() -> None:
    values = np.random.default_rng(1).normal(size=500)
    estimate = ratio_of_sums(list(values), [1] * 500)
    assert estimate.se == pytest.approx(values.std(ddof=1) / math.sqrt(500), rel=1e-12)


def test_order_of_clusters_does_not_change_a_bit() -> None:
    parts = clustered(2)
    forward = mean_of(parts).estimate()
    order = np.random.default_rng(3).permutation(len(parts))
    assert mean_of([parts[i] for i in order]).estimate() == forward


def test_paired_difference_cancels_what_both_share() -> None:
    rng = np.random.default_rng(4)
    first = clustered(5)
    second = [part + rng.normal(0.1, 0.2, part.size) for part in first]
    estimate = paired_difference(mean_of(second), mean_of(first))
    differences = [b - a for a, b in zip(first, second, strict=True)]
    assert estimate.value == pytest.approx(np.concatenate(differences).mean(), rel=1e-10)  # cancels ~4 digits
    expected = bootstrap_se(np.array([d.sum() for d in differences]), np.array([d.size for d in differences]))
    assert estimate.se == pytest.approx(expected, rel=0.10)
    assert estimate.se < mean_of(first).estimate().se / 5


def test_paired_difference_with_itself_is_zero() -> None:
    mean = mean_of(clustered(6))
    assert paired_difference(mean, mean).value == paired_difference(mean, mean).se == 0.0


def test_paired_difference_refuses_other_clusters() -> None:
    with pytest.raises(ValueError, match="same clusters"):
        paired_difference(mean_of(clustered(7)), mean_of(clustered(8)))


def test_edges() -> None:
    assert math.isnan(ratio_of_sums([2.0], [4]).se)
    assert ratio_of_sums([2.0], [4]).value == 0.5
    infinite = ratio_of_sums([1.0, math.inf], [1, 1])
    assert infinite.value == math.inf and math.isnan(infinite.se)
    for totals, counts in (([], []), ([1.0], []), ([1.0], [-1])):
        with pytest.raises(ValueError):
            ratio_of_sums(totals, counts)


def test_quantiles_are_order_statistics_of_everything_added() -> None:
    rng = np.random.default_rng(9)
    parts = [rng.exponential(size=rng.integers(1, 50)).astype(np.float32) for _ in range(40)]
    store = ExactQuantiles()
    for part in parts:
        store.add(part)
    ordered = np.sort(np.concatenate(parts))
    found = store.quantile([0.5, 0.9, 0.99, 1.0])
    for p, value in found.items():
        assert value == ordered[math.ceil(p * len(ordered)) - 1]
    store.add([1e9])  # adding goes on after a question
    assert store.quantile([1.0])[1.0] == 1e9 and store.values().dtype == np.float32


def test_an_infinite_value_stays_in_its_own_quantile() -> None:
    store = ExactQuantiles()
    store.add([0.0, 1.0, 2.0, math.inf])
    assert store.quantile([0.5, 0.75, 1.0]) == {0.5: 1.0, 0.75: 2.0, 1.0: math.inf}
    with pytest.raises(ValueError, match="nothing"):
        ExactQuantiles().quantile([0.5])
