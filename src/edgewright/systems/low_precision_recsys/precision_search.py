"""The search: the cheapest precision of every unit under which the joint model passes the gate.

1. Sensitivities: each unit alone at each option, all else in float.
2. Per unit the options on the lower hull of cost against loss; all their moves in the order of saved / max(loss, eps).
3. Moves are taken while the predicted sum of losses is within the budget, then the joint model is measured: over the
   budget, the list is bisected; under it, the next moves are tried singly.
4. The result is confirmed on data that the search never saw. Where that fails, the unit that contributes most (left out
   one at a time) goes back one option, no unit twice, until it passes; at the end of that stands the float model.

The paper (arXiv 2105.12676) describes layer-wise choices with fallback and gives neither order nor thresholds: both
are ours. Losses do not add up, which is why every accepted result is a measured one.

A measurement depends on the model's weights, the data, the gate (but for its budget), the calibration and the
assignment; the SHA-256 of all that is its file's name. A search that is started again reads what is there, and so do
other processes: under torch.distributed each rank takes its share of a list, with one folder for all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgewright.checks import check, optional, whole
from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import write_text
from edgewright.io.hashing import sha256, tensors_hash
from edgewright.io.json_file import read_object
from edgewright.measure.timing import alternate
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.low_precision_recsys.gate import (
    AccuracyGate,
    Examples,
    Judgement,
    as_examples,
    calibration_batches,
    halves,
    logits,
)
from edgewright.systems.low_precision_recsys.model import QuantRecipe, library_versions, recipe_of
from edgewright.systems.low_precision_recsys.units import (
    LINEAR_OPTIONS,
    REFERENCE,
    TABLE_OPTIONS,
    Histogram,
    Range,
    build,
    correct_biases,
    find_units,
    histograms,
    swapped,
)

Assignment = Mapping[str, str]  # unit -> option; a unit that is missing stays fp32
TIMED = 7  # runs of a unit whose median is its time


class EvaluationCache:
    """A model, what it is judged on, and every measurement that was taken.

    calibration: batches of the model's arguments, for fixed ranges and corrected biases. log: folder of the
    measurements, None to keep them in memory only. ranges: of inputs, unit -> (scale, zero point), where known.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        gate: AccuracyGate,
        calibration: Sequence[tuple[Any, ...]],
        log: str | Path | None = None,
        bias_correction: bool = False,
        ranges: Mapping[str, Range] | None = None,
        built: dict[tuple[str, str], dict[str, nn.Module]] | None = None,
    ) -> None:
        self.model, self.examples, self.gate = model, examples, gate
        self.calibration, self.bias_correction = list(calibration), bias_correction
        self.units = find_units(model)
        self.log = None if log is None else Path(log) / "measurements"
        self._reference: Tensor | None = None
        self.built = {} if built is None else built
        self._seen: dict[str, Any] = {}
        self._given = dict(ranges or {})
        self._ranges = dict(self._given)
        self._histograms: dict[str, Histogram] | None = None
        self._about: list[Any] | None = None

    @classmethod
    def unjudged(cls, model: nn.Module, calibration: Sequence[tuple[Any, ...]]) -> EvaluationCache:
        """A cache that builds and calibrates and has nothing to judge by."""
        return cls(model, Examples(calibration, torch.zeros(1)), AccuracyGate(), calibration)

    @property
    def reference(self) -> Tensor:
        """The float model's logits, float32 [N]."""
        if self._reference is None:
            self._reference = logits(self.model, self.examples)
        return self._reference

    @property
    def histograms(self) -> dict[str, Histogram]:
        """What flows into the linear units during calibration."""
        if self._histograms is None:
            self._histograms = histograms(self.model, self.units, self.calibration)
        return self._histograms

    def range_of(self, unit: str) -> Range:
        """Move and zero point of a unit's input. Raises UsageError for a layer that calibration never ran."""
        if unit not in self._ranges:
            if unit not in self.histograms:
                raise UsageError(f"the calibration batches never reach {unit}; its input has no range")
            self._ranges[unit] = self.histograms[unit].parameters()
        return self._ranges[unit]

    def modules(self, unit: str, option: str) -> dict[str, nn.Module]:
        """The modules of a unit under an option, built once."""
        key = unit, option
        if key not in self.built:
            ranges = self.range_of(unit) if option.startswith("int8-static") else None
            part = build(self.model, self.units[unit], option, ranges)
            if self.bias_correction and self.units[unit].kind == "linear":
                correct_biases(self.model, part, self.calibration)
            self.built[key] = part
        return self.built[key]

    def parts(self, assignment: Assignment) -> list[dict[str, nn.Module]]:
        """The modules of every unit that leaves fp32."""
        return [self.modules(unit, option) for unit, option in self.changed(assignment).items()]

    def changed(self, assignment: Assignment) -> dict[str, str]:
        """The units that leave fp32, in the model's order. Raises UsageError for a unit that it does not have."""
        if unknown := sorted(set(assignment) - set(self.units)):
            raise UsageError(f"the model has no unit {unknown[0]!r}; its units: {', '.join(self.units)}")
        return {name: assignment[name] for name in self.units if assignment.get(name, REFERENCE) != REFERENCE}

    def measure(self, assignment: Assignment) -> Judgement:
        """The model under an assignment beside the float model."""
        changed = self.changed(assignment)

        def take() -> dict[str, Any]:
            with swapped(self.model, *self.parts(changed)):
                found = logits(self.model, self.examples)
            return self.gate.judge(found, self.reference, self.examples).to_dict()

        return Judgement.from_dict(self._kept({"judgement of": changed}, take))

    def passes(self, assignment: Assignment) -> bool:
        """Whether the gate lets the assignment through."""
        return self.gate.passes(self.measure(assignment))

    def milliseconds(self, unit: str, option: str) -> float:
        """Time of a unit's modules on the inputs of the first batch, median of 7; kept like any measurement."""

        def take() -> dict[str, Any]:
            place = self.units[unit].paths[0]
            calls: list[tuple[Any, ...]] = []
            layer = self.model.get_submodule(place)
            handle = layer.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
            try:
                with torch.no_grad():
                    self.model.eval()(*self.examples.batches[0])
            finally:
                handle.remove()
            module = layer if option == REFERENCE else self.modules(unit, option)[place]
            module.eval()
            with torch.no_grad():
                times = alternate({"unit": lambda: [module(*inputs) for inputs in calls]}, TIMED, 2)["unit"]
            return {"milliseconds": 1e3 * median(times.samples)}

        return float(self._kept({"time of": {unit: option}}, take)["milliseconds"])

    def nbytes(self, assignment: Assignment) -> int:
        """Bytes of all units by arithmetic, and of what is no unit as it is."""
        return self.other_bytes + sum(u.nbytes(assignment.get(name, REFERENCE)) for name, u in self.units.items())

    @property
    def other_bytes(self) -> int:
        """Bytes of parameters that belong to no unit; they stay float."""
        mine = {
            id(p)
            for unit in self.units.values()
            for path in unit.paths
            for p in self.model.get_submodule(path).parameters(recurse=False)
        }
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if id(p) not in mine)

    def spread(self, assignments: Sequence[Assignment]) -> None:
        """Measure a list; under torch.distributed with a log folder, each rank its share."""
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and self.log is not None
        rank, world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        for assignment in assignments[rank::world]:
            self.measure(assignment)
        if many:
            dist.barrier()

    def _kept(self, what: dict[str, Any], take: Any) -> dict[str, Any]:
        if self._about is None:
            tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
            batches = Examples(self.calibration, torch.zeros(1)).digest() if self.calibration else ""
            ranges = sorted(self._given.items())
            self._about = [tensors_hash(tensors), self.examples.digest(), self.gate.identity, batches, ranges]
            self._about.append(self.bias_correction)
        key = sha256(json.dumps([self._about, what]))[:40]
        if key not in self._seen:
            path = None if self.log is None else self.log / f"{key}.json"
            if path is not None and path.exists():
                found = read_object(path)
                if found.get("what") != what or not isinstance(found.get("result"), dict):
                    raise FormatError(f"{path} is no measurement of this search; remove it and search again")
                self._seen[key] = found["result"]
            else:
                self._seen[key] = take()
                if path is not None:
                    write_text(path, json.dumps({"what": what, "result": self._seen[key]}, indent=1) + "\n")
        return self._seen[key]


