"""Steps of a search: what each unit loses alone at each option, and in which order cheaper options are worth taking."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgewright.errors import UsageError
from edgewright.systems.low_precision_recsys.measurements import Bench
from edgewright.systems.low_precision_recsys.units import REFERENCE

EPS = 1e-7  # a loss below this is noise: such steps are ordered by what they save
CAREFUL = "fp16"  # where the first and the last linear layer begin

Options = Mapping[str, Sequence[str]]  # unit -> options, the costliest first


@dataclass(frozen=True)
class Step:
    """A unit moves to a cheaper option. saved: share of the whole model's cost; loss: what is predicted to be lost."""

    unit: str
    option: str
    saved: float
    loss: float


def steps(
    bench: Bench, options: Options, skip: Sequence[str], weights: Mapping[str, float], say: Callable[[str], None]
) -> list[Step]:
    """All steps in the order in which they are worth taking; a unit's own steps follow one another."""
    losses = sensitivities(bench, options, say)
    whole = {
        "bytes": float(bench.nbytes({})),
        "latency": sum(bench.milliseconds(u, REFERENCE) for u in bench.units) if weights["latency"] else 1.0,
    }

    def cost(unit: str, option: str) -> float:
        total = weights["bytes"] * bench.units[unit].nbytes(option) / whole["bytes"]
        if weights["latency"]:
            total += weights["latency"] * bench.milliseconds(unit, option) / whole["latency"]
        return total

    careful: list[Step] = []
    lines: dict[str, list[Step]] = {}
    for unit, allowed in options.items():
        points = {o: (cost(unit, o), losses[unit, o]) for o in allowed if math.isfinite(losses[unit, o])}
        start = REFERENCE
        if unit in skip and CAREFUL in points and points[CAREFUL][0] < points[REFERENCE][0]:
            saved = points[REFERENCE][0] - points[CAREFUL][0]
            careful.append(Step(unit, CAREFUL, saved, max(points[CAREFUL][1], EPS)))
            start = CAREFUL
        lines[unit] = hull(unit, points, start)
    first = _merged({unit: line for unit, line in lines.items() if unit not in skip})
    return careful + first + _merged({unit: line for unit, line in lines.items() if unit in skip})


def sensitivities(
    bench: Bench, options: Options, say: Callable[[str], None] = lambda text: None
) -> dict[tuple[str, str], float]:
    """(unit, option) -> loss of that unit alone at that option; infinite where its weights do not allow the option."""
    alone = [(unit, option) for unit, allowed in options.items() for option in allowed if option != REFERENCE]
    broken = set()
    for unit, option in alone:
        try:
            bench.modules(unit, option)
        except UsageError as error:
            broken.add((unit, option))
            say(f"{unit} cannot be {option}: {error}")
    bench.spread([{unit: option} for unit, option in alone if (unit, option) not in broken])
    found = {(unit, REFERENCE): 0.0 for unit in options}
    for unit, option in alone:
        found[unit, option] = math.inf if (unit, option) in broken else bench.measure({unit: option}).delta
    return found


def hull(unit: str, points: Mapping[str, tuple[float, float]], start: str) -> list[Step]:
    """Steps from `start` down the lower hull of (cost, loss): each the best in saved / max(loss, eps), to the cheapest
    option. Options that cost more than another and lose as much are left out.
    """
    line = []
    cost, loss = points[start]
    loss = max(loss, 0.0)
    while cheaper := {option: point for option, point in points.items() if point[0] < cost}:
        option = max(cheaper, key=lambda o: ((cost - cheaper[o][0]) / max(cheaper[o][1] - loss, EPS), -cheaper[o][0]))
        after, lost = cheaper[option]
        line.append(Step(unit, option, cost - after, max(lost - loss, EPS)))
        cost, loss = after, max(lost, loss)
    return line


def _merged(lines: Mapping[str, list[Step]]) -> list[Step]:
    """The steps of all units by what they save for what they lose, each unit's own in their order."""
    waiting = {unit: list(line) for unit, line in lines.items() if line}
    order = []
    while waiting:
        unit = max(waiting, key=lambda name: waiting[name][0].saved / waiting[name][0].loss)
        order.append(waiting[unit].pop(0))
        if not waiting[unit]:
            del waiting[unit]
    return order
