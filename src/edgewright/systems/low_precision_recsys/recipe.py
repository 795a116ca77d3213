"""Low-precision click models (arXiv 2105.12676) on MovieLens 100k: which precision passes a budget of 0.05 %?

A DLRM is trained in the order of time, searched on its validation part and judged on the last fifth of the ratings.
Beside the search stand blanket precisions. Two planted faults show whether debugger and search find them, and a model
that is refreshed while the data shift shows what the monitor says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.dlrm.movielens import CROSSES, TABLES, Split, movielens_100k
from edgewright.systems.dlrm.training import ClickTraining, train_clicks
from edgewright.systems.low_precision_recsys import (
    AccuracyGate,
    Monitor,
    apply_recipe,
    click_slices,
    compare_numerics,
    search,
    uniform_recipe,
)
from edgewright.systems.low_precision_recsys.choices import choices_report
from edgewright.systems.low_precision_recsys.faults import LAYER, spoil_layer, spoil_table
from edgewright.systems.low_precision_recsys.monitor import STATES
from edgewright.systems.low_precision_recsys.precision_search import calibrated_recipe
from edgewright.systems.low_precision_recsys.units import find_units
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import row_over_seeds

if TYPE_CHECKING:
    from edgewright.systems.dlrm.clicks import ClickData
    from edgewright.systems.low_precision_recsys import QuantRecipe


@dataclass(frozen=True)
class LowPrecisionSettings:
    """samples 0: all of them, otherwise the first ones of every part. runs: timed calls of every choice.

    plant: how much larger the planted channel and the planted values are. periods: refreshes of the model; the data's
    dense features are scaled by `shift` in the third, a table gets heavy tails in the last.
    """

    seed: int = 0
    seeds: int = 3
    samples: int = 0
    crosses: bool = True
    dim: int = 16
    hidden: int = 64
    epochs: float = 2.0
    batch: int = 256
    dense_lr: float = 1e-3
    sparse_lr: float = 0.02
    budgets: tuple[float, ...] = (0.0005, 0.005)
    resamples: int = 1000
    plant: float = 100.0
    shift: float = 3.0
    drift_budget: float = 0.002
    runs: int = 30


def tiny() -> LowPrecisionSettings:
    return LowPrecisionSettings(
        seeds=1,
        samples=2000,
        crosses=False,
        epochs=1.0,
        sparse_lr=0.05,
        budgets=(0.005,),
        resamples=100,
        runs=2,
        drift_budget=0.05,
    )


def small() -> LowPrecisionSettings:
    return LowPrecisionSettings()


def paper() -> LowPrecisionSettings:
    """Ten seeds. The published models are not public: `search` takes any DLRM that `edgewright train` wrote."""
    return LowPrecisionSettings(seeds=10, runs=100)


LARGE = ("small", "paper")
CLAIMS = (
    Claim("delta_ne_upper", "int8 tables", "<", threshold=0.05, sizes=LARGE),
    Claim("table_error", "all int4 greedy", "<", against="all int4 min-max"),
    Claim("delta_ne_upper", "all int2", ">", threshold=0.05, sizes=LARGE),
    Claim("share", "searched at 0.05 %", "<", threshold=30.0, sizes=LARGE),
    Claim("delta_ne_upper", "searched at 0.05 %", "<", threshold=0.05, sizes=LARGE),
    Claim("share", "searched at 0.5 %", "<", threshold=30.0),
    Claim("delta_ne_upper", "searched at 0.5 %", "<", threshold=0.5),
    Claim("rank", "linear layer, planted", "<", threshold=1.5, sizes=LARGE),
    Claim("rank", "table, planted", "<", threshold=1.5, sizes=LARGE),
    Claim("bits", "linear layer, planted", ">", against="linear layer, as trained", sizes=LARGE),
    Claim("bits", "table, planted", ">", against="table, as trained", sizes=LARGE),
    Claim("state", "drift 3, features scaled", ">", threshold=0.5),
    Claim("state", "drift 3, features scaled", "<", threshold=1.5),
    Claim("state", "drift 4, heavy-tailed table", ">", threshold=1.5, sizes=LARGE),
    Claim("state", "drift 4, heavy-tailed table", "<", threshold=2.5, sizes=LARGE),
)
CLOCKED: tuple[str, ...] = ("latency_p50", "latency_p99")
HEADLINE: Headline | None = Headline(
    "search under a gate of 0.05 % of normalised entropy keeps {share:.0f} % of a DLRM's bytes (change "
    "{change:+.2f} %); int8 everywhere {int8:.0f} %",
    {
        "share": Cell("low-precision-recsys.csv", {"metric": "share", "subject": "searched at 0.05 %"}),
        "change": Cell("low-precision-recsys.csv", {"metric": "delta_ne", "subject": "searched at 0.05 %"}),
        "int8": Cell("low-precision-recsys.csv", {"metric": "share", "subject": "all int8"}),
    },
)
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


def plan(settings: LowPrecisionSettings) -> Plan:
    samples = settings.samples or 72_000
    steps = settings.epochs * samples / settings.batch
    searches = settings.seeds * len(settings.budgets) + 3
    return Plan(
        steps=(
            f"DLRM on ratings in order of time, {settings.seeds} seed(s), {settings.epochs:g} epochs",
            f"{len(BLANKET)} blanket precisions and searches at "
            + ", ".join(f"{100 * budget:g} %" for budget in settings.budgets)
            + ": bytes, loss of NE and AUC, latency, on the last fifth",
            f"a linear layer and a table spoilt by values {settings.plant:g} times larger: debugger and search",
            f"{len(PERIODS)} refreshes, one with features x {settings.shift:g}, one with a heavy-tailed table: monitor",
        ),
        seconds=5 + 0.015 * steps * (settings.seeds + 1) + searches * (3 + samples / 2000),  # an estimate
        memory_bytes=int(1.2e9),
        disk_bytes=int(3e7),
        outputs=("choices.png", "points.json", "model/model.safetensors", "recipe.json", "monitor/history.csv"),
    )


def run(settings: LowPrecisionSettings, output: Path) -> Report:
    """Every part is kept in points.json when it is measured; searches keep every measurement in a folder."""
    store = output / "points.json"
    points: dict[str, list[dict[str, Any]]] = read_object(store) if store.exists() else {}
    bench = _Bench(settings, output)

    def measured(key: str, build: Callable[[], Report]) -> list[dict[str, Any]]:
        if key not in points:
            points[key] = build().to_dict()["rows"]
            write_text(store, json.dumps(points, indent=1) + "\n")
        return points[key]

    report = Report("A DLRM on MovieLens 100k at low precision")
    seeds = [measured(f"choices/{seed}", lambda s=seed: bench.choices(s)) for seed in bench.seeds]  # type: ignore[misc]
    for rows in zip(*seeds, strict=True):
        report.add(**row_over_seeds(list(rows)))
    for part in ("linear layer", "table"):
        for row in measured(f"planted/{part}", lambda p=part: bench.planted(p)):  # type: ignore[misc]
            report.add(**row)
    for row in measured("drift", bench.drift):
        report.add(**row)
    report.notes += [
        "± is over seeds; delta_ne: growth of normalised entropy over the float model's on the same examples, upper: "
        "end of the one-sided 95 % interval, users drawn whole; share: of the float model's bytes",
        "state: 0 OK, 1 recalibrated, 2 fallback, 3 blocked; rank: place in the debugger's list, 1 is the worst; "
        "bits: what the search at the first budget gave the spoilt unit",
    ]
    _plot(report, output / "choices.png")
    return report


class _Bench:
    """The data, models of all seeds, and what is measured on them."""

    def __init__(self, settings: LowPrecisionSettings, output: Path) -> None:
        self.settings, self.output = settings, output
        self.seeds = [settings.seed + i for i in range(settings.seeds)]
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

    def choices(self, seed: int) -> Report:
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
        tables = [unit for unit in find_units(model).values() if unit.kind == "table"]
        for name in BLANKET:
            copy = apply_recipe(model, recipes[name])
            squares = [0.0, 0.0]
            for unit in tables:
                layer: Any = model.get_submodule(unit.name)
                weight = layer.weight.detach()
                found: Any = copy.module.get_submodule(unit.name)
                squares[0] += float((found.stored.weight - weight).square().sum())
                squares[1] += float(weight.square().sum())
            report.add("table_error", (squares[0] / squares[1]) ** 0.5, subject=name)
        if seed == settings.seed:
            best = recipes[f"searched at {100 * settings.budgets[0]:g} %"]
            best.save(self.output / "recipe.json")
            apply_recipe(model, best).save_pretrained(self.output / "model")
        return report

    def planted(self, part: str) -> Report:
        """Rank of the spoilt unit where all is int8, and the bits that a search leaves it, beside the sound model's."""
        model, name = self.model(self.settings.seed), LAYER if part == "linear layer" else f"tables.{TABLE}"
        spoilt = spoil_table(model, TABLE, self.settings.plant)
        if part == "linear layer":
            spoilt = spoil_layer(model, self.settings.plant)
        report = Report("planted")
        for state, judged in (("as trained", model), ("planted", spoilt)):
            copy = apply_recipe(judged, uniform_recipe(judged, "int8", "int8-dynamic"))
            ranking = [m.name for m in compare_numerics(judged, copy, self.data.test).modules]
            found = self.searched(judged, self.settings.budgets[0]).units[name].option
            report.add("rank", 1 + ranking.index(name), subject=f"{part}, {state}")
            report.add("bits", option_bits(found), subject=f"{part}, {state}", unit="bits")
        return report

    def drift(self) -> Report:
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
            judged = spoil_table(model, TABLE, settings.plant) if place == 3 else model
            found = monitor.check(judged, judge, period)
            report.add("state", STATES.index(found.state), subject=period)
            report.add("delta_ne", 100 * found.delta, subject=period, n=len(judge), unit="%")
            report.add("delta_ne_upper", 100 * found.upper, subject=period, n=len(judge), unit="%")
            report.add("psi", found.psi, subject=period)
            report.add("share", 100 * found.share, subject=period, unit="%")
        return report


def option_bits(option: str) -> int:
    """Bits of a stored value under an option."""
    return int("".join(c for c in option.partition("-")[0] if c.isdigit()))


def _plot(report: Report, path: Path) -> None:
    shares = {row.subject: row.value for row in report.rows if row.metric == "share" and "drift" not in row.subject}
    with plot(path, (8, 5)) as axes:
        for name, share in shares.items():
            value, upper = report.value("delta_ne", name), report.value("delta_ne_upper", name)
            colour = "tab:red" if name.startswith("searched") else "tab:blue"
            axes.errorbar(share, value, yerr=[[0], [max(upper - value, 0)]], fmt="o", capsize=3, color=colour)
            axes.annotate(name, (share, value), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.axhline(0.05, color="black", linestyle="--", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks([12.5, 25, 50, 100], ["12.5", "25", "50", "100"])
        axes.set_xlabel("bytes (% of the float model)")
        axes.set_ylabel("growth of normalised entropy (%), bar to its upper end")
        axes.grid(alpha=0.25)
