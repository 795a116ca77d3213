"""The gate: NE of known predictors, paired intervals that cover, slices, and evaluation sets that cannot be judged."""

from __future__ import annotations

import math

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.systems.dlrm.metrics import log_loss, normalized_entropy
from edgewright.systems.low_precision_recsys import AccuracyGate, Examples, Judgement, click_slices
from edgewright.systems.low_precision_recsys.gate import as_examples, calibration_batches, halves, logits


def examples(n: int = 2000, users: int = 100, seed: int = 0) -> tuple[Examples, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator)
    labels = (torch.rand(n, generator=generator) < scores.sigmoid()).float()
    groups = torch.randint(0, users, (n,), generator=generator)
    return Examples([(scores,)], labels, groups, {"first": torch.arange(n) < n // 2}), scores


def test_the_base_rate_has_an_entropy_of_one() -> None:
    data, _ = examples()
    rate = float(data.labels.mean())
    base = torch.full((2000,), math.log(rate / (1 - rate)), dtype=torch.float64)
    found = AccuracyGate().judge(base, base, data)
    assert found.ne == pytest.approx(1.0, abs=1e-12) and found.delta == 0.0 == found.upper
    assert found.calibration == pytest.approx(1.0) and found.auc == 0.5


def test_delta_is_the_relative_change_of_normalised_entropy() -> None:
    data, scores = examples()
    worse = scores * 1.3 + 0.1
    found = AccuracyGate().judge(worse, scores, data)
    before, after = normalized_entropy(scores, data.labels), normalized_entropy(worse, data.labels)
    assert found.delta == pytest.approx((after - before) / before, rel=1e-9)
    assert found.upper > found.delta and found.auc_delta == pytest.approx(0.0, abs=1e-12)
    assert found.max_logit_difference == pytest.approx(float((worse - scores).abs().max()))
    part = torch.arange(2000) < 1000
    change = log_loss(worse, data.labels)[part].sum() / log_loss(scores, data.labels)[part].sum() - 1
    assert found.slices["first"][0] == pytest.approx(float(change), rel=1e-9)
    assert Judgement.from_dict(found.to_dict()) == found
    assert AccuracyGate(budget=1.0).passes(found) and not AccuracyGate(budget=0.0).passes(found)


def test_intervals_cover() -> None:
    """Differences of mean 0 whose users share a part: the true delta is 0, and 93 % of the upper ends are above it."""
    gate, above = AccuracyGate(resamples=100), 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        groups = torch.arange(600) % 120
        shared = torch.randn(120, generator=generator)[groups]
        noise = torch.randn(600, generator=generator) + shared
        losses = torch.rand(600, generator=generator) + 0.2
        above += gate.interval(0.01 * noise, losses, groups)[1] >= 0
    assert above / 300 >= 0.93


def test_users_are_drawn_whole() -> None:
    """100 users who each repeat one example 20 times know as much as 100 examples."""
    single = torch.randn(100, generator=torch.Generator().manual_seed(1)).double()
    losses = torch.ones(2000).double()
    groups = torch.arange(100).repeat_interleave(20)
    gate = AccuracyGate()
    wide = gate.interval(single.repeat_interleave(20), losses, groups)
    narrow = gate.interval(single.repeat_interleave(20), losses, torch.arange(2000))
    assert wide == pytest.approx(gate.interval(single, torch.ones(100).double(), torch.arange(100)))
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_broken_logits_never_pass() -> None:
    data, scores = examples()
    broken = scores.clone()
    broken[7] = float("nan")
    found = AccuracyGate(budget=100.0).judge(broken, scores, data)
    assert found.delta == math.inf and not AccuracyGate(budget=100.0).passes(found)
    assert Judgement.from_dict(found.to_dict()).upper == math.inf
    with pytest.raises(UsageError, match="reference model gives a logit that is not finite"):
        AccuracyGate().judge(scores, broken, data)


def test_evaluation_sets_that_cannot_be_judged() -> None:
    data, scores = examples()
    for value, word in ((0.0, "zero"), (1.0, "clicks")):
        one = Examples(data.batches, torch.full((2000,), value))
        with pytest.raises(ValueError, match=f"all 2000 labels are {word}"):
            AccuracyGate().judge(scores, scores, one)
    with pytest.raises(ValueError, match="there is no data"):
        Examples([], torch.zeros(0))
    with pytest.raises(ValueError, match="calibration data is empty"):
        calibration_batches([])
    with pytest.raises(UsageError, match="groups: 3 entries for 2000"):
        Examples(data.batches, data.labels, torch.zeros(3))
    for wrong in ({"metric": "auc"}, {"budget": -1.0}, {"ci": 1.0}, {"group": "day"}, {"resamples": 0}):
        with pytest.raises(UsageError, match=str(next(iter(wrong)))):
            AccuracyGate(**wrong)  # type: ignore[arg-type]


def test_clicks_as_examples(model, clicks) -> None:  # type: ignore[no-untyped-def]
    whole = as_examples(clicks, 1000)
    assert len(whole.batches) == 3 and torch.equal(logits(model, whole), logits(model, as_examples(clicks)))
    first, second = halves(whole)  # whole batches
    assert len(first) == 1000 and len(second) == 2000
    assert len(halves(clicks)[0]) == 1500
    parts = click_slices(clicks, clicks.rows(slice(0, 50)), top=3)
    assert set(parts) == {"new users", "3 most frequent of item"}
    assert whole.digest() == as_examples(clicks, 1000).digest() != as_examples(clicks, 500).digest()
    with pytest.raises(UsageError, match="ClickData or Examples"):
        as_examples([1])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one batch cannot be split"):
        halves(as_examples(clicks))