EPS = 1e-7  # a loss below this is noise: such moves are ordered by what they save
CAREFUL = "fp16"  # where the first and the last linear layer begin

Options = Mapping[str, Sequence[str]]  # unit -> options, the costliest first


@dataclass(frozen=True)
class Move:
    """A unit moves to a cheaper option. saved: share of the whole model's cost; loss: what is predicted to be lost."""

    unit: str
    option: str
    saved: float
    loss: float


def moves(
    cache: EvaluationCache,
    options: Options,
    skip: Sequence[str],
    weights: Mapping[str, float],
    say: Callable[[str], None],
) -> list[Move]:
    """All moves in the order in which they are worth taking; a unit's own moves follow one another."""
    losses = sensitivities(cache, options, say)
    whole = {
        "bytes": float(cache.nbytes({})),
        "latency": sum(cache.milliseconds(u, REFERENCE) for u in cache.units) if weights["latency"] else 1.0,
    }

    def cost(unit: str, option: str) -> float:
        total = weights["bytes"] * cache.units[unit].nbytes(option) / whole["bytes"]
        if weights["latency"]:
            total += weights["latency"] * cache.milliseconds(unit, option) / whole["latency"]
        return total

    careful: list[Move] = []
    lines: dict[str, list[Move]] = {}
    for unit, allowed in options.items():
        points = {o: (cost(unit, o), losses[unit, o]) for o in allowed if math.isfinite(losses[unit, o])}
        start = REFERENCE
        if unit in skip and CAREFUL in points and points[CAREFUL][0] < points[REFERENCE][0]:
            saved = points[REFERENCE][0] - points[CAREFUL][0]
            careful.append(Move(unit, CAREFUL, saved, max(points[CAREFUL][1], EPS)))
            start = CAREFUL
        lines[unit] = hull(unit, points, start)
    first = _merged({unit: line for unit, line in lines.items() if unit not in skip})
    return careful + first + _merged({unit: line for unit, line in lines.items() if unit in skip})


