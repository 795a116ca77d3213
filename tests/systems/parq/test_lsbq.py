"""LSBQ and even targets: the specification's vector, brute force, torchao as an independent implementation."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.quantization.config import WeightConfig
from edgewright.quantization.fake_quantize import Quantizer
from edgewright.quantization.grids import GRIDS
from edgewright.quantization.scales import initial_alpha
from edgewright.systems.parq.lsbq import LSBQ, Uniform, greedy, optimal_pair, optimal_ternary, signed_sums
from edgewright.systems.parq.proximal import ProxHard, Targets

VECTOR = torch.tensor([[0.9, -0.4, 0.1, -1.6, 0.5, 0.3, -0.7, 1.1]])


def matrix(rows: int = 6, columns: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weights: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Squared error of each row to its nearest level."""
    return (weights.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1).square().sum(1)


def test_greedy_vector():
    found = greedy(VECTOR, 2)
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.375]]))
    config = LSBQ(2)
    levels = Targets(config.fit(VECTOR), config.even)
    expected = torch.tensor([[1.075, -0.325, 0.325, -1.075, 0.325, 0.325, -0.325, 1.075]])
    torch.testing.assert_close(ProxHard().apply(VECTOR, levels, 0, torch.empty_like(VECTOR)), expected)


def test_zero_counts_as_positive():
    torch.testing.assert_close(greedy(torch.tensor([[0.0, 2.0]]), 2), torch.tensor([[1.0, 1.0]]))


def test_optimal_pair_is_the_best_of_all_splits():
    weights = matrix(4, 9).double()
    for row in weights:
        magnitudes = row.abs().sort().values
        best = min(
            float(error(row[None], signed_sums(torch.stack([(a + b) / 2, (a - b) / 2])[None])))
            for i in range(1, 9)
            for a, b in [(magnitudes[i:].mean(), magnitudes[:i].mean())]
        )
        pair = optimal_pair(row[None])
        assert float(error(row[None], signed_sums(pair))) == pytest.approx(best, rel=1e-12)
        v1 = float(pair[0, 0])
        below = int((magnitudes <= v1).sum())  # the paper's condition on the split
        assert float(pair.sum()) == pytest.approx(float(magnitudes[below:].mean()), rel=1e-12)


def test_optimal_ternary_is_the_best_of_all_supports():
    weights = matrix(5, 8).double()
    for row in weights:
        candidates = [
            float(
                (row - torch.where(torch.tensor(kept), row.abs()[list(kept)].mean() * row.sign(), 0.0)).square().sum()
            )
            for kept in itertools.product((False, True), repeat=8)
            if any(kept)
        ]
        level = optimal_ternary(row[None])
        levels = torch.cat([-level, torch.zeros_like(level), level], 1)
        assert float(error(row[None], levels)) == pytest.approx(min(candidates), rel=1e-12)
        kept = row.abs() > level[0] / 2
        assert float(level) == pytest.approx(float(row.abs()[kept].mean()), rel=1e-12)


def test_optimal_is_never_worse_than_greedy_and_one_weight_works():
    weights = matrix(50, 64)
    slack = 1 + 1e-6  # float32 sums
    assert (error(weights, LSBQ(2, optimal=True).fit(weights)) <= slack * error(weights, LSBQ(2).fit(weights))).all()
    assert LSBQ(2, optimal=True).fit(torch.tensor([[3.0]])).tolist() == [[-3, -3, 3, 3]]
    assert LSBQ(0, optimal=True).fit(torch.tensor([[3.0]])).tolist() == [[3.0]]


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("by_row", [True, False])
def test_greedy_equals_torchao(bits, by_row):
    from torchao.prototype.parq import quant

    weights = matrix()
    _, expected = quant.LSBQuantizer().quantize(weights, bits, dim=-1 if by_row else None)
    config = LSBQ(bits, scale_dtype="float32")
    found = Targets(config.fit(weights if by_row else weights.reshape(1, -1)), config.even).levels()
    torch.testing.assert_close(found if by_row else found[0], expected)


