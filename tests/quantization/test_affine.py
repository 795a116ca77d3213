"""The whitepaper's quantisers: its vectors, torch's kernels, and exact zeros."""

from __future__ import annotations

import pytest
import torch

from edgewright.errors import FormatError
from edgewright.quantization.affine import AffineScheme, dequantize, fake_quantize, quantize, ste_mask


def parameters(low: float, high: float, scheme: AffineScheme) -> tuple[torch.Tensor, torch.Tensor]:
    return scheme.parameters(torch.tensor(low), torch.tensor(high))


def test_the_vector_of_a_range_without_zero() -> None:
    scheme = AffineScheme(8)
    step, zero = parameters(2.1, 3.5, scheme)
    assert float(step) == pytest.approx(0.0137255, abs=1e-7) and int(zero) == 0
    x = torch.tensor([0, 0.01, 2.1, 3.5, 3.6, -0.2])
    assert quantize(x, step, zero, scheme).tolist() == [0, 1, 153, 255, 255, 0]


def test_the_vector_of_a_range_around_zero() -> None:
    scheme = AffineScheme(4)
    step, zero = parameters(-0.75, 2.25, scheme)
    assert float(step) == pytest.approx(0.2) and int(zero) == 4
    codes = quantize(torch.tensor([-1, -0.75, 0, 0.13, 1, 2.25, 3]), step, zero, scheme)
    assert codes.tolist() == [0, 0, 4, 5, 9, 15, 15]
    expected = torch.tensor([-0.8, -0.8, 0, 0.2, 1, 2.2, 2.2])
    torch.testing.assert_close(dequantize(codes, step, zero, scheme), expected)


def test_code_ranges() -> None:
    assert AffineScheme(8, symmetric=True, narrow=True).code_range == (-127, 127)
    assert AffineScheme(8, symmetric=True).code_range == (-128, 127)
    assert AffineScheme(4, symmetric=True, narrow=True).code_range == (-7, 7)
    assert AffineScheme(8, symmetric=True, signed=False, narrow=True).code_range == (0, 254)
    assert AffineScheme(2, symmetric=True, narrow=True).code_range == (-1, 1)
    assert AffineScheme(4).code_range == (0, 15)


def test_a_positive_range_has_its_zero_point_at_zero() -> None:
    assert int(parameters(0.0, 6.0, AffineScheme(8))[1]) == 0
    assert int(parameters(-6.0, 0.0, AffineScheme(8))[1]) == 255


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_values_and_gradients_are_those_of_torchs_kernels(bits: int, symmetric: bool, per_channel: bool) -> None:
    scheme = AffineScheme(bits, symmetric, narrow=symmetric, per_channel=per_channel)
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(5, 3, 4, generator=generator, requires_grad=True)
    step, zero = scheme.weight_parameters(0.5 * x)  # half the range, so that some values are clipped
    values = fake_quantize(x, step, zero, scheme)
    assert torch.equal(values, dequantize(quantize(x, step, zero, scheme), step, zero, scheme))
    upstream = torch.randn(5, 3, 4, generator=generator)
    values.backward(upstream)
    mask = ste_mask(x, step, zero, scheme)
    assert torch.equal(x.grad, upstream * mask)
    assert 0 < int((~mask).sum()) < x.numel()
    assert torch.equal(fake_quantize(values, step, zero, scheme), values)
    assert torch.equal(fake_quantize(torch.zeros(5, 2), step, zero, scheme), torch.zeros(5, 2))


def test_stochastic_rounding_is_unbiased_and_repeats() -> None:
    scheme = AffineScheme(8, stochastic=True)
    step, zero = parameters(0.0, 255.0, scheme)
    x = torch.full((40000,), 10.3, requires_grad=True)
    runs = [fake_quantize(x, step, zero, scheme, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*runs) and set(runs[0].tolist()) == {10.0, 11.0}
    assert float(runs[0].detach().mean()) == pytest.approx(10.3, abs=0.01)  # 4 standard errors of a coin at 0.3
    runs[0].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_range_of_width_zero_keeps_a_step() -> None:
    step, zero = parameters(0.0, 0.0, AffineScheme(8))
    assert float(step) == torch.finfo(torch.float32).eps and int(zero) == 0


@pytest.mark.parametrize("bits", [1, 9, 0, 16, True])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="it must be a whole number from 2 to 8"):
        AffineScheme(bits)


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_what_is_no_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(FormatError, match="of stem .*finite and in order"):
        AffineScheme().parameters(torch.tensor(low), torch.tensor(high), "stem")