def sensitivities(
    cache: EvaluationCache, options: Options, say: Callable[[str], None] = lambda text: None
) -> dict[tuple[str, str], float]:
    """(unit, option) -> loss of that unit alone at that option; infinite where its weights do not allow the option."""
    alone = [(unit, option) for unit, allowed in options.items() for option in allowed if option != REFERENCE]
    broken = set()
    for unit, option in alone:
        try:
            cache.modules(unit, option)
        except UsageError as error:
            broken.add((unit, option))
            say(f"{unit} cannot be {option}: {error}")
    cache.spread([{unit: option} for unit, option in alone if (unit, option) not in broken])
    found = {(unit, REFERENCE): 0.0 for unit in options}
    for unit, option in alone:
        found[unit, option] = math.inf if (unit, option) in broken else cache.measure({unit: option}).delta
    return found


def hull(unit: str, points: Mapping[str, tuple[float, float]], start: str) -> list[Move]:
    """Steps from `start` down the lower hull of (cost, loss): each the best in saved / max(loss, eps), to the cheapest
    option. Options that cost more than another and lose as much are left out.
    """
    line = []
    cost, loss = points[start]
    loss = max(loss, 0.0)
    while cheaper := {option: point for option, point in points.items() if point[0] < cost}:
        option = max(cheaper, key=lambda o: ((cost - cheaper[o][0]) / max(cheaper[o][1] - loss, EPS), -cheaper[o][0]))
        after, lost = cheaper[option]
        line.append(Move(unit, option, cost - after, max(lost - loss, EPS)))
        cost, loss = after, max(lost, loss)
    return line


