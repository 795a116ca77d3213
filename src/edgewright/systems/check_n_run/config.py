"""Settings of a checkpointer, and what it says about each checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgewright.errors import UsageError
from edgewright.systems.check_n_run.bits import METHODS, Bits, bits_for, check_bits
from edgewright.systems.check_n_run.policies import POLICIES, Policy

Kind = Literal["full", "diff"]


@dataclass(frozen=True)
class CheckpointConfig:
    """policy, bits, expected_restores: see `policies` and `bits`. method: "adaptive" (greedy range; 8 bits always have
    the whole range), "minmax" or "symmetric"; nbins and ratio of the adaptive range are tuned on a sample unless given.

    optimizer_bits: 8 packs the optimizer's rows too. every_steps, every_seconds: when `step` saves (0: never by that).
    keep: restorable checkpoints that are kept, with what they build upon. on_busy: a checkpoint that is due while the
    one before is still being written waits for it, or is skipped and counted. executor: "thread" or "process".
    verify_untracked: hash all rows at each snapshot and refuse when one changed unseen (slow). dense_tables: tables
    whose optimizer moves every row are refused, or ("full") stored whole each time. timeout_seconds: how long
    processes wait for each other.
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
class Saved:
    """A checkpoint that was written.

    bytes: all its files, data_bytes: without the manifest; ratio: of the data, against the full one that it builds
    upon. stall_seconds: how long training stood still (waiting for the one before included); seconds: until it existed.
    """

    id: str
    kind: Kind
    step: int
    bits: int | None
    rows: int
    raw_rows: int
    bytes: int
    data_bytes: int
    ratio: float
    digest: str
    stall_seconds: float = 0.0
    seconds: float = 0.0
    quantize_seconds: float = 0.0
    write_seconds: float = 0.0


@dataclass(frozen=True)
class RestoreInfo:
    """What was restored. chain: ids from the full checkpoint to this one; restores_so_far: in the job's history, this
    one included; skipped: newer folders that cannot be used, and why; random: whether random states were put back."""

    step: int
    id: str
    chain: tuple[str, ...]
    bits: int | None
    restores_so_far: int
    skipped: dict[str, str]
    random: bool = True
