"""Faults to plant in a DLRM: what a float model does not notice and a blanket precision breaks on.

Tests and recipes plant them to see that the debugger points at them and that a search keeps off them.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgewright.measure.report import Report
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.dlrm.movielens import CROSSES, TABLES, Split, movielens_100k
from edgewright.systems.dlrm.optimizers import ClickTraining, train_clicks
from edgewright.systems.low_precision_recsys.gate import AccuracyGate, click_slices
from edgewright.systems.low_precision_recsys.model import apply_recipe, choices_report, uniform_recipe
from edgewright.systems.low_precision_recsys.monitor import STATES, Monitor, compare_numerics
from edgewright.systems.low_precision_recsys.precision_search import calibrated_recipe, search
from edgewright.systems.low_precision_recsys.units import find_units

if TYPE_CHECKING:
    from edgewright.systems.dlrm.clicks import ClickData
    from edgewright.systems.low_precision_recsys.model import QuantRecipe


LAYER = "bottom.2"  # behind bottom.0 and a ReLU


def inject_layer_outlier(model: DLRM, factor: float) -> DLRM:
    """The same function, with one input channel of a layer `factor` times larger and what feeds it smaller."""
    made = copy.deepcopy(model)
    before: Any = made.get_submodule("bottom.0")
    layer: Any = made.get_submodule(LAYER)
    with torch.no_grad():
        channel = int((before.weight.abs().sum(1) * layer.weight.abs().sum(0)).argmax())
        # ReLU passes a positive factor on, so that the layer's larger weights meet smaller inputs
        scale = factor * float(layer.weight.abs().max() / layer.weight[:, channel].abs().max())
        before.weight[channel] /= scale
        before.bias[channel] /= scale
        layer.weight[:, channel] *= scale
    return made


def inject_table_outlier(model: DLRM, table: int, factor: float) -> DLRM:
    """One value of every row `factor` times the row's largest, in a dimension that no other vector uses any more."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for place, each in enumerate(made.tables):
            weight: Any = each.weight
            if place == table:
                weight[:, -1] = factor * weight.abs().amax(1)
            else:
                weight[:, -1] = 0.0
                low, high = weight.aminmax(dim=1, keepdim=True)
                # ends such that 0 is one of 15 (and of 255) even steps: what is 0 here must stay 0 at 8 bits, or the
                # products with the large values would put the blame on this table
                scale = (high - low) / 15
                places = torch.where(scale > 0, -low / scale, 0.0).round()
                ends = torch.where(weight == high, (15 - places) * scale, weight)
                weight.copy_(torch.where(weight == low, -places * scale, ends))
        last: Any = [m for m in made.bottom if isinstance(m, nn.Linear)][-1]
        last.weight[-1] = 0.0
        last.bias[-1] = 0.0
    return made


Rows = list[dict[str, Any]]
PERIODS = ("drift 1", "drift 2", "drift 3, features scaled", "drift 4, heavy-tailed table")
BLANKET = {  # subject -> option of tables, option of linear layers
    "all fp16": ("fp16", "fp16"),
    "int8 tables": ("int8", "fp32"),
    "all int8": ("int8", "int8-dynamic"),
    "all int4 min-max": ("int4-minmax", "int8-dynamic"),
    "all int4 greedy": ("int4-greedy", "int8-dynamic"),
    "all int4 codebooks": ("int4-books", "int8-dynamic"),
    "all int2": ("int2-greedy", "int8-dynamic"),
}
TABLE = 1  # the table of the items, where a fault is planted


