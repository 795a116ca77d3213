"""Distillation in stages, on a toy: the chain, what it keeps, what it leaves on disk, how it resumes."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from edgewright.distillation.best import Best
from edgewright.distillation.stages import RECORD, STUDENT, Stage, distill_in_stages
from edgewright.errors import FormatError, UsageError
from edgewright.training.batches import BlockBatches

CHAIN = [Stage((1, 2), 6, 1e-2), Stage((1, 1), 5, 1e-2)]


class Toy(nn.Module):
    """A linear map with a scale that a preparation starts anew; `notes` says what was done to it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.notes: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            with torch.no_grad():
                self.scale.copy_(x.abs().mean())
            self.ready.fill_(True)
            self.notes.append(f"calibrated on {len(x)}")
        return self.linear(x) * self.scale


def prepare(model: nn.Module, stage: Stage) -> nn.Module:
    assert isinstance(model, Toy)
    model.notes = [*model.notes, stage.name]
    model.ready.fill_(False)
    return model


def loss(student, teacher, batch):
    with torch.no_grad():
        wanted = torch.tanh(teacher(batch))
    error = (student(batch) - wanted).square().mean()
    return error, {"error": error.detach()}


def batches(stage: int) -> BlockBatches:
    return BlockBatches(torch.randn(40, 4, generator=torch.Generator().manual_seed(1)), 8, seed=stage)


def teacher() -> Toy:
    model = Toy()
    model.ready.fill_(True)
    return model.train()


def run(stages=CHAIN, *, given=None, **options):
    options = {"prepare": prepare, "progress": False, **options}
    return distill_in_stages(given or teacher(), stages, batches, loss, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


def test_each_student_starts_from_the_one_before_and_the_teacher_is_left_alone():
    given = teacher()
    result = run(given=given)
    assert same(given, teacher()) and given.training and given.notes == []
    assert result.student.notes == ["w1a2", "calibrated on 8", "w1a1", "calibrated on 8"]
    assert [r.stage for r in result.stages] == CHAIN and not result.student.training
    assert result.table().splitlines()[0].split() == ["stage", "loss", "error"]
    # By hand: the second stage alone, from the first one's student as model and teacher.
    first = run(CHAIN[:1]).student
    second = distill_in_stages(
        first, CHAIN[1:], lambda i: batches(1), loss, prepare=prepare, progress=False
    )  # fmt: skip
    assert same(second.student, result.student)


def test_the_first_teacher_may_teach_all_stages():
    seen = []

    def watch(student, guide, batch):
        seen.append(len(guide.notes))
        return loss(student, guide, batch)

    for teaches, notes in (("first", {0}), ("previous", {0, 2})):
        seen.clear()
        distill_in_stages(teacher(), CHAIN, batches, watch, prepare=prepare, teaches=teaches, progress=False)
        assert set(seen) == notes


def test_the_calibration_batch_sets_the_scales():
    result = run(CHAIN[:1], calibration=torch.full((32, 4), 2.0))
    assert "calibrated on 32" in result.student.notes


def test_the_best_student_goes_on():
    values = iter([0.1, 0.9, 0.3])
    states = []

    def evaluate(model):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"ignored": 0.0, "accuracy": next(values)}

    result = run(CHAIN[:1], evaluate=evaluate, evaluate_every=2, keep="accuracy")
    assert len(states) == 3 and result.stages[0].metrics == {"ignored": 0.0, "accuracy": 0.9}
    assert all(torch.equal(value, states[1][name]) for name, value in result.student.state_dict().items())
    with pytest.raises(UsageError, match="keep='loss' is none of"):
        run(CHAIN[:1], evaluate=lambda model: {"accuracy": 1.0}, keep="loss")


def test_lowest_first_of_equals_and_nan():
    kept, model = Best(None, higher_is_better=False), nn.Linear(1, 1)
    assert [kept.offer(v, {"v": v}, model) for v in (float("nan"), 3.0, 3.0, 2.0, 4.0)] == [0, 1, 0, 1, 0]
    assert kept.restore(model) == {"v": 2.0}


def test_finished_stages_are_read_and_the_rest_goes_on(tmp_path):
    whole = run(evaluate=score, evaluate_every=3, higher_is_better=False)
    calls = []

    def stop_in_second(student, guide, batch):
        calls.append(len(guide.notes))
        if calls.count(2) == 4:
            raise KeyboardInterrupt
        return loss(student, guide, batch)

    options = {"prepare": prepare, "progress": False, "output": tmp_path, "evaluate": score, "evaluate_every": 3}
    options |= {"higher_is_better": False, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        distill_in_stages(teacher(), CHAIN, batches, stop_in_second, **options)
    first = tmp_path / "stage-1-w1a2"
    assert {p.name for p in first.iterdir()} >= {STUDENT, RECORD, "metrics.csv"} and not (first / "best").exists()
    written = (first / STUDENT).stat().st_mtime_ns
    result = distill_in_stages(teacher(), CHAIN, batches, loss, **options)
    assert same(result.student, whole.student)
    assert [r.metrics for r in result.stages] == [r.metrics for r in whole.stages]
    assert (first / STUDENT).stat().st_mtime_ns == written
    again = distill_in_stages(teacher(), CHAIN, batches, None, **options)  # no loss is called any more
    assert same(again.student, whole.student) and again.stages == result.stages


def score(model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        return {"error": float(loss(model, teacher(), next(batches(0)))[0])}


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(CHAIN[:1], output=tmp_path)
    with pytest.raises(UsageError, match="holds a stage of another run"):
        run(CHAIN[:1], output=tmp_path, seed=1)
    other = teacher()
    other.linear.weight.data.add_(1)
    with pytest.raises(UsageError, match="holds a stage of another run"):
        run(CHAIN[:1], given=other, output=tmp_path)
    record = tmp_path / "stage-1-w1a2" / RECORD
    good = record.read_text()
    for broken in ("{", "[]", json.dumps({"chain": []})):
        record.write_text(broken)
        with pytest.raises(FormatError, match="not the record of a stage"):
            run(CHAIN[:1], output=tmp_path)
    record.write_text(good)
    student = tmp_path / "stage-1-w1a2" / STUDENT
    student.write_bytes(student.read_bytes()[:100])
    with pytest.raises(FormatError, match="not a usable safetensors file.*truncated"):
        run(CHAIN[:1], output=tmp_path)


def test_lists_and_stages_that_cannot_work():
    with pytest.raises(UsageError, match="there are no stages"):
        run([])
    with pytest.raises(UsageError, match="teaches='second'"):
        run(teaches="second")
    with pytest.raises(UsageError, match="a stage has"):
        Stage((1, 64), 5, 1e-3)
    with pytest.raises(UsageError, match="Stage steps=0; it must be a whole number from 1 up"):
        Stage((1, 1), 0, 1e-3)
    with pytest.warns(UserWarning, match="w1a2 has more bits than w1a1"):
        run(CHAIN[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run([Stage((32, 32), 1, 1e-3), *CHAIN])
