"""Distillation in stages: each student starts from the one before it and takes it as its teacher.

    stages = [Stage(bits=(1, 2), steps=300, learning_rate=2e-4), Stage(bits=(1, 1), steps=300, learning_rate=2e-4)]
    result = distill_in_stages(teacher, stages, batches, loss, prepare=prepare, output="runs/bit")

A student far from its teacher learns badly; over students in between it gets further with the same number of steps
(BiT, arXiv 2205.13016, section 3.4: from full precision to 1 bit over 2-bit activations).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgewright.checks import check, check_fields, number, one_of, whole
from edgewright.distillation.best import Best
from edgewright.errors import FormatError, UsageError, in_one_line
from edgewright.io.atomic import write_text
from edgewright.io.hashing import crc32
from edgewright.io.json_file import read_object
from edgewright.io.run_folder import difference
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.training.config import TrainConfig
from edgewright.training.loop import fit
from edgewright.training.resume import latest_checkpoint

STUDENT = "student.safetensors"
RECORD = "stage.json"

StageLoss = Callable[[nn.Module, nn.Module, Any], "Tensor | tuple[Tensor, Mapping[str, Any]]"]
Groups = Callable[[nn.Module, "Stage"], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True)
class Stage:
    """One student of the chain.

    Args:
        bits: of weights and of activations, 32 where they are left alone.
        steps: of its training, at least 1.
        learning_rate: above 0.

    Raises:
        UsageError: a setting out of its range.
    """

    bits: tuple[float, float]
    steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        if len(self.bits) != 2 or not all(0 < b <= 32 for b in self.bits):
            raise UsageError(f"bits={self.bits}; a stage has (weight bits, activation bits), each up to 32, as (1, 2)")
        check_fields(self, {"steps": whole(1), "learning_rate": number(above=0)})

    @property
    def name(self) -> str:
        return f"w{self.bits[0]:g}a{self.bits[1]:g}"


@dataclass(frozen=True)
class StageResult:
    """What a stage came to.

    Args:
        stage: as it was given.
        metrics: of the student that was chosen, by `evaluate`.
        errors: numbers of the loss on the first batch.
    """

    stage: Stage
    metrics: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class StagesResult:
    """The last student, in eval mode, and the record of every stage."""

    student: nn.Module
    stages: tuple[StageResult, ...]

    def table(self) -> str:
        """The errors of every stage side by side as text; with EncoderDistillation they are those of each layer."""
        names = list(dict.fromkeys(name for result in self.stages for name in result.errors))
        lines = ["stage  " + "".join(f"{name:>12}" for name in names)]
        for result in self.stages:
            cells = (result.errors.get(name, math.nan) for name in names)
            lines.append(f"{result.stage.name:<7}" + "".join(f"{value:>12.5g}" for value in cells))
        return "\n".join(lines)


def distill_in_stages(
    teacher: nn.Module,
    stages: Sequence[Stage],
    batches: Callable[[int], Any],
    loss: StageLoss,
    *,
    prepare: Callable[[nn.Module, Stage], nn.Module],
    output: str | Path | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    keep: str | None = None,
    higher_is_better: bool = True,
    groups: Groups | None = None,
    calibration: Any = None,
    teaches: Literal["previous", "first"] = "previous",
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    checkpoint_every: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> StagesResult:
    """Train the chain of students (BiT, arXiv 2205.13016, section 3.4); the teacher is left as it is.

    With an output folder every stage leaves its student there, and the same call goes on where an earlier one stopped.
    The learning rate warms up and then falls in a line.

    Args:
        teacher: of the first stage.
        stages: in order, one or more.
        batches: i -> an iterator of batches for stage i, the same at every call.
        loss: (student, teacher, batch) -> a scalar, or a scalar and numbers to record.
        prepare: (model, stage) -> the stage's student, from a copy of the student before (at first of the teacher),
            with its scales started anew.
        output: folder; None: none.
        evaluate: student -> numbers by name.
        evaluate_every: steps between two evaluations; 0: at the end.
        keep: the number by which the best student is chosen, which goes on; None: the first.
        higher_is_better: of that number.
        groups: (student, stage) -> optimizer groups; None: the default ones.
        calibration: a batch that sets the scales; None: the first one.
        teaches: whether a stage learns from the student before it ("previous") or from the first teacher ("first").
        warmup: share of a stage in which the learning rate rises.
        weight_decay: of the default groups.
        checkpoint_every: steps between checkpoints; 0: none.
        seed: of the order of batches.
        progress: show a bar.

    Returns:
        The last student and the record of every stage.

    Raises:
        UsageError: no stages, or a folder that holds other stages.
        FormatError: a damaged folder.
    """
    if not stages:
        raise UsageError(
            "there are no stages; give one or more, as [Stage(bits=(1, 1), steps=300, learning_rate=2e-4)]"
        )
    check("teaches", teaches, one_of("previous", "first"))
    for before, after in itertools.pairwise(stages):
        if any(b < a for b, a in zip(before.bits, after.bits, strict=True)):
            warnings.warn(f"stage {after.name} has more bits than {before.name} before it", stacklevel=2)
    digest = _digest(teacher)
    was_training = teacher.training
    teacher.eval()
    current, results = teacher, []
    try:
        for index, stage in enumerate(stages):
            folder = None if output is None else Path(output) / f"stage-{index + 1}-{stage.name}"
            record = {
                "chain": [asdict(s) | {"bits": list(s.bits)} for s in stages[: index + 1]],
                "seed": seed,
                "teaches": teaches,
                "teacher": digest,
            }
            guide = teacher if teaches == "first" else current
            student = prepare(copy.deepcopy(current), stage)
            done = None if folder is None else _finished(folder, record, student)
            if done is None:
                first = calibration if calibration is not None else next(iter(batches(index)))
                kept = Best(folder, higher_is_better, fresh=folder is None or latest_checkpoint(folder) is None)
                _call(loss, student.eval(), guide, first)  # sets the scales
                metrics = _train(
                    student, guide, stage, batches(index), loss, kept,
                    folder=folder, evaluate=evaluate, evaluate_every=evaluate_every, keep=keep, groups=groups,
                    warmup=warmup, weight_decay=weight_decay, checkpoint_every=checkpoint_every, seed=seed,
                    progress=progress,
                )  # fmt: skip
                errors = _call(loss, student.eval(), guide, first)
                done = {"metrics": metrics, "errors": errors}
                if folder is not None:
                    save_tensors(folder / STUDENT, student.state_dict())
                    write_text(folder / RECORD, json.dumps(record | done, indent=1) + "\n")
                    kept.clear()
            results.append(StageResult(stage, done["metrics"], done["errors"]))
            current = student.eval()
    finally:
        teacher.train(was_training)
    return StagesResult(current, tuple(results))


def _train(
    student: nn.Module,
    guide: nn.Module,
    stage: Stage,
    batches: Any,
    loss: StageLoss,
    kept: Best,
    *,
    folder: Path | None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
    evaluate_every: int,
    keep: str | None,
    groups: Groups | None,
    warmup: float,
    weight_decay: float,
    checkpoint_every: int,
    seed: int,
    progress: bool,
) -> dict[str, float]:
    """Fit one student in place and put its best state back; the metrics of that state."""

    def judge(model: nn.Module) -> Mapping[str, float]:
        assert evaluate is not None
        found = {name: float(value) for name, value in evaluate(model).items()}
        name = keep or next(iter(found))
        if name not in found:
            raise UsageError(f"keep={name!r} is none of the numbers that evaluate gives: {', '.join(found)}")
        kept.offer(found[name], found, student)
        return found

    fit(
        student,
        lambda model, batch: loss(model, guide, batch),
        batches,
        TrainConfig(
            steps=stage.steps,
            learning_rate=stage.learning_rate,
            schedule="linear",
            warmup_steps=min(int(warmup * stage.steps), stage.steps - 1),
            weight_decay=weight_decay,
            checkpoint_every=checkpoint_every,
            seed=seed,
        ),
        optimizer=None if groups is None else groups(student, stage),
        output=folder,
        evaluate=judge if evaluate is not None else None,
        evaluate_every=(evaluate_every or stage.steps) if evaluate is not None else 0,
        progress=progress,
        label=f"stage {stage.name}",
        settings={"stage": stage.name},
    )
    return kept.restore(student)


@torch.no_grad()
def _call(loss: StageLoss, student: nn.Module, guide: nn.Module, batch: Any) -> dict[str, float]:
    """The numbers of the loss on one batch, "loss" among them."""
    from accelerate.utils import send_to_device

    result = loss(student, guide, send_to_device(batch, next(student.parameters()).device))
    value, numbers = result if isinstance(result, tuple) else (result, {})
    return {"loss": float(value)} | {name: float(number) for name, number in numbers.items()}


def _finished(folder: Path, record: dict[str, Any], student: nn.Module) -> dict[str, Any] | None:
    """The record of a stage that is done, its weights loaded into `student`; None where it is still to do."""
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        found = read_object(path)
        other = difference({name: found[name] for name in record}, record)
        done = {name: found[name] for name in ("metrics", "errors")}
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is not the record of a stage: {error!r}") from error
    if other:
        raise UsageError(f"{folder} holds a stage of another run ({other}); choose another folder, or remove it")
    load_state(student, folder / STUDENT)
    return done


def load_state(model: nn.Module, path: Path) -> None:
    """Weights that a stage wrote, into a model of the same make. Raises FormatError when they are of another."""
    tensors = load_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise FormatError(f"{path} does not fit the student: {in_one_line(error)}") from error


def _digest(model: nn.Module) -> int:
    """CRC-32 of the teacher's weights: a resume with another teacher must not pass unnoticed."""
    return crc32(*(part for entry in model.state_dict().items() for part in entry))
