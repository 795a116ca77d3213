"""The stages of a run of `compress`: announced with estimates at the start, then one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgewright.compression.settings import CompressSettings
from edgewright.measure.progress import ProgressBar

REFERENCES = "write the float16 file and llama.cpp's own"
ROUNDING = {"rtn": "round to nearest", "mse": "search the scales of least error"}
WRITING = "let the model write text"
CALIBRATION = "calibrate"
TRAINING = "train under quantisation"
EVALUATION = "evaluate every file in llama.cpp"
TIMING = "time the files in turn"

# Seconds a weight for what is bound by writing, decoding and comparing files, and multiples of the time of a token in
# one forward pass of the model, measured on SmolLM2-135M with two cores.
REFERENCE_COST = 2.5e-8
EXPORT_COST = 1.4e-7
WRITING_COST = 3.4
CALIBRATION_COST = 2.4
TRAINING_COST = 4.2
EVALUATION_COST = 1.9
TIMING_SECONDS = 10.0  # of one file: its rounds of prompts and decoding


@dataclass(frozen=True)
class PlannedStage:
    """name: what happens, as in "calibrate". seconds: estimated. kept: an earlier call has finished it."""

    name: str
    seconds: float
    kept: bool = False


class StagePlan:
    """Says the plan when it is made, and each stage when it begins; without a terminal it keeps saying what goes on."""

    def __init__(self, stages: Sequence[PlannedStage], say: Callable[[str], None], shown: bool) -> None:
        self.stages, self.say, self.shown = stages, say, shown
        total = duration(sum(stage.seconds for stage in stages if not stage.kept))
        lines = [f"{len(stages)} stages, {total} in all on this machine:"]
        for number, stage in enumerate(stages, 1):
            lines.append(f"  {number}. {stage.name}: {'kept' if stage.kept else duration(stage.seconds)}")
        say("\n".join(lines))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around the work of the stage of that name."""
        number, stage = next((n, stage) for n, stage in enumerate(self.stages, 1) if stage.name == name)
        self.say(f"stage {number} of {len(self.stages)}: {name}{' (kept from before)' if stage.kept else ''}")
        with ProgressBar(f"stage {number} of {len(self.stages)}", None, shown=self.shown, lines_only=True):
            yield


def planned_stages(
    settings: CompressSettings, seconds: dict[str, float], to_do: Container[str], files_only: bool
) -> list[PlannedStage]:
    """The stages of a run, in order.

    Args:
        settings: of the run.
        seconds: as `estimated_seconds` gives them.
        to_do: the methods whose files are missing, and "reference" where a reference is.
        files_only: leave out what no file to ship needs.
    """
    stages = [] if files_only else [PlannedStage(REFERENCES, seconds[REFERENCES], "reference" not in to_do)]
    for method, name in ROUNDING.items():
        if method in settings.wanted:
            stages.append(PlannedStage(name, seconds[name], method not in to_do))
    calibrated = "gptq" not in to_do and "qat" not in to_do
    if {"gptq", "qat"} & set(settings.wanted):
        stages += [PlannedStage(WRITING, seconds[WRITING], calibrated)] if settings.data is None else []
        stages.append(PlannedStage(CALIBRATION, seconds[CALIBRATION], calibrated))
    if "qat" in settings.wanted:
        stages.append(PlannedStage(TRAINING, seconds[TRAINING], "qat" not in to_do))
    if not files_only:
        stages.append(PlannedStage(EVALUATION, seconds[EVALUATION]))
        stages += [PlannedStage(TIMING, seconds[TIMING])] if settings.benchmark else []
    return stages


@torch.no_grad()
def estimated_seconds(settings: CompressSettings, model: Any, blocks: Tensor, steps: int) -> dict[str, float]:
    """Seconds of each stage by its name, from the time of one forward pass of the model on this machine.

    Args:
        settings: of the run.
        model: the float model.
        blocks: int64 [blocks, length] of token ids.
        steps: optimizer steps of training.
    """
    block = blocks[:1].to(next(model.parameters()).device)
    length = block.shape[1]
    took = []
    for _ in range(3):  # the quickest: the first one warms up, and other work on the machine only slows
        began = time.perf_counter()
        model(input_ids=block, use_cache=False)
        took.append(time.perf_counter() - began)
    token = min(took) / length
    weights = sum(parameter.numel() for parameter in model.parameters())
    export, trained = EXPORT_COST * weights, steps * settings.batch_size * length
    files = 1 + len(settings.wanted) + bool(settings.baselines)
    training = 60 * (settings.budget.minutes or 0) or TRAINING_COST * token * trained
    return {
        REFERENCES: (2 if settings.baselines else 1) * REFERENCE_COST * weights,
        **dict.fromkeys(ROUNDING.values(), export),
        WRITING: WRITING_COST * token * trained,
        CALIBRATION: CALIBRATION_COST * token * settings.calibration_blocks * length + export,
        TRAINING: training + export,
        EVALUATION: EVALUATION_COST * (1 + files) * settings.evaluation_blocks * length * token,
        TIMING: TIMING_SECONDS * files,
    }


def duration(seconds: float) -> str:
    """About how long, for people."""
    if seconds < 90:
        return f"about {max(round(seconds), 1)} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
