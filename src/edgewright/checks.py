"""Rules for values that a caller gives, and the one sentence for a value that breaks its rule.

check("rank", rank, whole(1))
check_fields(self, {"steps": whole(1), "schedule": one_of(*SCHEDULES), "limit": optional(number(above=0))})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgewright.errors import UsageError


@dataclass(frozen=True)
class Allowed:
    """A rule. words: what is allowed, behind "it must be"; holds: whether a value of any type keeps to it."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*values: object) -> Allowed:
    """One of the values named; True is not 1."""
    names = ", ".join(str(value) for value in values)
    return Allowed(f"one of {names}", lambda value: any(type(value) is type(one) and value == one for one in values))


def whole(least: int, most: int | None = None) -> Allowed:
    """An int from `least` to `most`, both included; no bool."""
    words = f"a whole number from {least} {'up' if most is None else f'to {most}'}"
    top = math.inf if most is None else most
    return Allowed(
        words, lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= top
    )


def number(
    least: float | None = None, most: float | None = None, *, above: float | None = None, below: float | None = None
) -> Allowed:
    """A finite int or float between the bounds given: `least` and `most` included, `above` and `below` not."""
    bounds = (("at least", least), ("above", above), ("at most", most), ("below", below))
    words = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    if least is not None and most is not None:
        words = f"from {least:g} to {most:g}"

    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (
            (least is None or value >= least)
            and (most is None or value <= most)
            and (above is None or value > above)
            and (below is None or value < below)
        )

    return Allowed(f"a number {words}".rstrip(), holds)


def optional(rule: Allowed) -> Allowed:
    """None as well."""
    return Allowed(f"{rule.words}, or None", lambda value: value is None or rule.holds(value))


def check(name: str, value: Any, rule: Allowed, hint: str = "") -> None:
    """Hold one value against its rule.

    Args:
        name: what the caller calls it, as in "MoEConfig top_k".
        value: of any type.
        rule: what is allowed.
        hint: a value that works, or the way out.

    Raises:
        UsageError: the value breaks the rule.
    """
    if not rule.holds(value):
        raise UsageError(f"{name}={value!r:.80}; it must be {rule.words}{f'; {hint}' if hint else ''}")


def check_fields(holder: object, rules: Mapping[str, Allowed]) -> None:
    """Hold attributes of an object, mostly those of a dataclass, against rules by their names.

    Raises:
        UsageError: the first that breaks its rule, under the name of its class.
    """
    for name, rule in rules.items():
        check(f"{type(holder).__name__} {name}", getattr(holder, name), rule)
