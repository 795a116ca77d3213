"""Elastic activations: the vectors of the specification, and every gradient term by term."""

from __future__ import annotations

import math

import pytest
import torch

from edgewright.errors import CheckFailed, UsageError
from edgewright.quantization.elastic import SMALLEST_ALPHA, ElasticConfig, ElasticQuantizer

VECTOR = torch.tensor([0.0, 0.1, 0.19, 0.21, 0.3, 0.39, 0.41, 1.0])
MASK = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0])
PHI = torch.tensor([0.0, -0.25, -0.475, 0.475, 0.25, 0.025, 1.0, 1.0])


def quantizer(config: ElasticConfig, alpha: float, features: int = 0) -> ElasticQuantizer:
    module = ElasticQuantizer(config, "layer", features)
    module.alpha.data.fill_(alpha)
    module.calibrated.fill_(True)
    return module


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_unsigned_vector_of_the_specification():
    module = quantizer(ElasticConfig(signed=False), 0.4, 8)
    x = VECTOR.clone().requires_grad_()
    value = module(x)
    assert torch.equal(value, torch.tensor(0.4) * torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1]))
    upstream = torch.arange(1.0, 9.0)
    value.backward(upstream)
    assert torch.equal(x.grad, upstream * MASK)
    assert torch.equal(module.shift.grad, upstream * MASK)  # shift is -beta, so d beta = -sum dX
    # y is a float32 quotient such as 0.19 / 0.4, and phi a difference of it.
    torch.testing.assert_close(module.alpha.grad, (upstream * PHI).sum() / math.sqrt(8), rtol=1e-5, atol=0)


def test_signed_values_and_gradients():
    module = quantizer(ElasticConfig(), 0.5, 6).double()
    x = torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.5, 0.6], dtype=torch.float64).requires_grad_()
    value = module(x)
    assert value.tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5]  # zero counts as +1
    upstream = spread(6)
    value.backward(upstream)
    assert torch.equal(x.grad, upstream * torch.tensor([0.0, 1, 1, 1, 1, 0]))
    signs = torch.tensor([-1.0, -1, -1, 1, 1, 1])
    torch.testing.assert_close(module.alpha.grad, (upstream * signs).sum() / math.sqrt(6), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("levels", "signed", "low", "high"),
    [
        ("ternary", True, -1, 1),
        ("ternary", False, 0, 2),
        (2, True, -2, 1),
        (2, False, 0, 3),
        (4, True, -8, 7),
        (4, False, 0, 15),
    ],
)
def test_more_levels_equal_the_formula(levels, signed, low, high):
    module = quantizer(ElasticConfig(levels, signed, shift=False), 0.3).double()
    x = spread(5, 40).requires_grad_()
    floor = 0.0 if signed else x.detach().min()
    y = (x.detach() - floor) / module.alpha.detach()
    value = module(x)
    torch.testing.assert_close(value, 0.3 * y.round().clamp(low, high) + floor, rtol=1e-6, atol=1e-12)
    assert len(value.unique()) <= high - low + 1
    upstream = spread(5, 40, seed=1)
    value.backward(upstream)
    inside = (y >= low) & (y <= high)
    slope = torch.where(inside, y.round() - y, y.clamp(low, high))
    assert torch.equal(x.grad, upstream * inside)
    g = 1 / math.sqrt(x.numel() * high)
    torch.testing.assert_close(module.alpha.grad, g * (upstream * slope).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("config", [ElasticConfig(signed=False), ElasticConfig("ternary"), ElasticConfig(3)])
def test_gradients_are_those_of_the_surrogate(config):
    """Finite differences of clip(y, low, high) with round(y) - y held fixed: the straight-through rule, written out."""
    module = quantizer(config, 0.4, 12).double()
    x = spread(7, 12).abs() * 0.3 + 0.013 if not config.signed else spread(7, 12)
    upstream = spread(7, 12, seed=1)
    low, high = config.bounds

    def surrogate(x, alpha, shift, held):
        y = (x + shift) / alpha
        # round(y) = y + held inside the range; the difference does not move with y there
        return alpha * torch.where((y >= low) & (y <= high), y + held, y.clamp(low, high))

    start = (x, module.alpha.detach(), module.shift.detach())
    y0 = (x + start[2]) / start[1]
    held = y0.round() - y0

    def total(x, alpha, shift):
        return (upstream * surrogate(x, alpha, shift, held)).sum()

    given = x.clone().requires_grad_()
    module(given).backward(upstream)
    step = 1e-7
    for j in range(0, 12, 5):
        moved = start[2].clone()
        moved[j] += step
        slope = (total(x, start[1], moved) - total(*start)) / step
        torch.testing.assert_close(module.shift.grad[j], slope, rtol=1e-5, atol=1e-6)  # finite differences
    slope = (total(x, start[1] + step, start[2]) - total(*start)) / step
    g = 1 / math.sqrt(x.numel() * high)
    torch.testing.assert_close(module.alpha.grad / g, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        (ElasticConfig(shift=False), 2.0),
        (ElasticConfig(signed=False, shift=False), 4.0),
        (ElasticConfig(2, shift=False), 2.0),
        (ElasticConfig(2, signed=False, shift=False), 4 / math.sqrt(3)),
        (ElasticConfig("ternary", signed=False, shift=False), 4 / math.sqrt(3)),
        (ElasticConfig(4, shift=False), 2 / math.sqrt(7)),
        (ElasticConfig(4, signed=False, shift=False), 4 / math.sqrt(15)),
    ],
)
def test_the_first_batch_sets_the_scale_and_no_later_one(config, factor):
    module = ElasticQuantizer(config, "layer")
    x = spread(16, 20).abs().float()
    module(x)
    torch.testing.assert_close(module.alpha.detach(), factor * x.mean(), rtol=1e-6, atol=0)
    first = module.alpha.detach().clone()
    module(10 * x)
    assert torch.equal(module.alpha, first)


