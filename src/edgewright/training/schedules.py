"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgewright.errors import UsageError

Schedule = str | Callable[[int, int], float]  # a name from SHAPES, or f(step, steps) -> multiplier

SHAPES: dict[str, Callable[[float], float]] = {  # progress in [0, 1) after the warm-up -> multiplier
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
    "cosine-10": lambda progress: 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)),
    "linear-10": lambda progress: 1.0 - 0.9 * progress,
    "constant-decay": lambda progress: min(1.0, (1.0 - progress) / DECAY),
}
DECAY = 0.2  # the part of a "constant-decay" run in which the rate falls


def check_schedule(schedule: Schedule) -> None:
    """Raise UsageError unless `schedule` is a known name or a function."""
    if not callable(schedule) and schedule not in SHAPES:
        raise UsageError(
            f"schedule={schedule!r} is unknown; use {', '.join(SHAPES)} or a function (step, steps) -> multiplier"
        )


def learning_rate_scale(schedule: Schedule, step: int, steps: int, warmup_steps: int = 0) -> float:
    """Multiplier of the base learning rate for update number `step` (0 .. steps - 1).

    Warm-up rises as (step + 1) / (warmup_steps + 1), so no update is spent at rate 0 and only the first one after
    the warm-up runs at the full rate. After it "cosine" and "linear" fall towards 0, "cosine-10" and "linear-10"
    towards a tenth, which they would reach at `step == steps`; "constant-decay" holds the rate and lets it fall
    linearly to 0 in the last fifth. A function replaces the shape and gets the step within what is left after the
    warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done, length = step - warmup_steps, steps - warmup_steps
    return float(schedule(done, length)) if callable(schedule) else SHAPES[schedule](done / length)


def schedule_name(schedule: Schedule) -> str:
    """The name under which a checkpoint records the schedule."""
    if isinstance(schedule, str):
        return schedule
    return f"{getattr(schedule, '__module__', '')}.{getattr(schedule, '__qualname__', type(schedule).__qualname__)}"
