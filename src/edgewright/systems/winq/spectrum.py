"""The spectrum of a loss's Hessian by stochastic Lanczos quadrature, from Hessian-vector products alone.

Each probe starts Lanczos at a random unit vector v and gives a tridiagonal matrix whose eigenvalues theta_i stand for
the spectrum with weights tau_i, the squared first entries of its eigenvectors (Golub and Welsch). The mean over probes
estimates the density of all eigenvalues; extreme ones are found to high accuracy, masses to about 1 / sqrt(probes n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

import torch
from torch import Tensor

from edgewright.errors import CheckFailed, UsageError
from edgewright.measure.plot import plot

NEAR_ZERO = 1e-3  # an eigenvalue smaller than this share of the largest magnitude counts as zero
KERNEL = 5e-3  # width of the Gaussian that a point of the quadrature is drawn with

LossClosure = Callable[[], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """ritz, weights: float64 [probes, steps]; weights of a probe sum to 1, unused places have weight 0.

    gradient_norm: |g|. relative_gradient: |g| / |W|. parameters: n, the number of rows of the Hessian.
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
        """(share of the chosen quadrature points, its standard error over probes). chosen: bool [probes, steps]."""
        shares = (self.weights * chosen).sum(-1).tolist()
        return sum(shares) / len(shares), stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None

    def density(self, points: Tensor, width: float = KERNEL) -> Tensor:
        """Smoothed density of eigenvalues at `points` [k], float64 [k]: each quadrature point a Gaussian of `width`."""
        if width <= 0:
            raise UsageError(f"width={width}: the Gaussian needs a positive one, for example {KERNEL}")
        normal = torch.distributions.Normal(self.ritz.reshape(-1, 1), width)
        heights = normal.log_prob(points.double().reshape(1, -1)).exp()  # [probes * steps, k]
        return (self.weights.reshape(-1, 1) * heights).sum(0) / len(self.ritz)

    def plot(self, path: str | Path, width: float | None = None, label: str = "") -> None:
        """Draw the density on a logarithmic scale into a PNG; `width` None is 5e-3 of the widest magnitude."""
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
    """Spectrum of the Hessian of a scalar loss with respect to `parameters`, by full-reorthogonalised Lanczos.

    loss: a closure that computes it (attention in a form with a second derivative, no dropout), or several whose mean
    it is, worked through one after the other so that only one graph is held. Keeps steps + 1 vectors as large as the
    parameters. generator: of the CPU; default seed 0.

    Raises UsageError for counts below 1 and parameters without gradient, CheckFailed when a product is not finite.
    """
    if probes < 1 or steps < 1:
        raise UsageError(f"probes={probes}, steps={steps}: both must be at least 1, for example probes=20, steps=60")
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
        self.kept = self._gradient(closures[0]) if len(closures) == 1 else None
        total = torch.zeros((), dtype=torch.float64)
        parts = [self.kept if self.kept is not None else self._gradient(closure) for closure in closures]
        for pieces in zip(*parts, strict=True):
            total += (sum(piece.detach().double() for piece in pieces) / len(closures)).square().sum().cpu()
        self.gradient_norm = float(total) ** 0.5

    def _gradient(self, closure: LossClosure) -> list[Tensor]:
        value = closure()
        if value.ndim != 0 or not value.requires_grad:
            raise UsageError(f"the loss must be a scalar that depends on the parameters; got shape {list(value.shape)}")
        found = torch.autograd.grad(value, self.parameters, create_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    def __call__(self, vector: Tensor) -> Tensor:
        """H v, float32 [n]."""
        total = torch.zeros_like(vector)
        parts = vector.split([p.numel() for p in self.parameters])
        shaped = [part.view_as(p).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]
        for closure in self.closures:
            gradient = self.kept if self.kept is not None else self._gradient(closure)
            curved = [(g, v) for g, v in zip(gradient, shaped, strict=True) if g.requires_grad]
            if not curved:
                continue  # a loss that is linear in every parameter
            products = torch.autograd.grad(
                [g for g, _ in curved],
                self.parameters,
                [v for _, v in curved],
                retain_graph=self.kept is not None,
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
