"""The numeric debugger, which ranks modules by what they lose; and the monitor of a recipe over refreshed models.

    SQNR = 10 log10(||y||^2 / ||y - y_q||^2)   in dB

Debugger: both models run on the same batch. Local error: the low-precision module gets the reference's own input.
Accumulated error: what it gives inside the low-precision model, where its input is already wrong. Modules are ranked by
what each of them alone, in the float model, does to the output: a table whose extremes nothing reads has a fine SQNR of
its own and still ruins the model.

Monitor: a ranking model is refreshed every period. Each check quantises the new weights by the stored recipe and judges
them on new data:

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
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import write_text
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.quantization.static.sqnr import sqnr
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.dlrm.model import QREmbeddingBag
from edgewright.systems.low_precision_recsys.gate import AccuracyGate, Examples, Judgement, as_examples
from edgewright.systems.low_precision_recsys.model import QuantizedModel, QuantRecipe
from edgewright.systems.low_precision_recsys.precision_search import EvaluationCache, describe, raise_units
from edgewright.systems.low_precision_recsys.tables import (
    Float16Rows,
    RowwiseQuantEmbedding,
    RowwiseQuantEmbeddingBag,
    RowwiseQuantQRBag,
    StoredRows,
)
from edgewright.systems.low_precision_recsys.units import (
    LINEAR_OPTIONS,
    REFERENCE,
    TABLE_OPTIONS,
    HalfLinear,
    Int8Linear,
    RowsLinear,
    hooked,
    population_stability,
    swapped,
)

_LOW = (RowwiseQuantEmbedding, RowwiseQuantEmbeddingBag, RowwiseQuantQRBag, Int8Linear, HalfLinear, RowsLinear)


@dataclass(frozen=True)
class ModuleError:
    """One module. output: SQNR in dB of the model's output with this module alone at low precision.

    local and accumulated: SQNR of the module's own output; max_error: the largest local difference.

    saturation: share of values beyond the range that they are stored in: inputs of a static layer, rows of a table.
    """

    name: str
    kind: str
    output: float
    local: float
    accumulated: float
    max_error: float
    saturation: float


@dataclass(frozen=True)
class Comparison:
    """modules: the worst first, by what they do to the output. output: SQNR of the whole model's output."""

    modules: tuple[ModuleError, ...]
    output: float

    def table(self) -> str:
        """The ranking as text, a module a line."""
        header, lines = self.report().table()
        widths = [max(len(row[i]) for row in (header, *lines)) for i in range(len(header))]

        def line(row: list[str]) -> str:
            numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            return "  ".join([row[0].ljust(widths[0]), *numbers])

        return "\n".join(line(row) for row in (header, *lines))

    def report(self) -> Report:
        """The same as a Report."""
        report = Report("low-precision modules, the worst first")
        for found in self.modules:
            subject = f"{found.name} ({found.kind})"
            report.add("output_sqnr", found.output, subject=subject, unit="dB")
            report.add("local_sqnr", found.local, subject=subject, unit="dB")
            report.add("accumulated_sqnr", found.accumulated, subject=subject, unit="dB")
            report.add("max_error", found.max_error, subject=subject)
            report.add("saturation", 100 * found.saturation, subject=subject, unit="%")
        return report


@torch.no_grad()
def compare_numerics(model: nn.Module, quantized: nn.Module, batch: Any) -> Comparison:
    """A float model beside its low-precision copy on one batch.

    Args:
        model: the float model.
        quantized: what `apply_recipe` made of it.
        batch: a tuple of the model's arguments, or ClickData or Examples, of which the first batch is taken.

    Returns:
        Every module's SQNR in dB, largest error and saturation, the worst first; `.table()` is the ranking as text.

    Raises:
        UsageError: the copy has no low-precision module.
    """
    if isinstance(batch, ClickData | Examples):
        batch = as_examples(batch).batches[0]
    arguments = batch if isinstance(batch, tuple) else (batch,)
    copy = quantized.module if isinstance(quantized, QuantizedModel) else quantized
    low = {name: m for name, m in copy.named_modules() if isinstance(m, _LOW)}
    if not low:
        raise UsageError("the second model has no low-precision module; give what apply_recipe returned")
    calls: dict[str, list[tuple[tuple[Any, ...], Tensor]]] = {name: [] for name in low}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: calls[name].append((inputs, output))
        )
        for name in low
    ]
    was = model.training, copy.training
    try:
        clean = model.eval()(*arguments).float()
    finally:
        for handle in handles:
            handle.remove()
    chain: dict[str, list[Tensor]] = {name: [] for name in low}
    with hooked(copy, low, lambda name, module, x, y: chain[name].append(y)):
        noisy = copy.eval()(*arguments)
    found = []
    for name, module in low.items():
        if not calls[name]:
            continue
        wanted = torch.cat([y.reshape(-1) for _, y in calls[name]])
        alone = torch.cat([module(*inputs).reshape(-1) for inputs, _ in calls[name]])
        found.append(
            ModuleError(
                name,
                _kind(module),
                float(sqnr(clean, _alone(model, name, module, arguments))),
                float(sqnr(wanted, alone)),
                float(sqnr(wanted, torch.cat([y.reshape(-1) for y in chain[name]]))),
                float((wanted - alone).abs().max()) if len(wanted) else 0.0,
                _saturation(model.get_submodule(name), module, [inputs[0] for inputs, _ in calls[name]]),
            )
        )
    model.train(was[0])
    copy.train(was[1])
    found.sort(key=lambda m: (-math.inf if math.isnan(m.output) else m.output, m.local, m.name))
    return Comparison(tuple(found), float(sqnr(clean, noisy.float())))


