"""Settings of a checkpointer and their rules: how many bits a row gets, which rows a checkpoint holds.

Bits (arXiv 2010.08679, section on L): every restore replaces float32 rows by their quantised values once; L = expected
restores says how much of that a job will live through. L <= 1: 2 bits, L <= 3: 3 bits, L < 20: 4 bits, otherwise 8.
Once more restores have happened than were expected, every later checkpoint has 8.

Policies, sizes S being shares of a full checkpoint:
    full          every checkpoint is whole
    one-shot      one full, then every row changed since it: restore = full + latest
    consecutive   one full, then every row changed since the last checkpoint: restore = full + all in order
    intermittent  one-shot, with a new full one when that is the cheaper future (`full_is_due`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgewright.errors import UsageError
from edgewright.io.row_codes import ROW_BITS

Bits = Literal[2, 3, 4, 8, "auto", "none"]
METHODS = ("adaptive", "minmax", "symmetric")


def check_bits(bits: object) -> None:
    """Raise UsageError unless `bits` is 2, 3, 4, 8, "auto" or "none"."""
    # True == 1 and 4.0 == 4 in Python; neither is a number of bits
    if not (type(bits) is int and bits in ROW_BITS) and bits not in ("auto", "none"):
        raise UsageError(f"bits={bits!r}; rows are stored at 2, 3, 4 or 8 bits, by the rule 'auto', or 'none' (float)")


def bits_for(expected_restores: float) -> int:
    """Bits for L expected restores. Raises UsageError for a negative number or NaN."""
    if not expected_restores >= 0:
        raise UsageError(f"expected_restores={expected_restores}: it is job length x failure rate, at least 0")
    return 2 if expected_restores <= 1 else 3 if expected_restores <= 3 else 4 if expected_restores < 20 else 8


def stored_bits(bits: Bits, expected: float, happened: int) -> int | None:
    """Bits of the next checkpoint, None for plain float rows. happened: restores in this job's history so far."""
    check_bits(bits)
    if bits == "none":
        return None
    if happened > expected:
        return 8
    return bits_for(expected) if bits == "auto" else int(bits)


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


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint holds, and when and how it is written (arXiv 2010.08679, sections 4 and 5).

    Args:
        policy: which rows a checkpoint holds, see the module.
        bits: of a stored row: 2, 3, 4, 8, "auto" (by `expected_restores`) or "none" (float).
        expected_restores: L, how often the job is expected to be restored.
        method: range of a row's codes: "adaptive" (greedy search; 8 bits always have the whole range), "minmax" or
            "symmetric".
        nbins: steps of the adaptive search; None: tuned on a sample.
        ratio: share of the range that the search may cut; None: tuned on a sample.
        optimizer_bits: 8 packs the optimizer's rows too.
        every_steps: steps between checkpoints that `step` writes; 0: never by that.
        every_seconds: the same by the clock.
        keep: restorable checkpoints that are kept, with what they build upon.
        on_busy: a checkpoint that is due while the one before is still being written waits for it, or is skipped and
            counted.
        executor: "thread" or "process", where rows are quantised and written.
        verify_untracked: hash all rows at each snapshot and refuse when one changed unseen (slow).
        dense_tables: tables whose optimizer moves every row are refused, or ("full") stored whole each time.
        timeout_seconds: how long processes wait for each other.
        seed: of the sample on which ranges are tuned.

    Raises:
        UsageError: a value that is out of range.
    """

    policy: Policy = "intermittent"
    bits: Bits = "auto"
    expected_restores: float = 1.0
    method: Literal["adaptive", "minmax", "symmetric"] = "adaptive"
    nbins: int | None = None
    ratio: float | None = None
    optimizer_bits: Literal[8, "none"] = "none"
    every_steps: int = 0
    every_seconds: float = 0.0
    keep: int = 2
    on_busy: Literal["wait", "skip"] = "wait"
    executor: Literal["thread", "process"] = "thread"
    verify_untracked: bool = False
    dense_tables: Literal["refuse", "full"] = "refuse"
    timeout_seconds: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        bits_for(self.expected_restores)
        rules = {
            "policy": (self.policy in POLICIES, f"one of {', '.join(POLICIES)}"),
            "method": (self.method in METHODS, f"one of {', '.join(METHODS)}"),
            "nbins": (self.nbins is None or self.nbins >= 1, "at least 1, or None"),
            "ratio": (self.ratio is None or 0 <= self.ratio <= 1, "from 0 to 1, or None"),
            "optimizer_bits": (self.optimizer_bits in (8, "none"), "8 or 'none'"),
            "every_steps": (self.every_steps >= 0, "0 or more"),
            "every_seconds": (self.every_seconds >= 0, "0 or more"),
            "keep": (self.keep >= 1, "at least 1"),
            "on_busy": (self.on_busy in ("wait", "skip"), "'wait' or 'skip'"),
            "executor": (self.executor in ("thread", "process"), "'thread' or 'process'"),
            "dense_tables": (self.dense_tables in ("refuse", "full"), "'refuse' or 'full'"),
            "timeout_seconds": (self.timeout_seconds > 0, "positive"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise UsageError(f"CheckpointConfig {name}={getattr(self, name)!r}: it must be {allowed}")


@dataclass(frozen=True)
class RestoreInfo:
    """What was restored.

    Args:
        step: of the checkpoint.
        id: of the checkpoint.
        chain: ids from the full checkpoint to this one.
        bits: of its rows; None for float.
        restores_so_far: in the job's history, this one included.
        skipped: newer folders that cannot be used, and why.
        random: whether random states were put back.
    """

    step: int
    id: str
    chain: tuple[str, ...]
    bits: int | None
    restores_so_far: int
    skipped: dict[str, str]
    random: bool = True
