"""Stochastic Lanczos quadrature against known spectra and dense Hessians; the probe of quantised models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from edgewright.errors import CheckFailed, UsageError
from edgewright.quantization.api import quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.winq.spectrum import (
    hessian_spectrum,
    plot_spectra,
    quantized_as_parameters,
    quantized_spectrum,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quadratic(eigenvalues: torch.Tensor):
    """0.5 x^T A x with A = R diag(eigenvalues) R^T, R random and orthogonal."""
    n = len(eigenvalues)
    rotation = torch.linalg.qr(torch.randn(n, n, generator=generator(1), dtype=torch.float64))[0]
    matrix = (rotation * eigenvalues.double()) @ rotation.t()
    x = torch.randn(n, generator=generator(2)).requires_grad_()
    return (lambda: 0.5 * x @ matrix.float() @ x), x, matrix


def test_a_quadratic_with_a_known_spectrum() -> None:
    eigenvalues = torch.cat([torch.linspace(-0.5, -0.1, 40), torch.zeros(100), torch.linspace(0.2, 1, 58)])
    eigenvalues = torch.cat([eigenvalues, torch.tensor([-2.0, 5.0])])
    loss, x, matrix = quadratic(eigenvalues)
    probes, n = 40, len(eigenvalues)
    spectrum = hessian_spectrum(loss, [x], probes, 60, generator())
    assert abs(spectrum.lambda_min + 2) < 1e-3 and abs(spectrum.lambda_max - 5) < 1e-3
    bound = 3 / math.sqrt(probes * n)  # three times the accuracy that the method promises for a mass
    assert abs(spectrum.near_zero - 100 / n) < bound and abs(spectrum.negative - 41 / n) < bound
    torch.testing.assert_close(spectrum.weights.sum(-1), torch.ones(probes, dtype=torch.float64))
    assert spectrum.parameters == n
    gradient = (matrix @ x.detach().double()).norm()
    assert spectrum.gradient_norm == pytest.approx(float(gradient), rel=1e-5)
    assert spectrum.relative_gradient == pytest.approx(float(gradient / x.detach().double().norm()), rel=1e-5)


def test_the_density_is_that_of_the_quadrature_and_sums_to_one() -> None:
    loss, x, _ = quadratic(torch.linspace(-1, 2, 60))
    spectrum = hessian_spectrum(loss, [x], 5, 60, generator())
    points = torch.linspace(-2, 3, 4001, dtype=torch.float64)
    width = 0.02
    slow = torch.zeros_like(points)
    for probe in range(5):
        for theta, tau in zip(spectrum.ritz[probe], spectrum.weights[probe], strict=True):
            slow += tau * torch.exp(-((points - theta) ** 2) / (2 * width**2)) / (width * math.sqrt(2 * math.pi)) / 5
    torch.testing.assert_close(spectrum.density(points, width), slow, rtol=1e-9, atol=1e-12)
    assert float(torch.trapezoid(slow, points)) == pytest.approx(1, abs=1e-6)


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    return model, torch.randn(20, 12, generator=generator()), torch.randn(20, 5, generator=generator(1))


def test_against_the_dense_hessian_of_a_network_of_300_parameters() -> None:
    model, x, y = network()
    parameters = list(model.parameters())
    shapes, sizes = [p.shape for p in parameters], [p.numel() for p in parameters]
    names = [name for name, _ in model.named_parameters()]

    def of_flat(flat: torch.Tensor) -> torch.Tensor:
        parts = {n: part.view(s) for n, part, s in zip(names, flat.split(sizes), shapes, strict=True)}
        return (torch.func.functional_call(model, parts, (x,)) - y).square().mean()

    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    dense = torch.func.hessian(of_flat)(flat).double()
    exact = torch.linalg.eigvalsh(dense)
    n, probes = len(flat), 20
    assert n == 293
    spectrum = hessian_spectrum(lambda: (model(x) - y).square().mean(), parameters, probes, 60, generator())
    assert spectrum.lambda_max == pytest.approx(float(exact[-1]), rel=1e-3)
    assert spectrum.lambda_min == pytest.approx(float(exact[0]), rel=1e-3)
    bound = 3 / math.sqrt(probes * n)
    limit = 0.05 * spectrum.magnitude
    assert abs(spectrum.mass(spectrum.ritz > limit)[0] - float((exact > limit).double().mean())) < bound
    assert abs(spectrum.mass(spectrum.ritz < -limit)[0] - float((exact < -limit).double().mean())) < bound


def test_several_closures_are_their_mean_and_the_same_generator_gives_the_same_bits() -> None:
    model, x, y = network()
    parameters = list(model.parameters())
    halves = [lambda part=part: (model(x[part]) - y[part]).square().mean() for part in (slice(0, 10), slice(10, 20))]
    whole = hessian_spectrum(lambda: (model(x) - y).square().mean(), parameters, 3, 12, generator())
    parts = hessian_spectrum(halves, parameters, 3, 12, generator())
    torch.testing.assert_close(parts.ritz, whole.ritz, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)
    again = hessian_spectrum(halves, parameters, 3, 12, generator())
    assert torch.equal(again.ritz, parts.ritz) and torch.equal(again.weights, parts.weights)


def test_an_exhausted_space_ends_early() -> None:
    loss, x, _ = quadratic(torch.tensor([1.0, 1.0, 3.0]))
    spectrum = hessian_spectrum(loss, [x], 4, 10, generator())
    assert spectrum.lambda_max == pytest.approx(3, abs=1e-5) and spectrum.lambda_min == pytest.approx(1, abs=1e-5)
    assert (spectrum.weights[:, 3:] == 0).all()


def test_bad_input() -> None:
    loss, x, _ = quadratic(torch.ones(4))
    with pytest.raises(UsageError, match="probes=0"):
        hessian_spectrum(loss, [x], probes=0)
    with pytest.raises(UsageError, match="require a gradient"):
        hessian_spectrum(loss, [x.detach()])
    with pytest.raises(UsageError, match="scalar"):
        hessian_spectrum(lambda: x * 2, [x])
    with pytest.raises(UsageError, match="width=0"):
        hessian_spectrum(loss, [x], 1, 2).density(torch.zeros(1), 0)
    with pytest.raises(UsageError, match="one spectrum or more"):
        plot_spectra({}, "nothing.png")
    zero = torch.zeros(3, requires_grad=True)
    with pytest.raises(CheckFailed, match="step 1 of probe 1"):
        hessian_spectrum(lambda: zero.abs().sqrt().sum(), [zero], 1, 3)


# -- quantised models --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One attention through the fused kernel, with dropout, in front of a quantised head."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, 24)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inputs(x).chunk(3, -1)
        return self.head(self.dropout(nn.functional.scaled_dot_product_attention(q, k, v))).mean(1)


def probed() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return quantize_(Attention(), QuantConfig(rules=(Rule("*", WeightConfig("seq2", initial="mse")),)))


def loss_function(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def test_the_probe_sees_the_quantised_weights_as_plain_parameters_and_leaves_no_trace() -> None:
    model = probed().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    batch = torch.randn(4, 5, 8, generator=generator())
    spectrum = quantized_spectrum(model, loss_function, [batch], 3, 15, generator())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())

    plain = Attention()
    plain.load_state_dict(
        {
            name: model.get_submodule(name.rpartition(".")[0]).quantizer.values(value).detach()  # type: ignore[call-arg]
            if name.endswith("weight")
            else value
            for name, value in model.state_dict().items()
            if "quantizer" not in name
        }
    )
    plain.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        weights = [plain.inputs.weight, plain.head.weight]
        direct = hessian_spectrum(lambda: loss_function(plain, batch), weights, 3, 15, generator())
    assert torch.equal(spectrum.ritz, direct.ritz) and spectrum.relative_gradient == direct.relative_gradient
    gap = sum((m.weight - m.quantizer.values(m.weight)).square().sum() for m in (model.inputs, model.head))  # type: ignore[call-arg]
    size = sum(m.weight.square().sum() for m in (model.inputs, model.head))
    assert spectrum.error_ratio == pytest.approx(float((gap / size).detach().sqrt()), rel=1e-5)


def test_the_layers_come_back_even_after_an_error() -> None:
    model = probed()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), quantized_as_parameters(model) as parameters:
        assert len(parameters) == 2 and model.head.quantizer is None
        raise ZeroDivisionError
    assert model.head.quantizer is not None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_without_quantised_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="no quantised linear layer"):
        quantized_spectrum(Attention(), loss_function, [torch.randn(1, 2, 8)])


def test_the_plot(tmp_path) -> None:
    loss, x, _ = quadratic(torch.linspace(-1, 2, 30))
    spectrum = hessian_spectrum(loss, [x], 2, 10, generator())
    spectrum.plot(tmp_path / "one.png")
    plot_spectra({"a": spectrum, "b": spectrum}, tmp_path / "two.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("one.png", "two.png"))