def _merged(lines: Mapping[str, list[Move]]) -> list[Move]:
    """The moves of all units by what they save for what they lose, each unit's own in their order."""
    waiting = {unit: list(line) for unit, line in lines.items() if line}
    order = []
    while waiting:
        unit = max(waiting, key=lambda name: waiting[name][0].saved / waiting[name][0].loss)
        order.append(waiting[unit].pop(0))
        if not waiting[unit]:
            del waiting[unit]
    return order


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

    Args:
        model: a DLRM, or any module made of Linear, Embedding and EmbeddingBag.
        search_data: labelled clicks that sensitivities and joint models are measured on.
        gate: the rule by which the joint model passes.
        objective: "bytes", "latency" (milliseconds of each unit on this machine), or weights of both.
        log: folder of the measurements; the same call goes on where it was stopped, and ranks of torch.distributed
            share the work through it.
        confirm: data for the last word, by default the later half of `search_data`.
        calibration: batches for fixed ranges, by default the first one of the data.
        options: by kind ("table", "linear") or by unit, the costliest first.
        skip: linear units that begin at fp16 and move after all others, by default the first and the last.
        bias_correction: add the mean of (y - y_q) to the biases.
        tries: moves tried singly at the end, by default as many as there are units.
        say: called with a sentence at every decision.

    Returns:
        A recipe that passed the gate on `confirm`, or that of the float model where none did.

    Raises:
        UsageError: a unit, option or objective that there is not, or no data.
    """
    check("tries", tries, optional(whole(0)))
    weights = _objective(objective)
    tell = say or (lambda text: None)
    if confirm is None:
        searched, last = halves(search_data)
    else:
        searched, last = as_examples(search_data), as_examples(confirm)
    batches = calibration_batches(searched if calibration is None else calibration)
    cache = EvaluationCache(model, searched, gate, batches, log, bias_correction)
    judge = EvaluationCache(model, last, gate, batches, log, bias_correction, built=cache.built)
    allowed = _options(cache, options)
    order = [] if gate.budget == 0 else moves(cache, allowed, _skipped(cache, skip), weights, tell)
    chosen = _affordable(order, gate.budget)
    chosen = _fitted(cache, chosen, tell)
    chosen = _extended(cache, chosen, order, len(cache.units) if tries is None else tries, tell)
    assignment, note = _confirmed(cache, judge, _assignment(chosen), allowed, tell)
    found, last_word = cache.measure(assignment), judge.measure(assignment)
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
        "bytes": cache.nbytes(assignment),
        "bytes_reference": cache.nbytes({}),
        "predicted": sum(move.loss for move in chosen),
    }
    data = {"search": searched.digest(), "confirm": last.digest()}
    return describe(cache, assignment, metrics=metrics, data=data, about=about)


def calibrated_recipe(model: nn.Module, options: Mapping[str, str], calibration: Any) -> QuantRecipe:
    """A recipe without a search: the option of every unit, by kind ("table", "linear") or by name.

    calibration: batches (or clicks) that ranges and stored distributions of inputs are taken from.
    """
    batches = calibration_batches(calibration, batches=1 << 30)
    cache = EvaluationCache.unjudged(model, batches)
    given = dict(options)
    kinds = {kind: given.pop(kind, REFERENCE) for kind in ("table", "linear")}
    chosen = {name: given.pop(name, kinds[unit.kind]) for name, unit in cache.units.items()}
    cache.changed(given)  # names what no unit is called
    return describe(cache, chosen, about={"versions": library_versions()})


def describe(cache: EvaluationCache, assignment: Mapping[str, str], **fields: Any) -> QuantRecipe:
    """A recipe with the digests of what was built, the ranges of static layers and the inputs' distributions."""
    parts = {name: cache.modules(name, option) for name, option in cache.changed(assignment).items()}
    plain = recipe_of(cache.model, cache.units, assignment, parts, bias_correction=cache.bias_correction, **fields)
    units = {}
    for name, choice in plain.units.items():
        if name in cache.histograms:
            seen = cache.histograms[name]
            edges = seen.edges()
            choice = replace(choice, edges=tuple(edges), shares=tuple(seen.shares(edges)))
        if choice.option.startswith("int8-static"):
            choice = replace(choice, range=cache.range_of(name))
        units[name] = choice
    return replace(plain, units=units)


