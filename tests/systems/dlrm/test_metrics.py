"""Figures against pairs counted one by one and against scikit-learn; what they refuse."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.systems.dlrm.metrics import auc, base_entropy, click_metrics, normalized_entropy


def test_auc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (60,), generator=generator).float()  # many ties
    labels = torch.randint(0, 2, (60,), generator=generator).float()
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels > 0] for b in scores[labels == 0]]
    assert auc(scores, labels)[0] == pytest.approx(float(sum(pairs)) / len(pairs), abs=1e-12)
    assert auc(-scores, labels)[0] == pytest.approx(1 - auc(scores, labels)[0], abs=1e-12)


def test_figures_of_scikit_learn() -> None:
    metrics = importlib.import_module("sklearn.metrics")
    logits = torch.randn(500, generator=torch.Generator().manual_seed(1))
    labels = (torch.rand(500, generator=torch.Generator().manual_seed(2)) < logits.sigmoid()).float()
    found = click_metrics(logits, labels)
    assert found.auc == pytest.approx(metrics.roc_auc_score(labels, logits), abs=1e-12)
    assert found.logloss == pytest.approx(metrics.log_loss(labels, logits.double().sigmoid()), abs=1e-9)


def test_the_error_of_auc_is_that_of_repeated_draws() -> None:
    found = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        labels = (torch.arange(300) % 3 == 0).float()
        found.append(auc(torch.randn(300, generator=generator) + labels, labels))
    areas, errors = torch.tensor(found, dtype=torch.float64).T
    # 200 draws know a deviation to about 5 %
    assert float(areas.std()) == pytest.approx(float(errors.mean()), rel=0.15)


def test_the_base_rate_has_an_entropy_of_one() -> None:
    labels = torch.tensor([1.0, 0, 0, 0, 1])
    logits = torch.full((5,), math.log(0.4 / 0.6), dtype=torch.float64)
    assert normalized_entropy(logits, labels) == pytest.approx(1, abs=1e-12)
    assert base_entropy(labels) == pytest.approx(-0.4 * math.log(0.4) - 0.6 * math.log(0.6), abs=1e-12)
    assert click_metrics(logits, labels).calibration == pytest.approx(1, abs=1e-12)


def test_what_has_no_figures_is_refused() -> None:
    with pytest.raises(UsageError, match="all 3 labels are zero"):
        auc(torch.zeros(3), torch.zeros(3))
    with pytest.raises(UsageError, match="2 predictions for 3 labels"):
        normalized_entropy(torch.zeros(2), torch.tensor([0.0, 1, 0]))
    with pytest.raises(UsageError, match="prediction 1 is NaN"):
        auc(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, 1]))
