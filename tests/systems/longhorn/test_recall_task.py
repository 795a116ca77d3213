"""The recall task: rows read back by a program that remembers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from edgewright.errors import UsageError
from edgewright.systems.longhorn.tasks import IGNORED, RecallTask, recall_accuracy, recall_rows


@pytest.mark.parametrize(
    "task",
    [RecallTask(), RecallTask(2, 7, 8), RecallTask(31, 256, 64), RecallTask(3, 10, 8), RecallTask(4, 32, 16, 0.75)],
)
def test_a_dictionary_solves_it(task: RecallTask) -> None:
    rows = recall_rows(task, 16, torch.Generator().manual_seed(0))
    half = task.vocabulary // 2
    for ids, labels in zip(rows["input_ids"].tolist(), rows["labels"].tolist(), strict=True):
        shown = dict(zip(ids[0 : 2 * task.pairs : 2], ids[1 : 2 * task.pairs : 2], strict=True))
        assert len(shown) == task.pairs
        assert all(0 < key < half <= value < task.vocabulary for key, value in shown.items())
        rest = ids[2 * task.pairs :]
        asked = [(place, token) for place, token in enumerate(rest, 2 * task.pairs) if token]
        if task.density is None:
            assert sorted(token for _, token in asked) == sorted(shown)
        wanted = {place + 1: shown[token] for place, token in asked}
        assert wanted == {place: label for place, label in enumerate(labels) if label != IGNORED}


@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_the_density_is_that_of_the_questions(density: float) -> None:
    labels = recall_rows(RecallTask(4, 64, 16, density), 256, torch.Generator().manual_seed(0))["labels"]
    asked = (labels != IGNORED).sum(1)
    assert int(asked.min()) >= 1  # also where chance asked nothing
    assert abs(float(asked.float().mean()) / 55 - (1 + 54 * density) / 55) < 0.02


def test_the_seed_decides() -> None:
    one, same, other = (recall_rows(RecallTask(), 4, torch.Generator().manual_seed(s))["input_ids"] for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_accuracy_is_the_share_of_right_answers() -> None:
    task = RecallTask()
    labels = recall_rows(task, 3, torch.Generator().manual_seed(0))["labels"]
    logits = F.one_hot(labels.clamp_min(0).roll(-1, 1), task.vocabulary).float()  # the answer one place before
    assert torch.equal(recall_accuracy(logits, labels), torch.ones(3))
    half = logits.clone()
    places = (labels[0, 1:] != IGNORED).nonzero()[:4, 0]
    half[0, places] = F.one_hot(torch.zeros(4).long(), task.vocabulary).float()
    assert recall_accuracy(half, labels).tolist() == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": 0}, "pairs=0; it must be a whole number from 1 to 31"),
        ({"pairs": 32}, "pairs=32"),
        ({"density": 0.0}, "density=0.0; it must be a number above 0 and at most 1, or None"),
        ({"length": 24}, "RecallTask length=24; it must be a whole number from 25 up"),
    ],
)
def test_what_cannot_be_asked_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RecallTask(**fields)
