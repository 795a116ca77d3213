"""Settings of a static network, its report, and the switch of its quantisers."""

from __future__ import annotations

import fnmatch
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from edgewright.checks import check_fields, one_of
from edgewright.errors import UsageError
from edgewright.quantization.affine import AffineScheme
from edgewright.quantization.static.batchnorm import STATISTICS, ConvBNQuant2d
from edgewright.quantization.static.observers import ActivationQuantizer, ObserverConfig

GRANULARITIES = ("channel", "layer")


@dataclass(frozen=True)
class StaticConfig:
    """What to quantise and how.

    Args:
        weight_bits: 2 to 8, None leaves weights float.
        granularity: one scale per output "channel" or per "layer" (arXiv 1806.08342, section 3.1).
        symmetric: weights have no zero point; integer kernels want True.
        activation_bits: 2 to 8, None leaves activations float.
        input_bits: of the model's own input.
        bn: how batch norm is folded in training: "correct", "quantised" or "naive", see `batchnorm`.
        relu6_fixed: the range behind ReLU6 is (0, 6), not watched.
        observer: of the ranges that are watched.
        skip: patterns of layer names that stay float.

    Raises:
        UsageError: a field breaks its rule.
    """

    weight_bits: int | None = 8
    granularity: str = "channel"
    symmetric: bool = True
    activation_bits: int | None = 8
    input_bits: int = 8
    bn: str = "correct"
    relu6_fixed: bool = True
    observer: ObserverConfig = ObserverConfig()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, {"granularity": one_of(*GRANULARITIES), "bn": one_of(*STATISTICS)})
        self.weight_scheme, self.activation_scheme, self.input_scheme  # noqa: B018  (their bits are checked now)

    @property
    def weight_scheme(self) -> AffineScheme | None:
        if self.weight_bits is None:
            return None
        channel = self.granularity == "channel"
        return AffineScheme(self.weight_bits, self.symmetric, narrow=self.symmetric, per_channel=channel)

    @property
    def activation_scheme(self) -> AffineScheme | None:
        return None if self.activation_bits is None else AffineScheme(self.activation_bits)

    @property
    def input_scheme(self) -> AffineScheme | None:
        return None if self.activation_bits is None else AffineScheme(self.input_bits)

    def skips(self, name: str) -> bool:
        """Whether a layer stays float.

        Args:
            name: of the layer.
        """
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.skip)


@dataclass
class StaticReport:
    """What `quantize_static` did: (layer, batch norm or "") pairs, activations with integers, what stayed float."""

    layers: list[tuple[str, str]] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    left_float: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    traced: bool = True


@contextmanager
def quantization(model: nn.Module, on: bool) -> Any:
    """Switch all fake quantisers of a prepared model on or off inside the `with`: off, it computes the float model."""
    layers = [module for module in model.modules() if isinstance(module, ConvBNQuant2d)]
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    schemes, were = [layer.scheme for layer in layers], [module.quantizing for module in quantizers]
    for layer in layers:
        layer.scheme = layer.scheme if on else None
    for module in quantizers:
        module.quantizing = on
    try:
        yield model
    finally:
        for layer, scheme in zip(layers, schemes, strict=True):
            layer.scheme = scheme
        for module, was in zip(quantizers, were, strict=True):
            module.quantizing = was


def activation_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """All activation quantisers of a prepared model, in its order. Raises UsageError when there is no layer at all."""
    found = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    if not found and not any(isinstance(module, ConvBNQuant2d) for module in model.modules()):
        raise UsageError("the model is not prepared; call quantize_static(model, example) first")
    return found


@contextmanager
def _modes(model: nn.Module) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
