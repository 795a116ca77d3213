"""Ranges and drift indices against NumPy; the monitor's four states, its history and its files."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.low_precision_recsys import AccuracyGate, Monitor, QuantRecipe
from edgewright.systems.low_precision_recsys.gate import as_examples
from edgewright.systems.low_precision_recsys.precision_search import calibrated_recipe
from edgewright.systems.low_precision_recsys.study import inject_table_outlier
from edgewright.systems.low_precision_recsys.units import BINS, Histogram, find_units, histograms, population_stability


def histogram(values: np.ndarray) -> Histogram:
    counts, _ = np.histogram(values, BINS)
    return Histogram(float(values.min()), float(values.max()), torch.from_numpy(counts).double())


def error(values: np.ndarray, low: float, high: float) -> float:
    step = (high - low) / 255
    zero = np.clip(np.round(-low / step), 0, 255)
    codes = np.clip(np.round(values / step) + zero, 0, 255)
    return float(np.square((codes - zero) * step - values).mean())


def test_the_range_of_least_squared_error_cuts_rare_extremes() -> None:
    values = np.random.default_rng(0).normal(size=200_000)
    values[:5] = 12.0, -9.0, 10.0, 8.0, -8.0
    found = histogram(values)
    low, high = found.range()
    assert -8.5 < low < -3.5 and 3.5 < high < 11
    assert error(values, low, high) < 0.75 * error(values, values.min(), values.max())
    # no other candidate of the same grid is better, in NumPy's arithmetic, beyond what the bins' width blurs
    grid = [(values.min() * a, values.max() * b) for a in np.linspace(0.25, 1, 13) for b in np.linspace(0.25, 1, 13)]
    assert error(values, low, high) <= 1.05 * min(error(values, *ends) for ends in grid)
    step, zero = found.parameters()
    assert step == pytest.approx((high - low) / 255) and zero == round(-low / step)


def test_ranges_hold_zero_and_may_be_empty() -> None:
    assert histogram(np.random.default_rng(0).uniform(2, 3, 1000)).range()[0] == 0.0
    flat = Histogram(0.0, 0.0, torch.tensor([5.0] + [0.0] * (BINS - 1), dtype=torch.float64))
    assert flat.range() == (0.0, 0.0) and flat.parameters() == (1.0, 0)


def test_histograms_see_what_the_layers_see(model: DLRM, clicks: ClickData) -> None:
    data = as_examples(clicks, 700)
    found = histograms(model, find_units(model), data.batches)
    assert set(found) == {"bottom.0", "bottom.2", "top.0", "top.3"}
    values = clicks.dense.numpy().ravel()
    expected, _ = np.histogram(values.astype(np.float64), BINS, (float(values.min()), float(values.max())))
    assert np.abs(found["bottom.0"].counts.numpy() - expected).sum() <= 4  # values on an edge
    with pytest.raises(UsageError, match="calibration data is empty"):
        histograms(model, find_units(model), [])


def test_population_stability() -> None:
    draws = np.random.default_rng(0)
    before = histogram(draws.normal(size=50_000))
    edges = before.edges()
    shares = before.shares(edges)
    assert len(edges) == 9 and shares == pytest.approx([0.1] * 10, abs=0.01)
    same = population_stability(shares, histogram(draws.normal(size=50_000)).shares(edges))
    moved = population_stability(shares, histogram(3 * draws.normal(size=50_000)).shares(edges))
    assert same < 0.01 and moved > 0.2
    a, b = np.array([0.2, 0.8]), np.array([0.5, 0.5])
    assert population_stability(a, b) == pytest.approx(float(((b - a) * np.log(b / a)).sum()))
    mostly = histogram(np.maximum(draws.normal(size=10_000), 0))  # half are zeros, as behind a ReLU
    assert len(mostly.edges()) < 9 and sum(mostly.shares(mostly.edges())) == pytest.approx(1.0)


def test_the_states(model: DLRM, clicks: ClickData, tmp_path: Path) -> None:
    recipe = calibrated_recipe(model, {"table": "int8", "linear": "int8-static"}, clicks)
    gate = AccuracyGate(budget=0.002, resamples=100)
    monitor = Monitor(recipe, gate, tmp_path / "mon")
    refreshed = copy.deepcopy(model)
    with torch.no_grad():
        refreshed.tables[0].weight.mul_(1.01)
    first = monitor.check(refreshed, clicks, "week 1")
    assert first.state == "OK" and not first.warning and first.psi < 0.2 and monitor.recipe is recipe

    shifted = dataclasses.replace(clicks, dense=3 * clicks.dense)
    second = monitor.check(refreshed, shifted, "week 2")
    assert second.state == "RECALIBRATED" and second.warning and second.raised == () and second.upper <= 0.002
    old, new = recipe.units["bottom.0"].range, monitor.recipe.units["bottom.0"].range
    assert new[0] == pytest.approx(3 * old[0], rel=0.05)  # type: ignore[index]
    assert monitor.check(refreshed, shifted).state == "OK"  # the new ranges are kept

    again = Monitor(recipe, gate, tmp_path / "mon")  # goes on from its folder
    faulty = inject_table_outlier(refreshed, 2, 300.0)
    third = again.check(faulty, shifted, "week 4")
    assert third.state == "FALLBACK" and "tables.2" in third.raised and third.upper <= 0.002
    assert again.recipe.units["tables.2"].option == "fp16"
    assert QuantRecipe.load(tmp_path / "mon" / "recipe.json") == again.recipe

    coarse = calibrated_recipe(model, {"table": "int2-greedy"}, clicks)
    strict = Monitor(coarse, AccuracyGate(budget=1e-6, resamples=100), tmp_path / "strict")
    last = strict.check(faulty, shifted)  # 4 bits, one option up, are not enough
    assert last.state == "BLOCKED" and strict.recipe is coarse and len(last.raised) == 3
    history = again.history()
    assert [c.state for c in history] == ["OK", "RECALIBRATED", "OK", "FALLBACK"]
    assert [c.period for c in history] == ["week 1", "week 2", "2", "week 4"] and history[3] == third
    assert (tmp_path / "mon" / "history.png").stat().st_size > 0


def test_other_models_and_broken_files(model: DLRM, clicks: ClickData, tmp_path: Path) -> None:
    recipe = calibrated_recipe(model, {"table": "int8"}, clicks)
    monitor = Monitor(recipe, AccuracyGate(resamples=100), tmp_path)
    with pytest.raises(UsageError, match="another architecture"):
        monitor.check(DLRM(DLRMConfig(6, (40, 30), 8, (16, 8), (16, 1))), clicks)
    for content in ("period,state\n1,OK\n", "period,state\n1," + "9" * 200_000 + "\n"):
        (tmp_path / "history.csv").write_text(content)
        with pytest.raises(FormatError, match="no history of a monitor"):
            monitor.history()
