"""Clipped min-max activations and the unsigned elastic set: formula, gradient, independence of other tokens, NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.quantization.clipped_activation import ClippedActivationConfig
from edgewright.quantization.elastic import ElasticConfig


def draw(*shape: int, seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def unsigned(levels: Any, floor: Any) -> ElasticConfig:
    return ElasticConfig(levels, signed=False, shift=False, floor=floor)


def test_it_is_the_published_formula() -> None:
    x = draw(5, 7)
    cut = np.clip(x.double().numpy(), -2.5, 2.5)
    s = 127 / np.abs(cut).max()
    expected = np.round(s * cut) / s
    got = ClippedActivationConfig(granularity="tensor").build("layer", 7)(x)
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-6)


def test_each_token_may_have_its_own_range() -> None:
    quantizer = ClippedActivationConfig().build("layer", 7)
    x = draw(5, 7, scale=0.3)
    assert torch.equal(quantizer(x)[2:3], quantizer(x[2:3]))
    whole = ClippedActivationConfig(granularity="tensor").build("layer", 7)
    x[0, 0] = 2.5
    assert not torch.equal(whole(x)[2:3], whole(x[2:3]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_is_zero_where_the_cut_is_reached(symmetric: bool) -> None:
    x = torch.tensor([[-3.0, -2.5, -2.4, 0.0, 1.0, 2.4999, 2.5, 9.0]], requires_grad=True)
    ClippedActivationConfig(symmetric=symmetric).build("layer", 8)(x).sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]


def test_without_a_cut_it_is_plain_min_max() -> None:
    x = draw(4, 6, scale=20.0)
    config = ClippedActivationConfig(clip=None)
    quantized = config.build("layer", 6)(x)
    assert float(quantized.abs().max()) == pytest.approx(float(x.abs().max()), rel=1e-6)


def test_asymmetric_keeps_zero_and_uses_all_codes() -> None:
    x = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 0.0
    quantized = ClippedActivationConfig(symmetric=False).build("layer", 50)(x)
    assert torch.equal(quantized[:, 0], torch.zeros(3))
    assert float((quantized - x).abs().max()) <= float(x.max()) / 255 / 2 * 1.001  # half a step, and float32's rounding


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf")])
def test_a_senseless_cut_is_refused(clip: float) -> None:
    with pytest.raises(UsageError, match="clip=.*; it must be a number above 0, or None"):
        ClippedActivationConfig(clip=clip)


@pytest.mark.parametrize(
    "config", [ClippedActivationConfig(symmetric=False), unsigned("binary", "token"), unsigned("ternary", "token")]
)
def test_nan_in_an_unsigned_set_names_the_layer(config: ClippedActivationConfig | ElasticConfig) -> None:
    x = draw(2, 4).abs()
    quantizer = config.build("decoder.fc2", 4)
    quantizer(x)
    x[1, 2] = float("nan")
    with pytest.raises(FormatError, match="the input of layer decoder.fc2 holds NaN"):
        quantizer(x)


# -- the unsigned elastic set ------------------------------------------------------------------------------------------


def levels(x: torch.Tensor, alpha: float, floor: np.ndarray, top: int) -> torch.Tensor:
    y = np.clip(np.round((x.double().numpy() - floor) / alpha), 0, top)
    return torch.from_numpy(y * alpha + floor).float()


@pytest.mark.parametrize("floor", ["token", "tensor", "zero"])
def test_three_levels_above_a_floor(floor: str) -> None:
    x = draw(4, 6).abs() if floor == "zero" else draw(4, 6)
    quantizer = unsigned("ternary", floor).build("layer", 6)
    got = quantizer(x).detach()
    alpha = quantizer.alpha.item()
    assert alpha == pytest.approx(4 * float(x.abs().mean()) / 3**0.5, rel=1e-6)
    start = {"token": x.amin(-1, keepdim=True).double().numpy(), "tensor": x.min().item(), "zero": 0.0}[floor]
    torch.testing.assert_close(got, levels(x, alpha, np.asarray(start), 2), rtol=1e-5, atol=1e-6)


def test_two_levels_have_no_floor() -> None:
    x = draw(4, 6)
    quantizer = unsigned("binary", "token").build("layer", 6)
    got = quantizer(x).detach()
    torch.testing.assert_close(got, levels(x, quantizer.alpha.item(), np.asarray(0.0), 1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("floor", ["token", "zero"])
def test_a_token_does_not_depend_on_the_others(floor: str) -> None:
    x = draw(4, 6).abs()
    quantizer = unsigned("ternary", floor).build("layer", 6)
    assert torch.equal(quantizer(x)[1:2], quantizer(x[1:2]))


def test_a_zero_floor_does_not_see_the_mask() -> None:
    """A row of probabilities gives the same values whether or not masked positions stand beside it."""
    row = torch.softmax(draw(1, 5), -1)
    quantizer = unsigned("ternary", "zero").build("layer", 5)
    quantizer.calibrate(row)
    masked = torch.nn.functional.pad(row, (0, 3))
    assert torch.equal(quantizer(masked)[:, :5], quantizer(row))


def test_an_unknown_floor_is_refused() -> None:
    with pytest.raises(UsageError, match="floor='batch'; it must be one of tensor, token, zero"):
        unsigned("ternary", "batch")
