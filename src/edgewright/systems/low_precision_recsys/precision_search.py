"""The search: the cheapest precision of every unit under which the joint model passes the gate.

1. Sensitivities: each unit alone at each option, all else in float.
2. Per unit the options on the lower hull of cost against loss; all their steps in the order of saved / max(loss, eps).
3. Steps are taken while the predicted sum of losses is within the budget, then the joint model is measured: over the
   budget, the list is bisected; under it, the next steps are tried singly.
4. The result is confirmed on data that the search never saw. Where that fails, the unit that contributes most (left out
   one at a time) goes back one option, no unit twice, until it passes; at the end of that stands the float model.

The paper (arXiv 2105.12676) describes layer-wise choices with fallback and gives neither order nor thresholds: both
are ours. Losses do not add up, which is why every accepted result is a measured one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from edgewright.errors import UsageError
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.low_precision_recsys.examples import Examples, as_examples, calibration_batches, halves
from edgewright.systems.low_precision_recsys.gate import AccuracyGate
from edgewright.systems.low_precision_recsys.measurements import Bench
from edgewright.systems.low_precision_recsys.model import QuantRecipe, library_versions, recipe_of
from edgewright.systems.low_precision_recsys.moves import CAREFUL, Options, Step, steps
from edgewright.systems.low_precision_recsys.units import LINEAR_OPTIONS, REFERENCE, TABLE_OPTIONS

OBJECTIVES = ("bytes", "latency")


def search(
    model: nn.Module,
    search_data: ClickData | Examples,
    gate: AccuracyGate,
    objective: str | Mapping[str, float] = "bytes",
    log: str | Path | None = None,
    *,
    confirm: ClickData | Examples | None = None,
    calibration: Any = None,
    options: Mapping[str, Sequence[str]] | None = None,
    skip: Sequence[str] | None = None,
    bias_correction: bool = False,
    tries: int | None = None,
    say: Callable[[str], None] | None = None,
) -> QuantRecipe:
    """The recipe of a trained model (left as it is) under the gate's budget.

    objective: "bytes", "latency" (milliseconds of each unit here), or weights of both. log: a folder; the same call
    goes on where it was stopped, and torch.distributed ranks share the work through it. confirm: data for the last
    word, by default the later half of `search_data`. calibration: batches for fixed ranges, by default the first one.
    options: by kind ("table", "linear") or by unit, the costliest first. skip: linear units that begin at fp16 and are
    moved after all others, by default the first and the last. tries: steps tried singly at the end, by default as many
    as there are units.
    """
    weights = _objective(objective)
    tell = say or (lambda text: None)
    if confirm is None:
        searched, last = halves(search_data)
    else:
        searched, last = as_examples(search_data), as_examples(confirm)
    batches = calibration_batches(searched if calibration is None else calibration)
    bench = Bench(model, searched, gate, batches, log, bias_correction)
    judge = Bench(model, last, gate, batches, log, bias_correction, built=bench.built)
    allowed = _options(bench, options)
    order = [] if gate.budget == 0 else steps(bench, allowed, _skipped(bench, skip), weights, tell)
    chosen = _affordable(order, gate.budget)
    chosen = _fitted(bench, chosen, tell)
    chosen = _extended(bench, chosen, order, len(bench.units) if tries is None else tries, tell)
    assignment, note = _confirmed(bench, judge, _assignment(chosen), allowed, tell)
    found, last_word = bench.measure(assignment), judge.measure(assignment)
    notes = [note] if note else []
    about = {
        "gate": {"metric": gate.metric, "budget": gate.budget, "ci": gate.ci, "resamples": gate.resamples},
        "objective": dict(weights),
        "versions": library_versions(),
        "notes": notes,
    }
    metrics = {
        "search": found.to_dict(),
        "confirm": last_word.to_dict(),
        "bytes": bench.nbytes(assignment),
        "bytes_reference": bench.nbytes({}),
        "predicted": sum(step.loss for step in chosen),
    }
    data = {"search": searched.digest(), "confirm": last.digest()}
    return describe(bench, assignment, metrics=metrics, data=data, about=about)


def calibrated_recipe(model: nn.Module, options: Mapping[str, str], calibration: Any) -> QuantRecipe:
    """A recipe without a search: the option of every unit, by kind ("table", "linear") or by name.

    calibration: batches (or clicks) that ranges and stored distributions of inputs are taken from.
    """
    batches = calibration_batches(calibration, batches=1 << 30)
    bench = Bench.unjudged(model, batches)
    given = dict(options)
    kinds = {kind: given.pop(kind, REFERENCE) for kind in ("table", "linear")}
    chosen = {name: given.pop(name, kinds[unit.kind]) for name, unit in bench.units.items()}
    bench.changed(given)  # names what no unit is called
    return describe(bench, chosen, about={"versions": library_versions()})


def describe(bench: Bench, assignment: Mapping[str, str], **fields: Any) -> QuantRecipe:
    """A recipe with the digests of what was built, the ranges of static layers and the inputs' distributions."""
    parts = {name: bench.modules(name, option) for name, option in bench.changed(assignment).items()}
    plain = recipe_of(bench.model, bench.units, assignment, parts, bias_correction=bench.bias_correction, **fields)
    units = {}
    for name, choice in plain.units.items():
        if name in bench.histograms:
            seen = bench.histograms[name]
            edges = seen.edges()
            choice = replace(choice, edges=tuple(edges), shares=tuple(seen.shares(edges)))
        if choice.option.startswith("int8-static"):
            choice = replace(choice, range=bench.range_of(name))
        units[name] = choice
    return replace(plain, units=units)


