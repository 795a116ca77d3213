"""int8 layers equal the integer formula, computed here in NumPy's integers, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgewright.errors import UsageError
from edgewright.systems.low_precision_recsys.units import (
    HalfLinear,
    Int8Linear,
    accumulate_16,
    integer_product,
    split_outliers,
    weight_codes,
)


def layer(inputs: int = 40, outputs: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight, torch.randn(outputs, generator=generator), torch.randn(17, inputs, generator=generator) * 2 - 0.5


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("inputs", [1, 40, 1500])
def test_the_integer_formula_exactly(static: bool, inputs: int) -> None:
    weight, bias, x = layer(inputs)
    codes, scale = weight_codes(weight)
    step, zero = np.float32(0.04), 100
    found = Int8Linear(codes, scale, bias, (float(step), zero) if static else None)(x)

    w, values = weight.numpy(), x.numpy()
    s_c = np.abs(w).max(1) / np.float32(127)
    q_w = np.clip(np.round(w / s_c[:, None]), -127, 127).astype(np.int64)
    if static:
        s_x, z_x = np.full((17, 1), step, np.float32), np.full((17, 1), zero, np.int64)
    else:
        low, high = np.minimum(values.min(1, keepdims=True), 0), np.maximum(values.max(1, keepdims=True), 0)
        s_x = ((high - low) / np.float32(255)).astype(np.float32)
        z_x = np.clip(np.round(-low / s_x), 0, 255).astype(np.int64)
    q_x = np.clip(np.round(values / s_x).astype(np.int64) + z_x, 0, 255)
    product = (q_x - z_x) @ q_w.T  # integers
    expected = product.astype(np.float32) * s_c * s_x + bias.numpy()
    assert np.array_equal(found.numpy(), expected.astype(np.float32))


def test_products_are_exact_where_float32_sums_are_not() -> None:
    x, w = torch.full((2, 5000), 255.0), torch.full((3, 5000), 127, dtype=torch.int8)
    w[:, 0], x[:, 0] = 1, 1
    assert integer_product(x, w).tolist() == [[4999 * 255 * 127 + 1] * 3] * 2


def test_rows_that_are_zero_and_shapes() -> None:
    weight, bias, x = layer()
    weight[2] = 0.0
    x[3] = 0.0
    low = Int8Linear(*weight_codes(weight), bias)
    assert torch.equal(low(x)[3], bias) and torch.equal(low(x)[:, 2], bias[2].expand(17))
    assert low(x.reshape(1, 17, 40)).shape == (1, 17, 9) and low(x[:0]).shape == (0, 9)
    assert low.saturation(x) == 0.0
    fixed = Int8Linear(*weight_codes(weight), None, (0.001, 0))
    assert 0.5 < fixed.saturation(x) <= 1.0


def test_the_clip_of_least_error_never_loses() -> None:
    weight = layer()[0]
    weight[:, 0] *= 6
    errors = []
    for clip in ("max", "l2"):
        codes, scale = weight_codes(weight, clip)
        errors.append((codes.float() * scale[:, None] - weight).square().sum(1))
    assert bool((errors[1] <= errors[0]).all()) and float(errors[1].sum()) < float(errors[0].sum())


def test_sixteen_bits_are_the_same_until_they_overflow() -> None:
    weight, bias, x = layer(64)
    codes, scale = weight_codes(weight * 0.1 + 1e-3)
    main, outliers = split_outliers(codes)
    assert torch.equal(main.float() + outliers, codes.float())
    assert int(main.max()) <= 63 and int(main.min()) >= -64
    full = Int8Linear(codes, scale, bias)
    sixteen = Int8Linear(codes, scale, bias, accumulate=16, spill=2)  # a pair of products always fits
    # the outliers' share is a sum of floats
    torch.testing.assert_close(sixteen(x), full(x), rtol=1e-5, atol=1e-5)
    assert sixteen.overflows == 0
    wide = Int8Linear(codes, scale, bias, accumulate=16, spill=64)
    assert not torch.equal(wide(x), sixteen(x)) and wide.overflows > 0
    many = torch.full((1, 64), 255.0)
    total, lost = accumulate_16(many, torch.full((1, 64), 63, dtype=torch.int8), 64)
    assert total.item() == 32767 and lost > 0
    exact, lost = accumulate_16(many, torch.full((1, 64), 63, dtype=torch.int8), 2)
    assert exact.item() == 64 * 255 * 63 and lost == 0


def test_half_weights_compute_in_float32() -> None:
    weight, bias, x = layer()
    for kind in (torch.float16, torch.bfloat16):
        low = HalfLinear(weight, bias, kind)
        assert torch.equal(low(x), F.linear(x, weight.to(kind).float(), bias))


def test_bad_arguments() -> None:
    weight = layer()[0]
    with pytest.raises(UsageError, match="clip='mse'"):
        weight_codes(weight, "mse")
    weight[4, 0] = float("nan")
    with pytest.raises(ValueError, match="output channel 4"):
        weight_codes(weight)
    with pytest.raises(UsageError, match="accumulate=8"):
        Int8Linear(*weight_codes(layer()[0]), None, accumulate=8)
