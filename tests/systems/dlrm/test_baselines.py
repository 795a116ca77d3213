"""Baselines against their formulas, and against scikit-learn's optimum."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from edgewright.errors import UsageError
from edgewright.systems.dlrm.clicks import ClickData, predict
from edgewright.systems.dlrm.metrics import FactorizationMachine, Popularity, evaluate, fit_logistic_regression
from edgewright.systems.dlrm.model import synthetic_ctr


@pytest.fixture(scope="module")
def clicks() -> ClickData:
    return synthetic_ctr(400, (12, 9), num_dense=2, most_ids=2)[0]


def test_the_factorisation_machine_is_a_sum_over_pairs(clicks: ClickData) -> None:
    model = FactorizationMachine(2, (12, 9), dim=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    logits = predict(model, clicks)
    for row in range(5):
        ids = [int(i) + (0 if c < 2 else 12) for c, i in enumerate(clicks.ids[row]) if i >= 0]
        expected = float(model.bias.detach() + clicks.dense[row] @ model.dense.detach())
        expected += sum(float(model.linear.weight.detach()[i, 0]) for i in ids)
        factors = model.factors.weight.detach()
        expected += sum(float(factors[a] @ factors[b]) for k, a in enumerate(ids) for b in ids[:k])
        assert float(logits[row]) == pytest.approx(expected, abs=1e-4)


def test_logistic_regression_finds_the_optimum_of_scikit_learn(clicks: ClickData) -> None:
    linear = importlib.import_module("sklearn.linear_model")
    model = fit_logistic_regression(clicks, penalty=2.0, iterations=200)
    columns, rows = model.ones(clicks.bags())
    design = np.zeros((len(clicks), 23))
    np.add.at(design, (rows.numpy(), columns.numpy()), 1)
    design[:, 21:] = clicks.dense
    other = linear.LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(design, clicks.labels.numpy())
    expected = torch.from_numpy(other.decision_function(design)).float()
    # both stop near the same optimum, not at it
    torch.testing.assert_close(predict(model, clicks), expected, rtol=0, atol=5e-3)
    with pytest.raises(UsageError, match="penalty=0; it must be a number above 0"):
        fit_logistic_regression(clicks, penalty=0)


def test_popularity_is_a_smoothed_rate() -> None:
    data = synthetic_ctr(300, (6, 4))[0]
    model = Popularity(data, "table0", strength=2.0)
    here = data.ids[:, 0] == 1
    base = float(data.labels.mean())
    rate = (float(data.labels[here].sum()) + 2 * base) / (int(here.sum()) + 2)
    assert float(predict(model, data)[here][0].sigmoid()) == pytest.approx(rate, abs=1e-6)
    assert evaluate(model, data).auc > 0.5
    with pytest.raises(UsageError, match="holds bags"):
        Popularity(synthetic_ctr(30, (6, 4), most_ids=2)[0], "table0")
