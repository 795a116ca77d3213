"""Grids and fake quantisation: the paper's vectors, torch's own learnable operators, and what must hold exactly."""

from __future__ import annotations

import math

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.io.packed import PackedTensor
from edgewright.quantization.fake_quantize import Quantizer, fake_quantize, fake_quantized_linear
from edgewright.quantization.grids import GRIDS, grid_for_bits
from edgewright.quantization.scales import absmax_alpha, absmean_alpha, grouped, mse_alpha

ROW = torch.tensor([[-1.2, -0.8, -0.5, -0.26, -0.1, 0.0, 0.1, 0.26, 0.5, 0.51, 0.8, 1.0]])
LEVELS = {"binary": 2, "ternary": 3, "seq2": 4, "int2": 4, "int3": 8, "int4": 16, "int8": 256}


def values_and_slopes(name: str, weight: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    quantizer = Quantizer(GRIDS[name], scale_dtype=None)
    scale = torch.tensor([[alpha]])
    phi, mask = GRIDS[name].straight_through(weight / quantizer.scale(scale))
    return quantizer.values(weight, scale), phi, mask


def test_seq2_vector_of_the_paper():
    values, phi, mask = values_and_slopes("seq2", ROW, 1.0)
    expected = [-0.75, -0.75, -0.75, -0.25, -0.25, 0.25, 0.25, 0.25, 0.25, 0.75, 0.75, 0.75]
    assert torch.equal(values, torch.tensor([expected]))
    assert mask[0].tolist() == [0.0] + [1.0] * 10 + [0.0]
    slopes = [-0.75, 0.05, -0.25, 0.01, -0.15, 0.25, 0.15, -0.01, -0.25, 0.24, -0.05, 0.75]
    torch.testing.assert_close(phi, torch.tensor([slopes]), rtol=0, atol=1e-7)  # decimals are not exact in binary


def test_ternary_vector_of_the_paper():
    values, phi, _ = values_and_slopes("ternary", ROW, 1.0)
    third = 2 / 3
    torch.testing.assert_close(values, torch.tensor([[-third] * 3 + [0.0] * 5 + [third] * 4]), rtol=1e-7, atol=0)
    torch.testing.assert_close(phi[0, [0, -1]], torch.tensor([-third, third]), rtol=1e-7, atol=0)
    official, _ = GRIDS["ternary"].straight_through(ROW / (torch.ones(1) / 1.5), official_ternary=True)
    assert official[0, [0, -1]].tolist() == [-1.0, 1.0]
    assert torch.equal(official[:, 1:-1], phi[:, 1:-1])


def test_three_bit_vector_of_the_paper():
    weight = torch.tensor([[-1.3, -0.9, -0.31, 0.02, 0.26, 0.55, 0.74, 0.9]])
    values, phi, _ = values_and_slopes("int3", weight, 0.25)
    assert values[0].tolist() == [-1.0, -1.0, -0.25, 0.0, 0.25, 0.5, 0.75, 0.75]
    expected = torch.tensor([[-4, -0.4, 0.24, -0.08, -0.04, -0.2, 0.04, 3.0]])
    torch.testing.assert_close(phi, expected, rtol=0, atol=3e-7)


def test_binary_has_two_values_and_counts_zero_as_plus_one():
    values, phi, mask = values_and_slopes("binary", torch.tensor([[-2.0, -0.5, 0.0, 0.5, 2.0]]), 1.0)
    assert values[0].tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0]
    assert torch.equal(phi, values)
    assert mask[0].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_lsq_equals_torchs_learnable_fake_quantisation(bits):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(24, 48, generator=generator)
    # Powers of two: torch multiplies by 1/scale, we divide; only then do both round the same number.
    scale = 2.0 ** torch.randint(-4, 0, (24,), generator=generator).float()
    upstream = torch.randn(24, 48, generator=generator)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # Within half a step outside the range torch passes the gradient (it masks after rounding), the paper does not.
    u = weight / scale.unsqueeze(1)
    weight[((u < low) & (u > low - 1)) | ((u > high) & (u < high + 1))] = 0.0
    factor = 1 / math.sqrt(weight.numel() * high)

    ours_w, ours_a = weight.clone().requires_grad_(), scale.clone().reshape(-1, 1).requires_grad_()
    ours = fake_quantize(ours_w, ours_a, Quantizer(grid_for_bits(bits), scale_dtype=None))
    ours.backward(upstream)
    torch_w, torch_a = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    theirs = torch._fake_quantize_learnable_per_channel_affine(torch_w, torch_a, torch.zeros(24), 0, low, high, factor)
    theirs.backward(upstream)

    assert torch.equal(ours, theirs)
    assert torch.equal(ours_w.grad, torch_w.grad)
    # Sums of 48 products in another order.
    torch.testing.assert_close(ours_a.grad[:, 0], torch_a.grad, rtol=1e-5, atol=1e-7)
    zero = torch.zeros(24, dtype=torch.int32)
    assert torch.equal(ours, torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, low, high))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("group", [48, 16])
