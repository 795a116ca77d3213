"""The spectrum of a loss's Hessian by stochastic Lanczos quadrature, from Hessian-vector products alone.

Each probe starts Lanczos at a random unit vector v and gives a tridiagonal matrix whose eigenvalues theta_i stand for
the spectrum with weights tau_i, the squared first entries of its eigenvectors (Golub and Welsch). The mean over probes
estimates the density of all eigenvalues; extreme ones are found to high accuracy, masses to about 1 / sqrt(probes n).

`quantized_spectrum` shows why a quantised model is stuck. As in the paper's analysis (WinQ, arXiv 2605.17471) each
linear layer computes with its quantised weight as a plain parameter, and the Hessian is that of the loss with respect
to those. Few bits show as a mass of eigenvalues near zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgewright.checks import check, number, whole
from edgewright.errors import CheckFailed, UsageError
from edgewright.measure.plot import plot
from edgewright.quantization.api import quantized_modules
from edgewright.quantization.layers import QuantLinear
from edgewright.training.snapshot import preserved_modes

NEAR_ZERO = 1e-3  # an eigenvalue smaller than this share of the largest magnitude counts as zero
KERNEL = 5e-3  # width of the Gaussian that a point of the quadrature is drawn with

LossClosure = Callable[[], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """The quadrature of every probe.

    Args:
        ritz: its points, float64 [probes, steps].
        weights: of the points, float64 [probes, steps]; those of a probe sum to 1, unused places have 0.
        gradient_norm: |g|.
        relative_gradient: |g| / |W|.
        parameters: n, the number of rows of the Hessian.
        error_ratio: |W - Q(W)| / |W| where the weights are quantised ones, else None.
    """

    ritz: Tensor
    weights: Tensor
    gradient_norm: float
    relative_gradient: float
    parameters: int
    error_ratio: float | None = None

    @property
    def lambda_min(self) -> float:
        """The smallest eigenvalue that a probe found."""
        return float(self.ritz[self.weights > 0].min())

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue that a probe found."""
        return float(self.ritz[self.weights > 0].max())

    @property
    def magnitude(self) -> float:
        """The largest |eigenvalue|."""
        return max(abs(self.lambda_min), abs(self.lambda_max))

    @property
    def near_zero(self) -> float:
        """Share of eigenvalues with |lambda| < 1e-3 of the largest magnitude."""
        return self.mass(self.ritz.abs() < NEAR_ZERO * self.magnitude)[0]

    @property
    def negative(self) -> float:
        """Share of eigenvalues below minus that bound."""
        return self.mass(self.ritz <= -NEAR_ZERO * self.magnitude)[0]

    def mass(self, chosen: Tensor) -> tuple[float, float | None]:
        """The share of some quadrature points.

        Args:
            chosen: bool [probes, steps].

        Returns:
            (share, its standard error over probes; None for a single probe)
        """
        shares = (self.weights * chosen).sum(-1).tolist()
        return sum(shares) / len(shares), stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None

    def density(self, points: Tensor, width: float = KERNEL) -> Tensor:
        """Smoothed density of eigenvalues.

        Args:
            points: where, float [k].
            width: of the Gaussian that stands for each quadrature point, above 0; the official code's is 5e-3.

        Returns:
            float64 [k]

        Raises:
            UsageError: a width of 0 or less.
        """
        check("width", width, number(above=0))
        normal = torch.distributions.Normal(self.ritz.reshape(-1, 1), width)
        heights = normal.log_prob(points.double().reshape(1, -1)).exp()  # [probes * steps, k]
        return (self.weights.reshape(-1, 1) * heights).sum(0) / len(self.ritz)

    def plot(self, path: str | Path, width: float | None = None, label: str = "") -> None:
        """Draw the density on a logarithmic scale.

        Args:
            path: of the PNG.
            width: of the Gaussians; None: 5e-3 of the largest magnitude.
            label: for the legend; "": no legend.
        """
        plot_spectra({label: self}, path, width)