def _alone(model: nn.Module, name: str, module: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    with swapped(model, {name: module}):
        output: Tensor = model(*arguments)
    return output.float()


def _saturation(original: nn.Module, module: nn.Module, inputs: list[Tensor]) -> float:
    if isinstance(module, Int8Linear):
        shares = [(module.saturation(x), x.numel()) for x in inputs]
        return sum(share * count for share, count in shares) / max(sum(count for _, count in shares), 1)
    if isinstance(module, HalfLinear):
        return float(module.weight.isinf().float().mean())
    pairs: Mapping[StoredRows, Any]
    if isinstance(original, QREmbeddingBag) and isinstance(module, RowwiseQuantQRBag):
        pairs = {module.quotient: original.quotient, module.remainder: original.remainder}
    else:
        pairs = {module.stored: original.weight}  # type: ignore[dict-item]
    cut = sum(_cut(stored, weight.detach().float()) for stored, weight in pairs.items())
    return cut / max(sum(weight.numel() for weight in pairs.values()), 1)


def _cut(stored: StoredRows, weight: Tensor) -> int:
    """How many values lie more than half a level beyond the least or greatest value of their stored row."""
    if isinstance(stored.rows, Float16Rows):
        return int(stored.packed.isinf().sum())
    low, high = stored.weight.aminmax(dim=1, keepdim=True)
    slack = (high - low) / (2 * (2**stored.bits - 1)) + 1e-6 * weight.abs().amax(1, keepdim=True)
    return int(((weight < low - slack) | (weight > high + slack)).sum())


def _kind(module: nn.Module) -> str:
    if isinstance(module, Int8Linear):
        return "int8 " + ("dynamic" if module.step is None else "static")
    if isinstance(module, HalfLinear):
        return str(module.weight.dtype).removeprefix("torch.")
    stored: Any = module.quotient if isinstance(module, RowwiseQuantQRBag) else module.stored
    return f"{stored.bits}-bit rows"


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

    Args:
        recipe: what the model of the first period was searched to.
        gate: the rule by which every period is judged.
        store: folder of the recipe of today, history.csv and history.png; a new Monitor on the same folder and with the
            same recipe goes on from there.
        psi_warn: population-stability index above which an input counts as moved; 0.2 is the customary limit.
        batches: how many of the data's batches calibrate.
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

        `self.recipe` is afterwards the one to apply, unless the state is BLOCKED.

        Args:
            model: the float model of the period.
            data: labelled clicks of the period.
            period: its name in the history, by default its number.

        Returns:
            The state reached, its loss and interval, and the drift of inputs.

        Raises:
            UsageError: a model of another architecture.
        """
        self.recipe.check(model, refreshed=True)
        examples = as_examples(data)
        calibration = list(examples.batches[: self.batches])
        choices = self.recipe.units
        ranges = {name: choice.range for name, choice in choices.items() if choice.range is not None}
        cache = EvaluationCache(model, examples, self.gate, calibration, None, self.recipe.bias_correction, ranges)
        drift = {
            name: population_stability(choice.shares, cache.histograms[name].shares(choice.edges))
            for name, choice in choices.items()
            if choice.edges and name in cache.histograms
        }
        state, raised, assignment = "OK", list[str](), dict(self.recipe.assignment)
        stale = any(drift.get(name, 0.0) > self.psi_warn for name in ranges)
        if stale or not cache.passes(assignment):
            if ranges:
                state = "RECALIBRATED"
                reused = {key: part for key, part in cache.built.items() if not key[1].startswith("int8-static")}
                correct = self.recipe.bias_correction
                cache = EvaluationCache(model, examples, self.gate, calibration, None, correct, built=reused)
            if not cache.passes(assignment):
                options = {name: ladder(choice.kind, choice.option) for name, choice in choices.items()}
                assignment, raised = raise_units(cache, assignment, options, cache.passes)
                state = "FALLBACK" if cache.passes(assignment) else "BLOCKED"
        if state in ("RECALIBRATED", "FALLBACK"):
            kept = self.recipe
            found = describe(cache, assignment, metrics=kept.metrics, data=kept.data, about=kept.about)
            self.recipe = replace(found, bias_correction=kept.bias_correction)
            self.recipe.save(self.store / RECIPE)
        return self._record(cache, state, cache.measure(assignment), drift, raised, assignment, period)

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
        cache: EvaluationCache,
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
            share=cache.nbytes(assignment) / cache.nbytes({}),
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
