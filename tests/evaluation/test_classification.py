"""Agreement of a classifier with a reference, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.evaluation.classification import add_agreement, agreement, logits_of
from edgewright.measure.report import Report


def test_a_model_agrees_with_itself() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    found = agreement(logits, logits)
    assert [found[name][0].value for name in ("top1_agreement", "top5_agreement", "kl")] == [100.0, 100.0, 0.0]


def test_figures_and_errors_count_pictures() -> None:
    reference = torch.eye(4, 7) * 3
    logits = reference.clone()
    logits[3] = -reference[3]  # its first choice comes last of seven
    found = agreement(reference, logits, groups=[0, 0, 1, 1])
    assert found["top1_agreement"][0].value == found["top5_agreement"][0].value == 75.0
    assert found["top1_agreement"][0].clusters == 2 and found["top1_agreement"][0].se == pytest.approx(25.0)
    p = torch.softmax(reference[3].double(), 0)
    kl = float((p * (torch.log_softmax(reference[3].double(), 0) - torch.log_softmax(logits[3].double(), 0))).sum())
    assert found["kl"][0].value == pytest.approx(kl / 4)
    report = Report("r")
    add_agreement(report, "one", reference[:1], logits[:1])
    assert report.row("kl", "one").se is None and math.isfinite(report.value("kl", "one"))


def test_batches_do_not_matter_and_modes_are_put_back() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3)).train()
    images = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(model, images, 2), logits_of(model, images, 5))
    assert model.training


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="must be \\[images, classes\\]"):
        agreement(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UsageError, match="3 groups for 2 images"):
        agreement(torch.zeros(2, 3), torch.zeros(2, 3), [0, 1, 2])