def plot_spectra(spectra: dict[str, Spectrum], path: str | Path, width: float | None = None) -> None:
    """Several spectra on one picture; the names become the legend. Raises UsageError when there are none."""
    if not spectra:
        raise UsageError("plot_spectra needs one spectrum or more, for example {'1 bit': spectrum}")
    width = width or KERNEL * max(spectrum.magnitude for spectrum in spectra.values())
    low = min(spectrum.lambda_min for spectrum in spectra.values()) - 5 * width
    high = max(spectrum.lambda_max for spectrum in spectra.values()) + 5 * width
    points = torch.linspace(low, high, 1500, dtype=torch.float64)
    with plot(path, (7.0, 3.5)) as axes:
        for name, spectrum in spectra.items():
            axes.semilogy(points, spectrum.density(points, width).clamp_min(1e-12), label=name, linewidth=1)
        axes.set_ylim(bottom=1e-5 / (high - low))
        axes.set(xlabel="eigenvalue of the Hessian", ylabel="density")
        axes.grid(alpha=0.25)
        if any(spectra):
            axes.legend()


def hessian_spectrum(
    loss: LossClosure | Sequence[LossClosure],
    parameters: Sequence[Tensor],
    probes: int = 20,
    steps: int = 60,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """Spectrum of the Hessian of a scalar loss, by fully re-orthogonalised Lanczos; keeps steps + 1 vectors of size n.

    Args:
        loss: a closure that computes it (attention in a form with a second derivative, no dropout), or several whose
            mean it is, worked through one after the other so that only one graph is held.
        parameters: n numbers together, with gradients.
        probes: random start vectors, at least 1; the official code has 20.
        steps: of Lanczos, at least 1; the official code has 60.
        generator: of the CPU; None: seed 0.

    Returns:
        The quadrature.

    Raises:
        UsageError: counts below 1, parameters without gradient, a loss that is no scalar.
        CheckFailed: a product is not finite.
    """
    check("probes", probes, whole(1))
    check("steps", steps, whole(1))
    parameters = list(parameters)
    if not parameters or not all(p.requires_grad for p in parameters):
        raise UsageError("hessian_spectrum needs parameters that require a gradient, for example model.parameters()")
    generator = generator or torch.Generator().manual_seed(0)
    closures = list(loss) if isinstance(loss, Sequence) else [loss]
    product = _Products(closures, parameters)
    n = sum(p.numel() for p in parameters)
    ritz, weights = torch.zeros(probes, steps, dtype=torch.float64), torch.zeros(probes, steps, dtype=torch.float64)
    for probe in range(probes):
        start = torch.randn(n, generator=generator).to(parameters[0].device)
        diagonal, off = _lanczos(product, start, min(steps, n), probe)
        values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
        ritz[probe, : len(values)], weights[probe, : len(values)] = values, vectors[0] ** 2
    size = float(torch.stack([p.detach().double().square().sum() for p in parameters]).sum()) ** 0.5
    norm = product.gradient_norm
    return Spectrum(ritz, weights, norm, norm / max(size, 1e-30), n)


class _Products:
    """v -> H v for the mean of some losses. The graph of a single loss is built once, of several anew each time."""

    def __init__(self, closures: list[LossClosure], parameters: list[Tensor]) -> None:
        self.closures, self.parameters = closures, parameters
        self.graph = self._gradient(closures[0]) if len(closures) == 1 else None
        total = torch.zeros((), dtype=torch.float64)
        parts = [self.graph if self.graph is not None else self._gradient(closure) for closure in closures]
        for pieces in zip(*parts, strict=True):
            total += (sum(piece.detach().double() for piece in pieces) / len(closures)).square().sum().cpu()
        self.gradient_norm = float(total) ** 0.5

    def _gradient(self, closure: LossClosure) -> list[Tensor]:
        value = closure()
        if value.ndim != 0 or not value.requires_grad:
            raise UsageError(f"the loss must be a scalar that depends on the parameters; got shape {list(value.shape)}")
        gradient = torch.autograd.grad(value, self.parameters, create_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradient, strict=True)]

    def __call__(self, vector: Tensor) -> Tensor:
        """H v, float32 [n]."""
        total = torch.zeros_like(vector)
        parts = vector.split([p.numel() for p in self.parameters])
        shaped = [part.view_as(p).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]
        for closure in self.closures:
            gradient = self.graph if self.graph is not None else self._gradient(closure)
            curved = [(g, v) for g, v in zip(gradient, shaped, strict=True) if g.requires_grad]
            if not curved:
                continue  # a loss that is linear in every parameter
            products = torch.autograd.grad(
                [g for g, _ in curved],
                self.parameters,
                [v for _, v in curved],
                retain_graph=self.graph is not None,
                allow_unused=True,
            )
            flat = [torch.zeros_like(p) if h is None else h for p, h in zip(self.parameters, products, strict=True)]
            total += torch.cat([h.reshape(-1).float() for h in flat])
        return total / len(self.closures)


