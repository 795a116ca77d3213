"""The entropy rule for scales: the published vector, the probability of zero, what a change of scale does."""

from __future__ import annotations

import math

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.quantization.config import WeightConfig
from edgewright.quantization.grids import grid_named
from edgewright.quantization.layers import WeightQuantizer
from edgewright.quantization.scales import entropy_alpha

VECTOR = torch.tensor([[0.9, -0.4, 0.1, -1.6, 0.5, 0.3, -0.7, 1.1]])
MILLION = 1_000_000


def quantizer(weight: torch.Tensor, grid: str) -> WeightQuantizer:
    return WeightQuantizer(weight, WeightConfig(grid, "row", scale="entropy", scale_dtype="float32"), "layer")


def codes(weight: torch.Tensor, grid: str = "ternary") -> torch.Tensor:
    return quantizer(weight, grid).pack(weight).codes


def test_vector_of_the_specification() -> None:
    ternary = quantizer(VECTOR, "ternary").pack(VECTOR)
    assert ternary.codes.tolist() == [[1, 0, 0, -1, 1, 0, -1, 1]]
    # one float32 rounding of 4/3 of the mean
    torch.testing.assert_close(ternary.step, torch.tensor([[4 / 3 * 0.7]]), rtol=1e-6, atol=0)
    binary = quantizer(VECTOR, "binary").pack(VECTOR)
    assert binary.codes.tolist() == [[1, -1, 1, -1, 1, 1, -1, 1]]
    torch.testing.assert_close(binary.step, torch.tensor([[0.7]]), rtol=1e-6, atol=0)


def samples(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(1, MILLION, generator=generator) * 2 - 1
    if name == "uniform":
        return uniform
    if name == "Laplace":
        return -uniform.sign() * torch.log1p(-uniform.abs())
    return torch.randn(1, MILLION, generator=generator)


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("Gaussian", math.erf(2 / 3 * math.sqrt(2 / math.pi) / math.sqrt(2))),
        ("Laplace", 1 - math.exp(-2 / 3)),
        ("uniform", 1 / 3),
    ],
)
def test_probability_of_zero(name: str, zero: float) -> None:
    # A share of a million samples has a standard error of 5e-4; the seed is fixed.
    assert float((codes(samples(name)) == 0).float().mean()) == pytest.approx(zero, abs=2e-3)
    assert {"Gaussian": 0.405, "Laplace": 0.487, "uniform": 0.333}[name] == pytest.approx(zero, abs=6e-4)


def test_uniform_rows_have_the_greatest_entropy() -> None:
    found = codes(samples("uniform"))
    shares = [float((found == level).float().mean()) for level in (-1, 0, 1)]
    assert -sum(p * math.log2(p) for p in shares) == pytest.approx(math.log2(3), abs=1e-3)
    signs = float((codes(samples("uniform"), "binary") > 0).float().mean())
    assert signs == pytest.approx(0.5, abs=2e-3)


def least_squares_ternary(row: torch.Tensor) -> float:
    """The exact best ternary step of a row: keeping the k largest magnitudes costs |w|^2 - (their sum)^2 / k."""
    sums = row.abs().double().sort(descending=True).values.cumsum(0)
    counts = torch.arange(1, len(row) + 1)
    best = int((sums.square() / counts).argmax())
    return float(sums[best] / counts[best])


def test_on_uniform_rows_it_is_the_least_squares_step() -> None:
    rows = samples("uniform").reshape(10, -1)
    found = entropy_alpha(rows.unsqueeze(1), grid_named("ternary")) / 1.5
    for row, step in zip(rows, found.flatten(), strict=True):
        # Both are 2/3 of the range in the limit; 1% is what a row of 100 000 samples leaves.
        assert float(step) == pytest.approx(least_squares_ternary(row), rel=1e-2)


@pytest.mark.parametrize("grid", ["ternary", "binary"])
def test_scale_sign_and_row_order(grid: str) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    plain = quantizer(weight, grid).pack(weight)
    scaled = quantizer(weight * 4, grid).pack(weight * 4)  # a power of two changes no digit
    assert torch.equal(scaled.codes, plain.codes) and torch.equal(scaled.step, plain.step * 4)
    mirrored = quantizer(-weight, grid).pack(-weight)
    assert torch.equal(mirrored.codes, -plain.codes) and torch.equal(mirrored.step, plain.step)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(codes(weight[order], grid), plain.codes[order])


@pytest.mark.parametrize("grid", ["ternary", "binary"])
def test_the_gradient_passes_everywhere(grid: str) -> None:
    weight = (torch.randn(4, 32, generator=torch.Generator().manual_seed(3)) * 3).requires_grad_()
    quantizer(weight, grid).values(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("grid", ["ternary", "binary"])
def test_a_row_of_zeros(grid: str) -> None:
    weight = torch.zeros(2, 8, requires_grad=True)
    values = quantizer(weight, grid).values(weight)
    values.sum().backward()
    assert torch.isfinite(weight.grad).all()
    # The smallest scale is 1e-5, so that a binary row of zeros is +1e-5 and not +-0.
    assert torch.equal(values.detach(), torch.full((2, 8), 0.0 if grid == "ternary" else 1e-5))


def test_other_grids_are_refused() -> None:
    with pytest.raises(UsageError, match="scale='entropy' is for the grids binary and ternary, not int4"):
        quantizer(VECTOR, "int4").alpha(VECTOR)