def test_optimal_equals_torchao_where_that_is_optimal():
    quant = importlib.import_module("torchao.prototype.parq.quant")
    weights = matrix()
    flat = weights.reshape(1, -1)
    peer = quant.LSBQuantizer(optimal=True)
    torch.testing.assert_close(LSBQ(2, optimal=True).fit(flat)[0], peer.quantize(weights, 2)[1])
    parity = LSBQ(0, optimal=True, granularity="tensor", scale_dtype="float32", official_ternary_level=True)
    torch.testing.assert_close(parity.fit(flat)[0], peer.quantize(weights, 0)[1][2:])
    # By row torchao tries sorted weights instead of means: its levels are a little worse.
    theirs = error(weights, peer.quantize(weights, 2, dim=-1)[1])
    ours = error(weights, LSBQ(2, optimal=True).fit(weights))
    assert (ours <= theirs * (1 + 1e-6)).all() and ours.sum() < theirs.sum()


@pytest.mark.parametrize(
    ("config", "bits", "peer"),
    [
        (Uniform("binary", "mean"), 1, "UnifQuantizer"),
        (Uniform("seq2", "mean"), 2, "UnifQuantizer"),
        (Uniform("half3", "mean"), 3, "UnifQuantizer"),
        (Uniform("half4", "mean"), 4, "UnifQuantizer"),
        (Uniform("ternary", "max"), 0, "TernaryUnifQuantizer"),
        (Uniform("ternary", "max"), 2, "MaxUnifQuantizer"),
        (Uniform("symmetric4", "max"), 4, "MaxUnifQuantizer"),
        (Uniform("int4", "range"), 4, "AsymUnifQuantizer"),
    ],
)
def test_even_levels_equal_torchao(config, bits, peer):
    quant = importlib.import_module("torchao.prototype.parq.quant.uniform")
    weights = matrix()
    for rows, dim in ((weights, -1), (weights.reshape(1, -1), None)):
        _, expected = getattr(quant, peer)().quantize(rows if dim else weights, bits, dim=dim)
        step = Uniform(config.grid, config.scale, scale_dtype="float32").fit(rows)
        found = step * config.even.levels(rows)
        if (config.grid, peer) == ("ternary", "MaxUnifQuantizer"):
            found = found * 1.5  # its three levels reach max|w|, the ternary rule's stop at two thirds of it
        torch.testing.assert_close(found if dim else found[0], expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", ["absmax", "absmean", "mse"])
def test_package_rules_give_the_values_of_fake_quantised_layers(grid, rule):
    weights = matrix()
    config = Uniform.of(WeightConfig(grid, scale=rule))
    found = ProxHard().apply(weights, Targets(config.fit(weights), config.even), 0, torch.empty_like(weights))
    quantizer = Quantizer(GRIDS[grid])
    alpha = initial_alpha(weights.unsqueeze(1), GRIDS[grid], rule, quantizer.scale_dtype)
    assert torch.equal(found, quantizer.values(weights, alpha))


def test_steps_are_rounded_unless_asked_otherwise():
    for config in (LSBQ(1), LSBQ(0), LSBQ(0, optimal=True), Uniform("seq2"), Uniform("int4", "max")):
        step = config.fit(matrix())
        assert torch.equal(step, step.bfloat16().float())
    assert not torch.equal((step := LSBQ(1, scale_dtype="float32").fit(matrix())), step.bfloat16().float())
    assert (LSBQ(1).fit(torch.zeros(2, 4)) > 0).all(), "a row of zeros keeps a valid step"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LSBQ(9), "bits=9"),
        (lambda: LSBQ(3, optimal=True), "not 3"),
        (lambda: LSBQ(1, granularity="column"), "granularity='column'"),
        (lambda: LSBQ(1, granularity=0), "granularity=0"),
        (lambda: LSBQ(0, ternary_factor=0), "ternary_factor=0"),
        (lambda: LSBQ(1, scale_dtype="int8"), "scale_dtype='int8'"),
        (lambda: Uniform("int5"), "grid='int5'; it must be one of binary"),
        (lambda: Uniform("seq2", "median"), "scale='median'; it must be one of mean"),
        (lambda: Uniform("ternary", "mean"), "not defined for ternary"),
        (lambda: Uniform("half3", "mse"), "scale='mse'; it must be one of mean, max, range"),
        (lambda: Uniform.of(WeightConfig("binary", scale="absmean", center=True)), "center=True"),
    ],
)
def test_bad_settings_say_what_is_allowed(build, words):
    with pytest.raises(UsageError, match=words):
        build()