@torch.no_grad()
def _lanczos(product: _Products, start: Tensor, steps: int, probe: int) -> tuple[Tensor, Tensor]:
    """Diagonal [k] and off-diagonal [k - 1] of the tridiagonal matrix, float64; k < steps if the space is exhausted."""
    basis = torch.empty(steps, start.numel(), device=start.device)
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    off: list[float] = []
    for step in range(steps):
        with torch.enable_grad():
            image = product(basis[step])
        if not torch.isfinite(image).all():
            raise CheckFailed(
                f"the Hessian-vector product is not finite at step {step + 1} of probe {probe + 1}; look for NaN or "
                "infinity in the weights or the batch, or for an operation without a second derivative"
            )
        diagonal.append(float(image @ basis[step]))
        known = basis[: step + 1]
        for _ in range(2):  # twice is enough (Kahan): float32 loses orthogonality in one pass
            image -= known.t() @ (known @ image)
        norm = float(image.norm())
        scale = max(map(abs, [*diagonal, *off]))
        if step + 1 == steps or norm <= 1e-6 * scale or norm == 0.0:
            break
        off.append(norm)
        basis[step + 1] = image / norm
    return torch.tensor(diagonal, dtype=torch.float64), torch.tensor(off, dtype=torch.float64)


# -- at the quantised weights of a model -----------------------------------------------------------------------------


@contextmanager
def quantized_as_parameters(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Inside, every quantised linear layer computes with a plain parameter that holds its quantised weight.

    Yields those parameters; layers that share a weight share it. Afterwards each layer has its own again, unchanged.
    """
    layers = [m for _, m in quantized_modules(model) if isinstance(m, QuantLinear) and m.quantizer is not None]
    if not layers:
        raise UsageError("the model has no quantised linear layer to probe; call quantize_(model, config) first")
    before = [(layer, layer.weight, layer.quantizer) for layer in layers]
    swapped: dict[int, nn.Parameter] = {}
    try:
        for layer, weight, quantizer in before:
            assert quantizer is not None
            if id(weight) not in swapped:
                with torch.no_grad():
                    swapped[id(weight)] = nn.Parameter(quantizer.values(weight).clone())
            layer.weight, layer.quantizer = swapped[id(weight)], None
        yield list(swapped.values())
    finally:
        for layer, weight, quantizer in before:
            layer.weight, layer.quantizer = weight, quantizer


def quantized_spectrum(
    model: nn.Module,
    loss_function: Callable[[nn.Module, Any], Any],
    batches: Sequence[Any],
    probes: int = 20,
    steps: int = 60,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """Spectrum of the mean loss over `batches` at the quantised weights of the linear layers of `model`.

    The model is in evaluation mode meanwhile and comes out as it went in; attention runs in its plain form, since fused
    ones have no second derivative.

    Args:
        model: under quantisation (`quantize_`).
        loss_function: (model, batch) -> loss, as in `fit`.
        batches: more cost time, larger ones memory.
        probes: as of `hessian_spectrum`.
        steps: as of `hessian_spectrum`.
        generator: as of `hessian_spectrum`.

    Returns:
        The quadrature, with `error_ratio`.

    Raises:
        UsageError: a model without quantised linear layers.
        CheckFailed: a product is not finite.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        seen: set[int] = set()
        for _, layer in quantized_modules(model):
            if isinstance(layer, QuantLinear) and layer.quantizer is not None and id(layer.weight) not in seen:
                seen.add(id(layer.weight))
                weight = layer.weight.float()
                error = weight - layer.quantizer.values(layer.weight).float()
                squares += torch.stack([error.double().square().sum(), weight.double().square().sum()]).cpu()

    def closure(batch: Any) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            result = loss_function(model, batch)
            return result[0] if isinstance(result, tuple) else result

        return loss

    with (
        quantized_as_parameters(model) as parameters,
        preserved_modes(model, False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        spectrum = hessian_spectrum([closure(batch) for batch in batches], parameters, probes, steps, generator)
    return replace(spectrum, error_ratio=float((squares[0] / squares[1].clamp_min(1e-30)).sqrt()))
