"""Activation fake quantisation: the spec's vectors, torchao as an independent implementation, the gradient rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.quantization.activations import fake_quantize_activation
from edgewright.quantization.config import ActivationConfig

VECTOR = torch.tensor([[0.5, -1.0, 0.33, 0.07]])


def spread(seed: int = 0) -> torch.Tensor:
    """Tokens over many magnitudes, with a zero, a positive and a negative one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 17, 64, generator=generator) * 10 ** torch.randn(3, 17, 1, generator=generator)
    x[0, 0], x[0, 1], x[0, 2] = 0.0, x[0, 1].abs(), -x[0, 2].abs()
    return x


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ActivationConfig(4), [0.571429, -1.0, 0.285714, 0.0]),
        (ActivationConfig(8), [0.503937, -1.0, 0.330709, 0.070866]),
        (ActivationConfig(4, symmetric=False), [0.5, -1.0, 0.3, 0.1]),
    ],
)
def test_vectors_of_the_specification(config, expected):
    # The expected numbers are printed to six digits.
    torch.testing.assert_close(fake_quantize_activation(VECTOR, config), torch.tensor([expected]), rtol=0, atol=6e-7)


@pytest.mark.parametrize("bits", [2, 4, 6, 8, 15])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_symmetric_equals_the_formula(bits, granularity):
    x = spread()[1:]
    top = 2 ** (bits - 1) - 1
    exact = x.double().numpy()
    peak = np.abs(exact).max(-1, keepdims=True) if granularity == "token" else np.abs(exact).max()
    found = fake_quantize_activation(x, ActivationConfig(bits, granularity)).double().numpy()
    codes = found * top / peak
    assert np.abs(codes - np.rint(codes)).max() < 1e-2  # float32: up to 16383 steps times 6e-8, and some
    assert np.abs(codes).max() <= top + 1e-2
    # Nearest level: half a step, plus float32 rounding where a value lies midway between two.
    assert (np.abs(found - exact) <= peak / top * (0.5 + 4e-3)).all()


def test_asymmetric_per_token_int8_equals_torchao():
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    peer = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False))
    for seed in range(4):
        x = spread(seed)
        assert torch.equal(fake_quantize_activation(x, ActivationConfig(8, symmetric=False)), peer(x))


def test_sixteen_bits_are_the_same_tensor():
    x = spread()
    assert fake_quantize_activation(x, ActivationConfig(16)) is x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_gradient_is_the_identity(symmetric, granularity):
    x = spread().requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    fake_quantize_activation(x, ActivationConfig(4, granularity, symmetric)).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_official_gradient_is_zero_at_and_beyond_the_clip():
    x = torch.tensor([[0.5, 2.0, -2.5, -1.9]], requires_grad=True)
    fake_quantize_activation(x, ActivationConfig(8), official_clip_grad=2.0).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]
    x.grad = None
    fake_quantize_activation(x, ActivationConfig(8, official_clip_grad=2.0)).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_tokens_stay_zero(symmetric):
    x = spread()
    config = ActivationConfig(4, symmetric=symmetric)
    assert fake_quantize_activation(x, config)[0, 0].abs().max() == 0
    assert not fake_quantize_activation(torch.zeros(2, 3), config).any()


def test_tokens_do_not_see_each_other():
    x = spread()
    changed = x.clone()
    changed[:, 5:] *= 100
    config = ActivationConfig(4)
    assert torch.equal(fake_quantize_activation(x, config)[:, :5], fake_quantize_activation(changed, config)[:, :5])


def test_half_types_compute_in_float32():
    x = spread().clamp(-100, 100).to(torch.bfloat16)
    found = fake_quantize_activation(x, ActivationConfig(8))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fake_quantize_activation(x.float(), ActivationConfig(8)).to(torch.bfloat16))


def test_infinity_is_refused_by_name_when_asked():
    x = spread()
    x[1, 2, 3] = float("inf")
    with pytest.raises(FormatError, match="layers.3.mlp.down_proj"):
        fake_quantize_activation(x, ActivationConfig(8, check_finite=True), layer="layers.3.mlp.down_proj")


@pytest.mark.parametrize("bits", [1, 17, 0, -4, 4.0])
def test_bits_outside_the_range_are_refused(bits):
    with pytest.raises(UsageError, match="2 to 16"):
        ActivationConfig(bits)
