"""The measures of the BiT recipe against slow definitions."""

from __future__ import annotations

import numpy as np
import torch

from edgewright.systems.bit.distillation import agreement, ranks


def unit(seed: int, rows: int = 12) -> torch.Tensor:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)


def test_ranks_share_ties():
    values = torch.tensor([0.3, 0.1, 0.3, 0.5, 0.1, 0.1])
    expected = [sum(v < w for v in values) + (sum(v == w for v in values) - 1) / 2 for w in values]
    assert ranks(values).tolist() == [float(w) for w in expected]


def test_agreement_equals_the_definitions():
    a, b = unit(0), unit(1)
    figures = agreement(a, b)
    pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
    similar = [[float(x[i] @ x[j]) for i, j in pairs] for x in (a, b)]
    places = [np.argsort(np.argsort(s)) for s in similar]
    np.testing.assert_allclose(figures["spearman"], np.corrcoef(*places)[0, 1], rtol=1e-9)

    def nearest(x: torch.Tensor, i: int) -> set[int]:
        order = sorted((j for j in range(12) if j != i), key=lambda j: -float(x[i] @ x[j]))
        return set(order[:5])

    overlap = np.mean([len(nearest(a, i) & nearest(b, i)) / 5 for i in range(12)])
    np.testing.assert_allclose(figures["top5_overlap"], overlap, rtol=1e-12)


def test_a_model_agrees_with_itself_and_a_constant_with_nothing():
    a = unit(0)
    figures = agreement(a, a)
    assert figures["top5_overlap"] == 1.0 and figures["spearman"] > 1 - 1e-12  # float64 correlation
    assert agreement(torch.ones(12, 8) / 8**0.5, a)["spearman"] == 0.0