def raise_units(
    cache: EvaluationCache, assignment: Mapping[str, str], options: Options, passes: Callable[[Mapping[str, str]], bool]
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
        cache.spread(list(higher.values()))
        joint = {unit: cache.measure(trial) for unit, trial in higher.items()}
        unit = min(joint, key=lambda name: (joint[name].delta, joint[name].upper))
        current = higher[unit]
        raised.append(unit)
    return current, raised


def _confirmed(
    cache: EvaluationCache,
    judge: EvaluationCache,
    assignment: dict[str, str],
    options: Options,
    say: Callable[[str], None],
) -> tuple[dict[str, str], str]:
    found, raised = raise_units(cache, assignment, options, judge.passes)
    if raised:
        say(f"not confirmed at first: raised {', '.join(raised)}")
    if judge.passes(found):
        return found, f"raised at confirmation: {', '.join(raised)}" if raised else ""
    return {}, "no quantised model was confirmed; all units stay float"


def _affordable(order: Sequence[Move], budget: float) -> list[Move]:
    """Steps in order as long as their losses sum to the budget; a unit that is too dear stops there."""
    chosen, stopped, total = list[Move](), set[str](), 0.0
    for move in order:
        if move.unit in stopped or total + move.loss > budget:
            stopped.add(move.unit)
        else:
            chosen.append(move)
            total += move.loss
    return chosen


def _fitted(cache: EvaluationCache, chosen: list[Move], say: Callable[[str], None]) -> list[Move]:
    """All of the list where the joint model passes, else the longest start that bisection finds to pass."""
    if not chosen or cache.passes(_assignment(chosen)):
        return chosen
    low, high = 0, len(chosen)  # the start of length low passes, that of length high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cache.passes(_assignment(chosen[:middle])) else (low, middle)
    say(f"the predicted losses did not add up: {low} of {len(chosen)} moves kept")
    return chosen[:low]


def _extended(
    cache: EvaluationCache, chosen: list[Move], order: Sequence[Move], tries: int, say: Callable[[str], None]
) -> list[Move]:
    taken, stopped = set(chosen), set[str]()
    for move in order:
        if move in taken or move.unit in stopped:
            continue
        if tries <= 0:
            break
        tries -= 1
        if cache.passes(_assignment([*chosen, move])):
            chosen = [*chosen, move]
            say(f"{move.unit} also fits at {move.option}")
        else:
            stopped.add(move.unit)
    return chosen


def _assignment(chosen: Sequence[Move]) -> dict[str, str]:
    return {move.unit: move.option for move in chosen}  # the last move of a unit stands


def _objective(objective: str | Mapping[str, float]) -> dict[str, float]:
    found = {objective: 1.0} if isinstance(objective, str) else dict(objective)
    if not found or set(found) - set(OBJECTIVES) or min(found.values()) < 0 or not sum(found.values()):
        raise UsageError(
            f"objective={objective!r}: 'bytes', 'latency' or weights such as {{'bytes': 1, 'latency': 0.5}}"
        )
    return {name: float(found.get(name, 0.0)) for name in OBJECTIVES}


def _skipped(cache: EvaluationCache, skip: Sequence[str] | None) -> tuple[str, ...]:
    linear = [name for name, unit in cache.units.items() if unit.kind == "linear"]
    if skip is None:
        return tuple(dict.fromkeys((linear[0], linear[-1]))) if linear else ()
    cache.changed(dict.fromkeys(skip, CAREFUL))
    return tuple(skip)


def _options(cache: EvaluationCache, options: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    given = dict(options or {})
    kinds = {"table": given.pop("table", TABLE_OPTIONS), "linear": given.pop("linear", LINEAR_OPTIONS)}
    cache.changed({name: REFERENCE for name in given})
    found = {}
    for name, unit in cache.units.items():
        allowed = tuple(given.get(name, kinds[unit.kind]))
        for option in allowed:
            unit.check(option)
        found[name] = allowed if allowed and allowed[0] == REFERENCE else (REFERENCE, *allowed)
    return found
