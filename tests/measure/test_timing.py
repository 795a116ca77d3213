"""Turns are taken in order, summaries are the textbook ones."""

from __future__ import annotations

import numpy as np
import pytest

from edgewright.errors import UsageError
from edgewright.measure.timing import Measurement, alternate, paired_ratio


def test_cases_take_turns_and_warm_up_does_not_count():
    order: list[str] = []
    now = [0.0]

    def case(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            now[0] += seconds * len(order)

        return run

    got = alternate({"a": case("a", 1), "b": case("b", 2)}, repeats=3, warmup=2, clock=lambda: now[0])
    assert order == ["a", "b"] * 5
    assert got["a"].samples == (5, 7, 9) and got["b"].samples == (12, 16, 20)
    assert (got["a"].n, got["a"].unit, got["a"].median) == (3, "s", 7)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_quartiles_are_numpys(count):
    samples = np.random.default_rng(count).normal(size=count)
    got = Measurement.of(samples)
    # 1e-15: the same interpolation in another order of operations
    np.testing.assert_allclose([got.low, got.median, got.high], np.percentile(samples, [25, 50, 75]), rtol=1e-14)
    assert got.spread == (got.high - got.low) / 2


def test_paired_ratio_sees_through_drift():
    drift = [1.0, 2.0, 4.0, 8.0]
    ratio = paired_ratio(Measurement.of([3 * d for d in drift]), Measurement.of([2 * d for d in drift]))
    assert (ratio.low, ratio.median, ratio.high) == (1.5, 1.5, 1.5)
    with pytest.raises(UsageError, match="got 1 and 2"):
        paired_ratio(Measurement.of([1]), Measurement.of([1, 2]))


def test_nothing_to_measure_is_refused():
    for cases, repeats in (({}, 1), ({"a": print}, 0)):
        with pytest.raises(UsageError, match="alternate needs"):
            alternate(cases, repeats)
    with pytest.raises(UsageError):
        Measurement.of([])
