"""Settings of a training run, checked when they are written down."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from edgewright.errors import UsageError
from edgewright.training.schedules import Schedule, check_schedule, schedule_name

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FREE = ("device", "checkpoint_every", "checkpoint_async")  # may change between a run and its resume


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    Args:
        steps: optimizer updates, each over `accumulation` batches (times the processes of a distributed run).
        learning_rate: of the default optimizer; None where the optimizer, or every parameter group, brings its own.
        schedule: "constant", "linear", "cosine" or another of `training.schedules`, or a function (step, steps) ->
            multiplier of each group's learning rate.
        warmup_steps: first steps, over which the learning rate grows linearly from zero.
        accumulation: batches of one update.
        clip_norm: largest norm of all gradients together; None does not clip.
        weight_decay: of the default optimizer, for matrices only.
        betas: decay rates of the default optimizer's moments.
        checkpoint_every: updates between checkpoints; 0 saves only when interrupted.
        checkpoint_async: copy the state to the CPU's memory and write it while training goes on.
        log_every: updates between rows of metrics.csv.
        seed: of torch's global generators.
        precision: "no", "bf16" or "fp16": the loss function runs under autocast.
        device: None: where the model is; "auto": accelerate's choice; or a torch device. A distributed run always uses
            the device of its process.

    Raises:
        UsageError: a value that is out of range.
    """

    steps: int
    learning_rate: float | None = None
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    accumulation: int = 1
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    checkpoint_every: int = 0
    checkpoint_async: bool = False
    log_every: int = 1
    seed: int = 0
    precision: str = "no"
    device: str | None = None

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision={self.precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
        rate, clip = self.learning_rate, self.clip_norm
        rules = {
            "steps": (self.steps >= 1, "at least 1"),
            "learning_rate": (rate is None or 0 < rate < math.inf, "positive and finite"),
            "warmup_steps": (0 <= self.warmup_steps < max(self.steps, 1), "0 or more, and less than steps"),
            "accumulation": (self.accumulation >= 1, "at least 1"),
            "clip_norm": (clip is None or clip > 0, "positive, or None for no clipping"),
            "checkpoint_every": (self.checkpoint_every >= 0, "0 (only when interrupted) or more"),
            "log_every": (self.log_every >= 1, "at least 1"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise UsageError(f"TrainConfig {name}={getattr(self, name)!r}: it must be {allowed}")

    def fixed(self) -> dict[str, Any]:
        """What a resume must repeat, as JSON values."""
        values = dataclasses.asdict(self) | {"schedule": schedule_name(self.schedule), "betas": list(self.betas)}
        return {name: value for name, value in values.items() if name not in FREE}
