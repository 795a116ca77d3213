"""The monitor: is the recipe still good for the model of today, and for today's traffic?

A ranking model is refreshed every period. Each check quantises the new weights by the stored recipe and judges them
on new data:

    OK             passes as it is
    RECALIBRATED   the inputs of static layers have moved; passes with ranges taken anew
    FALLBACK       passes after some units were raised to a costlier option, which the stored recipe now says
    BLOCKED        does not pass, whatever is raised by one option: this model must not be served quantised

Drift of inputs is told by the population-stability index of every linear layer's input against the stored histogram;
above 0.2 is a warning, and for a static layer a reason to calibrate anew.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from edgewright.errors import FormatError
from edgewright.io.atomic import write_text
from edgewright.measure.plot import plot
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.low_precision_recsys.calibration import population_stability
from edgewright.systems.low_precision_recsys.examples import Examples, as_examples
from edgewright.systems.low_precision_recsys.gate import AccuracyGate, Judgement
from edgewright.systems.low_precision_recsys.measurements import Bench
from edgewright.systems.low_precision_recsys.model import QuantRecipe
from edgewright.systems.low_precision_recsys.precision_search import describe, raise_units
from edgewright.systems.low_precision_recsys.units import LINEAR_OPTIONS, REFERENCE, TABLE_OPTIONS

STATES = ("OK", "RECALIBRATED", "FALLBACK", "BLOCKED")
PSI_WARN = 0.2
HISTORY, PLOT, RECIPE, STARTED = "history.csv", "history.png", "recipe.json", "started.json"


@dataclass(frozen=True)
class Check:
    """One period. psi: the largest index of all linear layers, `psi_unit` has it; warning: it is above the limit.

    raised: units that went to a costlier option. delta and upper are those of the state that was reached; share: bytes
    over the float model's.
    """

    period: str
    state: str
    delta: float
    upper: float
    ne: float
    ne_reference: float
    auc_delta: float
    calibration: float
    psi: float
    psi_unit: str
    warning: bool
    raised: tuple[str, ...]
    share: float


class Monitor:
    """Watches a recipe over the refreshes of its model.

    store: folder with the recipe of today, history.csv and history.png; a new Monitor on the same folder and with the
    same recipe goes on from there. psi_warn: limit of the index. batches: how many of the data's batches calibrate.
    """

    def __init__(
        self,
        recipe: QuantRecipe,
        gate: AccuracyGate,
        store: str | Path,
        *,
        psi_warn: float = PSI_WARN,
        batches: int = 1,
    ) -> None:
        self.gate, self.store, self.psi_warn, self.batches = gate, Path(store), psi_warn, batches
        started, kept = self.store / STARTED, self.store / RECIPE
        goes_on = started.exists() and kept.exists() and QuantRecipe.load(started).units == recipe.units
        self.recipe = QuantRecipe.load(kept) if goes_on else recipe
        if not goes_on:
            recipe.save(kept)
            recipe.save(started)

    def check(self, model: nn.Module, data: ClickData | Examples, period: str | None = None) -> Check:
        """Judge a refreshed model (left as it is) on labelled data of its period, and keep what was found.

        `self.recipe` is afterwards the one to apply, unless the state is BLOCKED. Raises UsageError for a model of
        another architecture.
        """
        self.recipe.check(model, refreshed=True)
        examples = as_examples(data)
        calibration = list(examples.batches[: self.batches])
        choices = self.recipe.units
        ranges = {name: choice.range for name, choice in choices.items() if choice.range is not None}
        bench = Bench(model, examples, self.gate, calibration, None, self.recipe.bias_correction, ranges)
        drift = {
            name: population_stability(choice.shares, bench.histograms[name].shares(choice.edges))
            for name, choice in choices.items()
            if choice.edges and name in bench.histograms
        }
        state, raised, assignment = "OK", list[str](), dict(self.recipe.assignment)
        stale = any(drift.get(name, 0.0) > self.psi_warn for name in ranges)
        if stale or not bench.passes(assignment):
            if ranges:
                state = "RECALIBRATED"
                reused = {key: part for key, part in bench.built.items() if not key[1].startswith("int8-static")}
                correct = self.recipe.bias_correction
                bench = Bench(model, examples, self.gate, calibration, None, correct, built=reused)
            if not bench.passes(assignment):
                options = {name: ladder(choice.kind, choice.option) for name, choice in choices.items()}
                assignment, raised = raise_units(bench, assignment, options, bench.passes)
                state = "FALLBACK" if bench.passes(assignment) else "BLOCKED"
        if state in ("RECALIBRATED", "FALLBACK"):
            kept = self.recipe
            found = describe(bench, assignment, metrics=kept.metrics, data=kept.data, about=kept.about)
            self.recipe = replace(found, bias_correction=kept.bias_correction)
            self.recipe.save(self.store / RECIPE)
        return self._record(bench, state, bench.measure(assignment), drift, raised, assignment, period)

    def history(self) -> list[Check]:
        """All checks so far. Raises FormatError for a file that is none."""
        path = self.store / HISTORY
        if not path.exists():
            return []
        kinds = {field.name: str(field.type) for field in fields(Check)}
        with path.open(encoding="utf-8", newline="") as file:
            try:
                return [Check(**{k: _parsed(kinds[k], v) for k, v in row.items()}) for row in csv.DictReader(file)]
            except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
                raise FormatError(f"{path} is no history of a monitor: {error}") from error

    def _record(
        self,
        bench: Bench,
        state: str,
        found: Judgement,
        drift: Mapping[str, float],
        raised: list[str],
        assignment: Mapping[str, str],
        period: str | None,
    ) -> Check:
        before = self.history()
        worst = max(drift, key=lambda name: drift[name], default="")
        psi = drift.get(worst, 0.0)
        done = Check(
            period=str(len(before)) if period is None else period,
            state=state,
            delta=found.delta,
            upper=found.upper,
            ne=found.ne,
            ne_reference=found.ne_reference,
            auc_delta=found.auc_delta,
            calibration=found.calibration,
            psi=psi,
            psi_unit=worst,
            warning=psi > self.psi_warn,
            raised=tuple(raised),
            share=bench.nbytes(assignment) / bench.nbytes({}),
        )
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(Check)], lineterminator="\n")
        writer.writeheader()
        for check in (*before, done):
            writer.writerow({**asdict(check), "raised": " ".join(check.raised)})
        write_text(self.store / HISTORY, text.getvalue())
        plot_history([*before, done], self.gate.budget, self.store / PLOT)
        return done


def plot_history(checks: list[Check], budget: float, path: str | Path) -> None:
    """Loss and its upper end over the periods, with the budget and every period's state."""
    colours = dict(zip(STATES, ("tab:green", "tab:blue", "tab:orange", "tab:red"), strict=True))
    with plot(path, (max(5.0, 0.6 * len(checks) + 2), 4.0)) as axes:
        for place, check in enumerate(checks):
            delta, upper = 100 * check.delta, 100 * check.upper
            axes.plot([place, place], [delta, upper], color=colours[check.state], linewidth=2)
            axes.plot([place], [delta], "o", color=colours[check.state])
        axes.axhline(100 * budget, color="black", linestyle="--", linewidth=0.8)
        for state in dict.fromkeys(check.state for check in checks):
            axes.plot([], [], "o", color=colours[state], label=state)
        axes.set_xticks(range(len(checks)), [check.period for check in checks], rotation=45, ha="right")
        axes.set_ylabel("growth of normalised entropy (%), bar to its upper end")
        axes.grid(axis="y", alpha=0.25)
        axes.legend(fontsize=8)


def ladder(kind: str, option: str) -> tuple[str, ...]:
    """The options that a unit climbs back through, the costliest first; its own is the last where it is a variant."""
    usual = TABLE_OPTIONS if kind == "table" else LINEAR_OPTIONS
    return usual if option in usual else (REFERENCE, "fp16", option)


def _parsed(kind: str, value: str) -> Any:
    if kind == "float":
        return float(value)
    if kind == "bool":
        return {"True": True, "False": False}[value]
    return tuple(value.split()) if kind.startswith("tuple") else value
