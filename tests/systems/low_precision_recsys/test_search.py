"""The search at both ends of the budget, its order, its files, its fallback; and what it does about planted faults."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.dlrm.model import DLRM
from edgewright.systems.low_precision_recsys import (
    AccuracyGate,
    apply_recipe,
    compare_numerics,
    search,
    uniform_recipe,
)
from edgewright.systems.low_precision_recsys.gate import as_examples
from edgewright.systems.low_precision_recsys.model import choices_report
from edgewright.systems.low_precision_recsys.precision_search import EPS, EvaluationCache, hull, raise_units
from edgewright.systems.low_precision_recsys.study import LAYER, inject_layer_outlier, inject_table_outlier

FEW = {"table": ("fp32", "int8", "int4-minmax"), "linear": ("fp32", "fp16", "int8-dynamic")}


def gate(budget: float = 5e-4) -> AccuracyGate:
    return AccuracyGate(budget=budget, resamples=100)


def test_no_budget_leaves_everything_float(model: DLRM, clicks: ClickData) -> None:
    recipe = search(model, clicks, gate(0.0), options=FEW)
    assert set(recipe.assignment.values()) == {"fp32"}
    assert recipe.metrics["bytes"] == recipe.metrics["bytes_reference"] and recipe.metrics["confirm"]["upper"] == 0.0


def test_an_endless_budget_takes_the_cheapest_everywhere(model: DLRM, clicks: ClickData) -> None:
    recipe = search(model, clicks, gate(math.inf))
    cheapest = {"table": "int2-greedy", "linear": "int8-dynamic"}  # static layers also store their range
    assert recipe.assignment == {name: cheapest[choice.kind] for name, choice in recipe.units.items()}
    assert recipe.metrics["bytes"] == apply_recipe(model, recipe).nbytes
    assert recipe.metrics["bytes_reference"] == sum(p.numel() * 4 for p in model.parameters())


def test_it_passes_what_it_says_and_goes_on_where_it_stopped(
    model: DLRM, clicks: ClickData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taken = {"n": 0}
    judge = AccuracyGate.judge

    def counting(*arguments: object) -> object:
        taken["n"] += 1
        if taken["n"] == 5:
            raise KeyboardInterrupt
        return judge(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(AccuracyGate, "judge", counting)
    with pytest.raises(KeyboardInterrupt):
        search(model, clicks, gate(0.003), log=tmp_path, options=FEW)
    files = sorted((tmp_path / "measurements").iterdir())
    assert len(files) == 4 and all(json.loads(f.read_text())["what"] for f in files)
    resumed = search(model, clicks, gate(0.003), log=tmp_path, options=FEW)
    before = taken["n"]
    assert search(model, clicks, gate(0.003), log=tmp_path, options=FEW) == resumed and taken["n"] == before
    assert search(model, clicks, gate(0.003), options=FEW) == resumed
    assert 0 < resumed.metrics["confirm"]["upper"] <= 0.003
    assert resumed.metrics["bytes"] < 0.5 * resumed.metrics["bytes_reference"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_other_weights_are_measured_again(model: DLRM, clicks: ClickData, tmp_path: Path) -> None:
    import copy

    search(model, clicks, gate(), log=tmp_path, options=FEW, tries=0)
    count = len(list((tmp_path / "measurements").iterdir()))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.top[0].bias[0] += 1e-3
    search(other, clicks, gate(), log=tmp_path, options=FEW, tries=0)
    assert len(list((tmp_path / "measurements").iterdir())) >= 2 * count - 4


def test_the_hull_leaves_out_what_costs_more_and_loses_as_much() -> None:
    points = {"fp32": (4.0, 0.0), "fp16": (2.0, 1e-4), "int8": (1.0, -1e-5), "int4": (0.5, 2e-4), "int2": (0.4, 1.0)}
    line = hull("u", points, "fp32")
    assert [step.option for step in line] == ["int8", "int4", "int2"]
    assert line[0].loss == EPS and line[0].saved == 3.0
    assert sum(step.saved for step in line) == pytest.approx(3.6)
    assert [s.option for s in hull("u", points, "fp16")] == ["int8", "int4", "int2"]


def test_latency_is_an_objective(model: DLRM, clicks: ClickData, tmp_path: Path) -> None:
    recipe = search(model, clicks, gate(), {"bytes": 1.0, "latency": 1.0}, tmp_path, options=FEW, tries=0)
    again = search(model, clicks, gate(), {"bytes": 1.0, "latency": 1.0}, tmp_path, options=FEW, tries=0)
    assert recipe == again and recipe.about["objective"] == {"bytes": 1.0, "latency": 1.0}
    times = [f for f in (tmp_path / "measurements").iterdir() if "time of" in f.read_text()]
    assert len(times) == 3 * 3 + 4 * 3  # kept: the clock is read once
    for wrong in ("size", {"bytes": 0.0}, {"watts": 1.0}):
        with pytest.raises(UsageError, match="objective="):
            search(model, clicks, gate(), wrong)  # type: ignore[arg-type]


def test_fallback_raises_each_unit_once_the_largest_contribution_first(model: DLRM, clicks: ClickData) -> None:
    bench = EvaluationCache(model, as_examples(clicks), gate(), [])
    options = {name: ("fp32", "int8", "int2-minmax") for name in ("tables.0", "tables.1", "tables.2")}
    worst = {name: "int2-minmax" for name in options}
    found, raised = raise_units(bench, worst, options, lambda assignment: False)
    assert sorted(raised) == sorted(options) and set(found.values()) == {"int8"}
    alone = {name: bench.measure({**worst, name: "int8"}).delta for name in options}
    assert raised[0] == min(alone, key=lambda name: alone[name])
    assert raise_units(bench, worst, options, lambda assignment: True) == (worst, [])


def test_a_result_that_is_not_confirmed_goes_back(model: DLRM, clicks: ClickData) -> None:
    """The data to confirm with contradict every label: any change that helps there hurts, and the gate says no."""
    early, late = clicks.split(0.5)
    budget = 0.01
    plain = search(model, early, gate(budget), confirm=late, options=FEW)
    strict = search(model, early, gate(budget), confirm=late.rows(slice(0, 60)), options=FEW)  # wide intervals
    assert strict.metrics["bytes"] >= plain.metrics["bytes"]
    assert strict.metrics["confirm"]["upper"] <= budget
    if strict.assignment != plain.assignment:
        assert strict.about["notes"]


@pytest.mark.parametrize("fault", ["layer", "table"])
def test_planted_faults_are_found_and_kept_precise(model: DLRM, clicks: ClickData, fault: str) -> None:
    faulty, name = (
        (inject_layer_outlier(model, 100.0), LAYER)
        if fault == "layer"
        else (inject_table_outlier(model, 2, 100.0), "tables.2")
    )
    if fault == "layer":  # the float model does not notice
        torch.testing.assert_close(faulty.bottom(clicks.dense), model.bottom(clicks.dense), rtol=1e-4, atol=1e-4)
    low = apply_recipe(faulty, uniform_recipe(faulty, "int8", "int8-dynamic"))
    compared = compare_numerics(faulty, low, clicks)
    assert compared.modules[0].name == name and compared.modules[0].output < compared.modules[1].output
    assert compared.table().splitlines()[1].startswith(name)
    chosen = search(faulty, clicks, gate(0.003), options=FEW).assignment
    sound = search(model, clicks, gate(0.003), options=FEW).assignment
    order = FEW["linear" if fault == "layer" else "table"]
    assert order.index(chosen[name]) < order.index(sound[name])


def test_local_and_accumulated_errors(model: DLRM, clicks: ClickData) -> None:
    recipe = uniform_recipe(model, "int2-minmax", "int8-static")
    low = apply_recipe(model, recipe, clicks.rows(slice(0, 50)))
    found = {m.name: m for m in compare_numerics(model, low, clicks).modules}
    assert len(found) == 7
    assert found["tables.0"].local == found["tables.0"].accumulated < 20  # nothing stands before a table
    assert found["top.0"].local > found["top.0"].accumulated + 10  # its input is already wrong
    assert found["bottom.0"].saturation > 0  # ranges of 50 samples
    narrow = apply_recipe(model, uniform_recipe(model, "int2-greedy"))
    assert compare_numerics(model, narrow, clicks).modules[0].saturation > 0
    with pytest.raises(UsageError, match="no low-precision module"):
        compare_numerics(model, model, clicks)


def test_one_report_of_all_choices(model: DLRM, clicks: ClickData) -> None:
    recipes = {"int8": uniform_recipe(model, "int8", "int8-static"), "int2": uniform_recipe(model, "int2-greedy")}
    report = choices_report(model, clicks, recipes, gate(), runs=2)
    assert report.subjects == ["fp32", "int8", "int2"]
    for metric in ("bytes", "share", "delta_ne", "delta_ne_upper", "auc_loss", "latency_p50", "latency_p99"):
        assert all(report.row(metric, subject) for subject in report.subjects)
    assert report.value("delta_ne", "int8") < report.value("delta_ne", "int2")
    assert report.value("share", "fp32") == 100.0 and report.value("passes", "fp32") == 1.0


def test_bad_arguments(model: DLRM, clicks: ClickData) -> None:
    with pytest.raises(UsageError, match="no unit 'tables.9'"):
        search(model, clicks, gate(), options={"tables.9": ("fp32",)})
    with pytest.raises(UsageError, match="'int3'; it must be one of"):
        search(model, clicks, gate(), options={"table": ("fp32", "int3")})
    with pytest.raises(UsageError, match="no unit 'x'"):
        search(model, clicks, gate(), skip=("x",))
    with pytest.raises(ValueError, match="calibration data is empty"):
        search(model, clicks, gate(), calibration=[])
