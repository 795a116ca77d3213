"""Which rows the next checkpoint holds: all of them, those since the last full one, or those since the last one.

    full          every checkpoint is whole
    one-shot      one full, then every row changed since it: restore = full + latest
    consecutive   one full, then every row changed since the last checkpoint: restore = full + all in order
    intermittent  one-shot, with a new full one when that is the cheaper future (the predictor below)

Sizes S are shares of a full checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from edgewright.errors import UsageError

Policy = Literal["full", "one-shot", "consecutive", "intermittent"]
POLICIES = ("full", "one-shot", "consecutive", "intermittent")


def check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise UsageError(f"policy={policy!r}; use one of {', '.join(POLICIES)}")


def full_is_due(sizes: Sequence[float]) -> bool:
    """The predictor of the intermittent policy, after the differences of sizes S_1 .. S_i since the last full one.

    F = 1 + S_1 + ... + S_i is what the same history costs again when it begins with a full one, I = (i + 1) S_i the
    least that going on costs. F <= I: the next checkpoint is full.
    """
    return bool(sizes) and 1.0 + sum(sizes) <= (len(sizes) + 1) * sizes[-1]


def next_kind(policy: Policy, based: bool, sizes: Sequence[float]) -> Literal["full", "diff"]:
    """Kind of the next checkpoint. based: whether there is a full one to build upon; sizes: see `full_is_due`."""
    if policy == "full" or not based:
        return "full"
    return "full" if policy == "intermittent" and full_is_due(sizes) else "diff"