class PrecisionStudy:
    """The data, models of all seeds, and what is measured on them; `settings` are the recipe's."""

    def __init__(self, settings: Any, output: Path) -> None:
        self.settings, self.output = settings, output
        data = movielens_100k("time")
        if not settings.crosses:
            plain = [name for name in TABLES if name not in CROSSES]
            data = Split(*(part.tables(plain) for part in data))
        if settings.samples:
            data = Split(*(part.rows(slice(0, settings.samples)) for part in data))
        self.data: Split = data
        self.last = data.train.rows(slice(-4096, None))  # what ranges are calibrated on
        self._models: dict[int, DLRM] = {}

    def gate(self, budget: float) -> AccuracyGate:
        return AccuracyGate(budget=budget, resamples=self.settings.resamples)

    def trained(self, train: ClickData, valid: ClickData, seed: int, model: DLRM | None = None, name: str = "") -> DLRM:
        """A new model, or `model` trained on; with a name it goes on where it was stopped."""
        settings, schema = self.settings, train.schema
        if model is None:
            widths = (settings.hidden, settings.dim), (settings.hidden, 1)
            config = DLRMConfig(
                len(schema.dense), schema.sizes, settings.dim, *widths, dropout=(0.2, 0.3), table_names=schema.tables
            )
            model = DLRM(config, seed)
        rates = settings.dense_lr, settings.sparse_lr
        training = ClickTraining(settings.epochs, settings.batch, *rates, seed=seed)
        train_clicks(model, train, valid, training, output=self.output / "training" / name if name else None)
        return model.eval()

    def model(self, seed: int) -> DLRM:
        if seed not in self._models:
            self._models[seed] = self.trained(self.data.train, self.data.valid, seed, name=f"seed-{seed}")
        return self._models[seed]

    def searched(self, model: DLRM, budget: float) -> QuantRecipe:
        return search(
            model,
            self.data.valid,
            self.gate(budget),
            log=self.output / "search",
            confirm=self.data.test,
            calibration=self.last,
        )

    def choices(self, seed: int) -> Rows:
        """Bytes, losses and latency of every precision on the test; the first seed leaves its model in the folder."""
        settings, model = self.settings, self.model(seed)
        recipes = {name: uniform_recipe(model, *options) for name, options in BLANKET.items()}
        for budget in settings.budgets:
            recipes[f"searched at {100 * budget:g} %"] = self.searched(model, budget)
        report = choices_report(
            model,
            self.data.test,
            recipes,
            self.gate(settings.budgets[0]),
            calibration=self.last,
            slices=click_slices(self.data.test, self.data.train, "item"),
            runs=settings.runs,
        )
        for name in BLANKET:
            report.add("table_error", table_error(model, recipes[name]), subject=name)
        if seed == settings.seed:
            best = recipes[f"searched at {100 * settings.budgets[0]:g} %"]
            best.save(self.output / "recipe.json")
            apply_recipe(model, best).save_pretrained(self.output / "model")
        return _rows(report)

    def planted(self, part: str) -> Rows:
        """Rank of the faulty unit where all is int8, and the bits that a search leaves it, beside the sound model's."""
        model, name = self.model(self.settings.seed), LAYER if part == "linear layer" else f"tables.{TABLE}"
        faulty = inject_table_outlier(model, TABLE, self.settings.plant)
        if part == "linear layer":
            faulty = inject_layer_outlier(model, self.settings.plant)
        report = Report("planted")
        for state, judged in (("as trained", model), ("planted", faulty)):
            copy = apply_recipe(judged, uniform_recipe(judged, "int8", "int8-dynamic"))
            ranking = [m.name for m in compare_numerics(judged, copy, self.data.test).modules]
            option = self.searched(judged, self.settings.budgets[0]).units[name].option
            report.add("rank", 1 + ranking.index(name), subject=f"{part}, {state}")
            report.add("bits", option_bits(option), subject=f"{part}, {state}", unit="bits")
        return _rows(report)

    def drift(self) -> Rows:
        """A model that learns on from week to week under one recipe, and what the monitor says each week."""
        settings, train = self.settings, self.data.train
        first = round(0.6 * len(train))
        week = (len(train) - first) // len(PERIODS)
        start = train.rows(slice(0, first))
        model = self.trained(start, train.rows(slice(first, first + week)), settings.seed)
        options = {"table": "int8", "linear": "int8-static"}
        recipe = calibrated_recipe(model, options, start.rows(slice(-4096, None)))
        shutil.rmtree(self.output / "monitor", ignore_errors=True)  # of a run that was interrupted here
        monitor = Monitor(recipe, self.gate(settings.drift_budget), self.output / "monitor")
        report = Report("drift")
        for place, period in enumerate(PERIODS):
            data = train.rows(slice(first + place * week, first + (place + 1) * week))
            if place == 2:
                data = replace(data, dense=settings.shift * data.dense)
            learn, judge = data.split(0.5)
            model = self.trained(learn, judge, settings.seed, model)
            judged = inject_table_outlier(model, TABLE, settings.plant) if place == 3 else model
            verdict = monitor.check(judged, judge, period)
            report.add("state", STATES.index(verdict.state), subject=period)
            report.add("delta_ne", 100 * verdict.delta, subject=period, n=len(judge), unit="%")
            report.add("delta_ne_upper", 100 * verdict.upper, subject=period, n=len(judge), unit="%")
            report.add("psi", verdict.psi, subject=period)
            report.add("share", 100 * verdict.share, subject=period, unit="%")
        return _rows(report)


def table_error(model: DLRM, recipe: QuantRecipe) -> float:
    """|W - W_hat| / |W| (Frobenius) over all tables of the model under a recipe."""
    copy = apply_recipe(model, recipe)
    error = norm = 0.0
    for unit in find_units(model).values():
        if unit.kind == "table":
            layer: Any = model.get_submodule(unit.name)
            quantized: Any = copy.module.get_submodule(unit.name)
            weight = layer.weight.detach()
            error += float((quantized.stored.weight - weight).square().sum())
            norm += float(weight.square().sum())
    return (error / norm) ** 0.5


def option_bits(option: str) -> int:
    """Bits of a stored value under an option."""
    return int("".join(c for c in option.partition("-")[0] if c.isdigit()))


def _rows(report: Report) -> Rows:
    return [asdict(row) for row in report.rows]