def test_scale_and_its_mark_survive_a_state_dict():
    one, two = (ElasticQuantizer(ElasticConfig(), "layer", 4) for _ in range(2))
    one.calibrate(torch.full((3, 4), 2.0))
    two.load_state_dict(one.state_dict())
    assert two.is_calibrated() and two.alpha.item() == 4.0
    two(torch.ones(2, 4))
    assert two.alpha.item() == 4.0


def test_padding_stays_zero_and_gradients_on_or_off_agree():
    module = ElasticQuantizer(ElasticConfig(signed=False, shift=False), "layer")
    probabilities = spread(3, 5, 5).float().softmax(-1)
    probabilities[..., 3:] = 0.0
    value = module(probabilities)
    assert set(value.unique().tolist()) <= {0.0, module.alpha.item()} and bool((value[..., 3:] == 0).all())
    with torch.no_grad():
        assert torch.equal(module(probabilities), value)


def test_a_scale_that_falls_too_low_is_held_and_still_learns():
    module = quantizer(ElasticConfig(shift=False), -1.0)
    value = module(torch.tensor([1.0, -1.0]))
    assert torch.equal(value, torch.tensor([1.0, -1.0]) * SMALLEST_ALPHA)
    value.sum().backward()
    value = module(torch.tensor([1.0, 1.0]))
    value.sum().backward()
    assert module.alpha.grad.abs() > 0


def test_frozen_scale_and_negative_inputs():
    frozen = ElasticQuantizer(ElasticConfig(learn_scale=False, shift=False), "layer")
    x = torch.ones(2, 2, requires_grad=True)
    frozen(x).sum().backward()
    assert frozen.alpha.grad is None and x.grad is not None
    clipping = quantizer(ElasticConfig(signed=False), 0.4, 2)
    assert clipping(torch.tensor([-1.0, 1.0])).tolist() == [0.0, pytest.approx(0.4)]
    checking = quantizer(ElasticConfig(signed=False, check=True), 0.4, 2)
    checking.shift.data.fill_(-0.3)  # a threshold is no negative input
    checking(torch.tensor([0.0, 1.0]))
    with pytest.raises(CheckFailed, match="input of layer has negative values"):
        checking(torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("levels", [1, 9, 0, True, "unary", 2.5])
def test_unknown_levels_are_refused(levels):
    with pytest.raises(UsageError, match="elastic levels"):
        ElasticConfig(levels)


def test_a_shift_needs_its_number_of_features():
    with pytest.raises(UsageError, match="number of features"):
        ElasticQuantizer(ElasticConfig(), "layer")