def test_fused_linear_equals_fake_quantise_then_linear(name, group):
    generator = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(24, 48, generator=generator), torch.randn(5, 7, 48, generator=generator)
    alpha = absmax_alpha(grouped(weight, 48 // group), GRIDS[name]) * 0.8
    quantizer = Quantizer(GRIDS[name])
    bias = torch.randn(24, generator=generator)
    results = []
    for fused in (True, False):
        tensors = [t.clone().requires_grad_() for t in (inputs, weight, alpha, bias)]
        x, w, a, b = tensors
        out = (
            fake_quantized_linear(x, w, a, b, quantizer)
            if fused
            else torch.nn.functional.linear(x, fake_quantize(w, a, quantizer), b)
        )
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in tensors)])
    for fused_value, plain_value in zip(*results, strict=True):
        torch.testing.assert_close(fused_value, plain_value, rtol=1e-5, atol=1e-5)  # other order of summation


@pytest.mark.parametrize("name", GRIDS)
def test_gradient_of_the_scale_is_the_derivative_for_fixed_codes(name):
    """Where no weight changes its code, alpha's gradient is the true derivative of sum(upstream * value)."""
    grid = GRIDS[name]
    generator = torch.Generator().manual_seed(2)
    codes = grid.levels[torch.randint(0, len(grid.levels), (4, 32), generator=generator)]
    weight = (codes * 0.5).double().float()  # exactly on the grid: the rounding error that STE adds is zero
    alpha = torch.full((4, 1), 0.5 * grid.scales_per_alpha)
    upstream = torch.randn(4, 32, generator=generator)
    quantizer = Quantizer(grid, scale_dtype=None)
    _phi, mask = grid.straight_through(weight / quantizer.scale(alpha))
    _, gradient = quantizer.gradients(weight, alpha, upstream.clone())
    # Inside the range STE moves weight and level together, so only clipped weights (and signs) contribute.
    expected = torch.where(mask.bool() & (grid.kind != "binary"), 0.0, codes / grid.scales_per_alpha)
    factor = 1 / math.sqrt(weight.numel() * grid.positive_limit)
    torch.testing.assert_close(gradient[:, 0], (expected * upstream).sum(-1) * factor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_every_value_lies_on_the_grid_and_codes_decode_to_it(name):
    grid = GRIDS[name]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 512, generator=generator) * torch.logspace(-4, 4, 8).unsqueeze(1)
    weight[3] = 0.0
    for rule in (absmax_alpha, absmean_alpha, mse_alpha):
        alpha = rule(grouped(weight, 1), grid)
        quantizer = Quantizer(grid)
        codes, step = quantizer.encode(weight, alpha)
        assert torch.isfinite(step).all() and (step != 0).all()
        assert torch.equal(step, step.bfloat16().float())
        packed = PackedTensor(codes.to(torch.int8), step, name)
        assert torch.equal(packed.dequantize(), quantizer.values(weight, alpha))
        for row in range(8):
            assert len(quantizer.values(weight, alpha)[row].unique()) <= LEVELS[name]
    assert len(grid.levels) == LEVELS[name]


@pytest.mark.parametrize("name", GRIDS)
def test_searched_scale_is_never_worse_than_absmax_or_absmean(name):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(16, 64, generator=generator)
    importance = torch.rand(1, 1, 64, generator=generator) + 0.1
    quantizer = Quantizer(GRIDS[name], scale_dtype=None)

    def error(alpha):
        return ((quantizer.values(weight, alpha) - weight).square() * importance[0]).sum().item()

    searched = error(mse_alpha(grouped(weight, 1), GRIDS[name], importance, None))
    assert searched <= 1.001 * min(
        error(rule(grouped(weight, 1), GRIDS[name])) for rule in (absmax_alpha, absmean_alpha)
    )


def test_unknown_width_lists_the_known_ones():
    with pytest.raises(UsageError, match="1, 1.58, 2, 3, 4, 8"):
        grid_for_bits(5)
