"""Why a quantised model is stuck: the Hessian spectrum of its loss at the quantised weights.

As in the paper's analysis (WinQ, arXiv 2605.17471): each linear layer computes with its quantised weight as a plain
parameter, and the Hessian is that of the loss with respect to those. Few bits show as a mass of eigenvalues near zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgewright.errors import UsageError
from edgewright.quantization.api import quantized_modules
from edgewright.quantization.layers import QuantLinear
from edgewright.systems.winq.spectrum import Spectrum, hessian_spectrum
from edgewright.training.snapshot import preserved_modes


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

    loss_function(model, batch) as in `fit`. More batches cost time, larger ones memory. The model is in evaluation mode
    meanwhile and comes out as it went in; attention runs in its plain form, since fused ones have no second derivative.
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
    return dataclasses.replace(spectrum, error_ratio=float((squares[0] / squares[1].clamp_min(1e-30)).sqrt()))
