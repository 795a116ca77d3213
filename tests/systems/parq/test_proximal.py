"""Proximal maps: the specification's vectors, a slow float64 reading of the formula, what must hold exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from edgewright.errors import UsageError
from edgewright.quantization.grids import GRIDS
from edgewright.systems.parq import proximal
from edgewright.systems.parq.proximal import EvenLevels, ProxBinaryRelax, ProxHard, ProxPARQ, ProxSoft, Targets

HALVES = torch.tensor([[-1.5, -0.5, 0.5, 1.5]])
POINTS = torch.tensor([[-2, -1.2, -1, -0.6, -0.1, 0, 0.2, 0.45, 0.9, 1.1, 1.6]])
ON_EVEN = Targets(torch.ones(1, 1), EvenLevels.of_grid(GRIDS["seq2"]))


class Fixed(ProxPARQ):
    """The map at a slope of its own."""

    def inverse_slope(self, step: int) -> float:
        return self.steepness / 1000


@pytest.mark.parametrize("targets", [Targets(HALVES), ON_EVEN], ids=["levels", "even"])
@pytest.mark.parametrize(
    ("slope", "expected"),
    [
        (0.5, [-1.5, -1.4, -1, -0.5, -0.2, 0, 0.4, 0.5, 0.8, 1.2, 1.5]),
        (0.1, [-1.5, -1.5, -1, -0.5, -0.5, 0, 0.5, 0.5, 0.5, 1.5, 1.5]),
    ],
)
def test_vectors_of_the_specification(targets, slope, expected):
    found = Fixed(0, 10, steepness=slope * 1000).apply(POINTS, targets, 5, torch.empty_like(POINTS))
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=0, atol=2e-7)  # inputs such as -1.2 are rounded


def test_schedule_vectors():
    # Expected values are printed to six digits.
    steps = [0, 10, 25, 50, 75, 90, 99]
    found = [ProxPARQ(0, 100).inverse_slope(step) for step in steps]
    assert found == pytest.approx([1, 0.988553, 0.929896, 0.5, 0.070104, 0.011447, 0.000708], abs=6e-7)
    steep = ProxPARQ(0, 100, steepness=20)
    assert [steep.inverse_slope(10), steep.inverse_slope(25)] == pytest.approx([0.99971, 0.993352], abs=6e-6)


@pytest.mark.parametrize("prox", [ProxPARQ(10, 50, s, c) for s in (0.5, 10, 75, 1000) for c in (0.3, 0.5, 0.7)])
def test_slope_falls_from_one_to_zero(prox):
    slopes = [prox.inverse_slope(step) for step in range(70)]
    assert all(a >= b for a, b in itertools.pairwise(slopes))
    assert slopes[:11] == [1.0] * 11 and slopes[50:] == [0.0] * 20


def test_cosine_schedule():
    prox = ProxPARQ(0, 4, schedule="cosine")
    expected = [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]
    assert [prox.inverse_slope(t) for t in range(5)] == pytest.approx(expected)


def slow_parq(weights: np.ndarray, levels: np.ndarray, slope: float) -> np.ndarray:
    """The definition, one weight at a time, in float64."""
    result = np.empty_like(weights)
    for place, p in np.ndenumerate(weights):
        row = levels[place[0]]
        i = int(np.searchsorted(row, p))  # first level that is >= p
        low, high = row[max(i - 1, 0)], row[min(i, len(row) - 1)]
        center = (low + high) / 2
        result[place] = min(max(center + (p - center) / slope, low), high)
    return result


@pytest.mark.parametrize("count", [2, 3, 4, 7, 40])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("slope", [1.0, 0.3, 0.01])
def test_levels_equal_the_slow_definition(count, rows, slope):
    generator = torch.Generator().manual_seed(count)
    levels = torch.randn(rows, count, generator=generator, dtype=torch.float64).sort(1).values
    weights = 2 * torch.randn(rows, 33, generator=generator, dtype=torch.float64)
    found = Fixed(0, 10, steepness=slope * 1000).apply(weights, Targets(levels), 5, torch.empty_like(weights))
    expected = torch.from_numpy(slow_parq(weights.numpy(), levels.numpy(), slope))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


LEVELS = [EvenLevels.of_grid(GRIDS[name]) for name in ("binary", "ternary", "seq2", "int3", "int4")]


@pytest.mark.parametrize("even", LEVELS, ids=lambda even: even.grid)
@pytest.mark.parametrize("prox", [ProxPARQ(0, 10), ProxBinaryRelax(0, 10), ProxSoft(0, 10), ProxHard()])
@pytest.mark.parametrize("step", [0, 3, 9, 10])
def test_arithmetic_equals_a_list_of_levels(even, prox, step, monkeypatch):
    monkeypatch.setitem(proximal.ELEMENTS_AT_ONCE, "cpu", 64)  # several slices
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 37, generator=generator)
    steps = torch.rand(6, 1, generator=generator).mul_(0.5).add_(0.1).bfloat16().float()
    on_even = Targets(steps, even)
    found = prox.apply(weights, on_even, step, torch.empty_like(weights))
    listed = prox.apply(weights, Targets(on_even.levels()), step, torch.empty_like(weights))
    torch.testing.assert_close(found, listed, rtol=0, atol=0)
    assert torch.equal(prox.apply(weights.clone(), on_even, step, weights), found)  # in place


def test_negative_steps_mirror_an_uneven_grid():
    even = EvenLevels.of_grid(GRIDS["int2"], mirrored=True)
    weights = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([[0.5], [-0.5], [-0.25]])
    found = ProxPARQ(0, 10).apply(weights, Targets(steps, even), 6, torch.empty_like(weights))
    listed = Targets((steps * even.levels(steps)).sort(1).values)
    torch.testing.assert_close(found, ProxPARQ(0, 10).apply(weights, listed, 6, torch.empty_like(weights)))


@pytest.mark.parametrize("prox", [ProxPARQ(0, 10), ProxBinaryRelax(0, 10), ProxSoft(0, 10)])
def test_one_at_the_start_and_the_grid_at_the_end(prox):
    weights = torch.linspace(-1.5, 1.5, 61).unsqueeze(0)
    start = prox.apply(weights, Targets(HALVES), 0, torch.empty_like(weights))
    # the stretched sigmoid of temperature 1 is within 0.004 of the diagonal
    torch.testing.assert_close(start, weights, rtol=0, atol=4e-3 if isinstance(prox, ProxSoft) else 2e-7)
    for step in (10, 11, 10**9):
        end = prox.apply(weights, Targets(HALVES), step, torch.empty_like(weights))
        assert set(end.unique().tolist()) == {-1.5, -0.5, 0.5, 1.5}
    between = [prox.apply(weights, Targets(HALVES), step, torch.empty_like(weights)) for step in range(11)]
    for values in between:
        assert (values.diff() >= 0).all(), "a proximal map never changes the order of weights"


def test_a_vanishing_slope_stays_finite():
    weights = torch.tensor([[0.0, 1e-30, -1e-30, 0.5, 2.0]])
    for targets in (Targets(HALVES), ON_EVEN):
        prox = ProxPARQ(0, 10**6, steepness=1000)
        found = prox.apply(weights, targets, 10**6 - 1, torch.empty_like(weights))
        assert prox.inverse_slope(10**6 - 1) < 1e-200
        assert found.isfinite().all() and found[0, 1] == 0.5 and found[0, 2] == -0.5


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ProxPARQ(50, 50), "anneal_start=50, anneal_end=50"),
        (lambda: ProxPARQ(-1, 50), "anneal_start=-1"),
        (lambda: ProxBinaryRelax(9, 3), "ProxBinaryRelax"),
        (lambda: ProxPARQ(0, 50, steepness=0), "steepness=0"),
        (lambda: ProxPARQ(0, 50, center=1.0), "center=1.0"),
        (lambda: ProxPARQ(0, 50, schedule="step"), "schedule='step'"),
        (lambda: ProxSoft(0, 50, 10.0, 1.0), "temperatures 10.0 to 1.0"),
    ],
)
def test_bad_settings_say_what_is_allowed(build, words):
    with pytest.raises(UsageError, match=words):
        build()