def raise_units(
    bench: Bench, assignment: Mapping[str, str], options: Options, passes: Callable[[Mapping[str, str]], bool]
) -> tuple[dict[str, str], list[str]]:
    """Fallback: while it does not pass, the unit whose raising by one option helps most is raised, none twice.

    Returns the assignment, which may still not pass, and the raised units in their order.
    """
    current, raised = dict(assignment), list[str]()
    while not passes(current):
        higher: dict[str, dict[str, str]] = {}
        for unit, allowed in options.items():
            option = current.get(unit, REFERENCE)
            if option != REFERENCE and unit not in raised:
                higher[unit] = {**current, unit: allowed[allowed.index(option) - 1]}
        if not higher:
            break
        bench.spread(list(higher.values()))
        joint = {unit: bench.measure(trial) for unit, trial in higher.items()}
        unit = min(joint, key=lambda name: (joint[name].delta, joint[name].upper))
        current = higher[unit]
        raised.append(unit)
    return current, raised


def _confirmed(
    bench: Bench, judge: Bench, assignment: dict[str, str], options: Options, say: Callable[[str], None]
) -> tuple[dict[str, str], str]:
    found, raised = raise_units(bench, assignment, options, judge.passes)
    if raised:
        say(f"not confirmed at first: raised {', '.join(raised)}")
    if judge.passes(found):
        return found, f"raised at confirmation: {', '.join(raised)}" if raised else ""
    return {}, "no quantised model was confirmed; all units stay float"


def _affordable(order: Sequence[Step], budget: float) -> list[Step]:
    """Steps in order as long as their losses sum to the budget; a unit that is too dear stops there."""
    chosen, stopped, total = list[Step](), set[str](), 0.0
    for step in order:
        if step.unit in stopped or total + step.loss > budget:
            stopped.add(step.unit)
        else:
            chosen.append(step)
            total += step.loss
    return chosen


def _fitted(bench: Bench, chosen: list[Step], say: Callable[[str], None]) -> list[Step]:
    """All of the list where the joint model passes, else the longest start that bisection finds to pass."""
    if not chosen or bench.passes(_assignment(chosen)):
        return chosen
    low, high = 0, len(chosen)  # the start of length low passes, that of length high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bench.passes(_assignment(chosen[:middle])) else (low, middle)
    say(f"the predicted losses did not add up: {low} of {len(chosen)} steps kept")
    return chosen[:low]


def _extended(
    bench: Bench, chosen: list[Step], order: Sequence[Step], tries: int, say: Callable[[str], None]
) -> list[Step]:
    taken, stopped = set(chosen), set[str]()
    for step in order:
        if step in taken or step.unit in stopped:
            continue
        if tries <= 0:
            break
        tries -= 1
        if bench.passes(_assignment([*chosen, step])):
            chosen = [*chosen, step]
            say(f"{step.unit} also fits at {step.option}")
        else:
            stopped.add(step.unit)
    return chosen


def _assignment(chosen: Sequence[Step]) -> dict[str, str]:
    return {step.unit: step.option for step in chosen}  # the last step of a unit stands


def _objective(objective: str | Mapping[str, float]) -> dict[str, float]:
    found = {objective: 1.0} if isinstance(objective, str) else dict(objective)
    if not found or set(found) - set(OBJECTIVES) or min(found.values()) < 0 or not sum(found.values()):
        raise UsageError(
            f"objective={objective!r}: 'bytes', 'latency' or weights such as {{'bytes': 1, 'latency': 0.5}}"
        )
    return {name: float(found.get(name, 0.0)) for name in OBJECTIVES}


def _skipped(bench: Bench, skip: Sequence[str] | None) -> tuple[str, ...]:
    linear = [name for name, unit in bench.units.items() if unit.kind == "linear"]
    if skip is None:
        return tuple(dict.fromkeys((linear[0], linear[-1]))) if linear else ()
    bench.changed(dict.fromkeys(skip, CAREFUL))
    return tuple(skip)


def _options(bench: Bench, options: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    given = dict(options or {})
    kinds = {"table": given.pop("table", TABLE_OPTIONS), "linear": given.pop("linear", LINEAR_OPTIONS)}
    bench.changed({name: REFERENCE for name in given})
    found = {}
    for name, unit in bench.units.items():
        allowed = tuple(given.get(name, kinds[unit.kind]))
        for option in allowed:
            unit.check(option)
        found[name] = allowed if allowed and allowed[0] == REFERENCE else (REFERENCE, *allowed)
    return found
