"""The scaling law and what is designed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from edgewright.errors import UsageError
from edgewright.models.decoder.model import new_decoder
from edgewright.systems.mobilemoe.design import (
    SHAPES,
    ScalingLaw,
    design_under_budget,
    effective_experts,
    mobilemoe,
    moe_memory,
    moe_parameters,
)

LAW = ScalingLaw.published()


def points(noise: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    N, D, E = (a.ravel() for a in np.meshgrid([0.3, 0.5, 0.9], [100, 200, 500], [1, 2, 4, 8, 16, 32]))
    return {"N": N, "D": D, "E": E, "loss": LAW.loss(N, D, E) + np.random.default_rng(seed).normal(0, noise, len(N))}


def test_the_published_law_gives_the_paper_s_losses() -> None:
    expected = {100: [2.4461, 2.3891, 2.3795, 2.3759], 500: [2.3907, 2.3453, 2.3458, 2.3552]}
    for D, losses in expected.items():
        assert np.round(LAW.loss(0.3, D, [1, 4, 8, 32]), 4).tolist() == losses
    assert float(effective_experts(1)) == pytest.approx(1.0, abs=1e-12)
    assert 4 < LAW.optimal_E(0.3, 500) < 8 < LAW.optimal_E(0.3, 100)


def test_at_one_sparsity_it_is_chinchilla() -> None:
    e = np.log(effective_experts(8))
    N, D = np.array([0.3, 0.9, 0.5]), np.array([100.0, 300.0, 500.0])
    a, b = LAW.A * np.exp(LAW.delta * e), LAW.B * np.exp(LAW.omega * e)
    expected = a * N ** (LAW.alpha + LAW.gamma * e) + b * D ** (LAW.beta + LAW.zeta * e) + LAW.c
    np.testing.assert_allclose(LAW.loss(N, D, 8), expected, rtol=1e-12)


def test_a_fit_recovers_predictions_and_its_intervals_hold_them(tmp_path: Path) -> None:
    table = points(noise=0.002)
    law = ScalingLaw.fit(table, starts=8)
    assert law.rmse < 0.002
    truth = LAW.loss(table["N"], table["D"], table["E"])
    assert np.sqrt(np.mean((law.loss(table["N"], table["D"], table["E"]) - truth) ** 2)) < 0.002
    places = [(0.3, 100, 8), (0.9, 500, 2), (0.5, 200, 1)]
    intervals = law.ci(repeats=20, level=0.99, at=places)
    assert all(low <= law.loss(*place) <= high for place, (low, high) in ((p, intervals[p]) for p in places))
    assert all(high - low < 0.01 for place in places for low, high in [intervals[place]])
    assert law == ScalingLaw.fit(table, starts=8)
    assert law.plot(tmp_path / "law.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v[:11] for k, v in t.items()}, "number of points=11; it must be a whole number from 12 up"),
        (lambda t: {**t, "E": np.full(54, 4.0)}, "number of sparsities E=1"),
        (lambda t: {**t, "N": t["N"][:5]}, "have 5, 54, 54, 54 entries"),
        (lambda t: {k: v for k, v in t.items() if k != "loss"}, "numeric columns N, D, E and loss"),
        (lambda t: {**t, "loss": -t["loss"]}, "loss holds numbers that are not positive"),
        (lambda t: {**t, "D": t["D"] * np.nan}, "D=nan"),
        (lambda t: {**t, "E": t["E"] / 2}, "E=0.5"),
        (lambda t: {**t, "E": t["E"] * 2}, "E_max=32.0; it must be a number at least 64 and above 1"),
    ],
)
def test_a_table_that_cannot_be_fitted_is_refused(change: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ScalingLaw.fit(change(points()), starts=1)


def test_the_published_law_has_no_intervals() -> None:
    with pytest.raises(UsageError, match="no points to draw from"):
        LAW.ci()


def test_plans_keep_the_budget_and_can_be_built() -> None:
    plans = design_under_budget(1.0, 6e8, context=8192, vocab=49152, count=500)
    assert [p.loss for p in plans] == sorted(p.loss for p in plans)
    assert len({(p.hidden, p.layers, p.E) for p in plans}) == len(plans) > 50
    for plan in plans[:40]:
        assert plan.memory_bytes <= 1e9 and plan.flops_per_token == 2 * plan.n_active <= 6e8
        config = plan.config()
        assert moe_parameters(config) == (plan.n_total, plan.n_active)
        assert plan.memory_bytes == pytest.approx(sum(moe_memory(config, 8192)), abs=1)
    assert plans[0].E > 1  # memory buys quality: a dense model is not the best of them
    short = design_under_budget(1.0, 6e8, vocab=49152, train_flops=6 * 3e8 * 500e9, count=1)[0]
    assert short.loss != plans[0].loss


def test_the_cache_is_the_paper_s() -> None:
    found = [round(moe_memory(mobilemoe(size), 8192)[1] / 1e9, 3) for size in SHAPES]
    assert found == [0.084, 0.109, 0.134]


def test_a_budget_that_nothing_meets_names_the_closest() -> None:
    with pytest.raises(UsageError, match=r"no shape fits 0.01 GB and 1 MFLOPs .* the closest: d=256 L=5 E=1"):
        design_under_budget(0.01, 1e6)
    with pytest.raises(UsageError, match="memory_gb=-1"):
        design_under_budget(-1, 1e6)
    with pytest.raises(UsageError, match="size='xl'"):
        mobilemoe("xl")


def test_the_footprint_is_the_file_s(tmp_path: Path) -> None:
    moe = {"num_experts": 6, "top_k": 2, "expert_size": 32, "shared_size": 64}
    fields = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = mobilemoe("s", vocab_size=512, moe=moe, **fields)
    model = new_decoder(config)
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    weights, _ = moe_memory(config, 1, weight_bits=32)
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(weights, rel=0.01)
