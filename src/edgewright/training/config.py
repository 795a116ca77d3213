"""Settings of a training run, checked when they are written down."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from edgewright.checks import check_fields, number, one_of, optional, whole
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
        rules = {
            "steps": whole(1),
            "learning_rate": optional(number(above=0)),
            "warmup_steps": whole(0, max(self.steps, 1) - 1),
            "accumulation": whole(1),
            "clip_norm": optional(number(above=0)),
            "checkpoint_every": whole(0),
            "log_every": whole(1),
            "seed": whole(0),
            "precision": one_of(*PRECISIONS),
        }
        check_fields(self, rules)

    def fixed(self) -> dict[str, Any]:
        """What a resume must repeat, as JSON values."""
        values = dataclasses.asdict(self) | {"schedule": schedule_name(self.schedule), "betas": list(self.betas)}
        return {name: value for name, value in values.items() if name not in FREE}
