"""Static int8 for convolutional networks: prepare, calibrate or train, convert.

    prepared = quantize_static(model, example, StaticConfig())      # a torch.fx copy; the model itself stays as it is
    calibrate_(prepared, batches)                                   # after training: ranges of activations
    freeze_after_(prepared, steps); fit(prepared, ...)              # or with training
    shipped = convert_static(prepared)                              # constants only

Source: arXiv 1806.08342. Weights are quantised per output channel or per layer from their extremes, activations per
layer from watched ranges; batch norms are folded (quantization/batchnorm.py); quantisers stand where integers will
exist at run time (quantization/static_rules.py). All fake quantisation is torch.fake_quantize_*, which exporters know.
"""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgewright.errors import UsageError
from edgewright.quantization.affine import AffineScheme
from edgewright.quantization.batchnorm import STATISTICS, ConvBNQuant2d, StaticLayer
from edgewright.quantization.observers import ActivationQuantizer, FixedActivation, ObserverConfig

GRANULARITIES = ("channel", "layer")


@dataclass(frozen=True)
class StaticConfig:
    """What to quantise and how.

    weight_bits, activation_bits: 2 to 8, None leaves them float. input_bits: of the model's own input. granularity:
    one step per output "channel" or per "layer". symmetric: of weights; integer kernels want True. bn: how batch norm
    is folded in training ("correct", "quantised" or "naive", see quantization/batchnorm.py). relu6_fixed: the range
    behind ReLU6 is (0, 6), not watched. skip: patterns of layer names that stay float.
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
        if self.granularity not in GRANULARITIES:
            raise UsageError(f"granularity={self.granularity!r} is unknown; choose 'channel' or 'layer'")
        if self.bn not in STATISTICS:
            raise UsageError(f"bn={self.bn!r} is unknown; choose one of {', '.join(STATISTICS)}")
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
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.skip)


@dataclass
class StaticReport:
    """What `quantize_static` did: (layer, batch norm or "") pairs, activations with integers, what stayed float."""

    layers: list[tuple[str, str]] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    left_float: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    traced: bool = True


def quantize_static(model: nn.Module, example: Any, config: StaticConfig | None = None) -> nn.Module:
    """A copy of `model` with folded batch norms and fake quantisers, not yet calibrated; the model stays untouched.

    example: one input batch (a tensor, or a tuple of the model's arguments), with which the copy is compared in float
    before it is returned. A model that torch.fx cannot trace is prepared by the names of its modules: then only layers
    and their inputs are quantised. What was done is in `static_report(result)`. A model that went through here already
    comes back as it is, with a warning. Raises UsageError for a model without convolution or linear layer.
    """
    from edgewright.quantization import static_prepare

    config = config or StaticConfig()
    if any(isinstance(module, ConvBNQuant2d | StaticLayer) for module in model.modules()):
        warnings.warn("the model is quantised already; quantize_static leaves it as it is", stacklevel=2)
        return model
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    return static_prepare.prepare(model, inputs, config)


def static_report(model: nn.Module) -> StaticReport:
    """What happened to each part. Raises UsageError for a model that did not come from `quantize_static`."""
    report = getattr(model, "meta", {}).get("static_report")
    if report is None:
        raise UsageError("the model has no report; it did not come from quantize_static")
    return report


def calibrate_(model: nn.Module, batches: Iterable[Any], max_batches: int = 100) -> nn.Module:
    """Set the ranges of all activations from up to `max_batches` batches through the float model, in place.

    A batch is a tensor of inputs, or a tuple or list whose first entry is one. Modes are put back afterwards. Raises
    UsageError (a ValueError) when there is no batch, FormatError when an activation holds NaN; warns by name where an
    activation was always zero.
    """
    quantizers = activation_quantizers(model)
    device = next(model.parameters()).device
    seen = 0
    with torch.no_grad(), _modes(model), quantization(model, False):
        model.eval()
        for module in quantizers:
            module.watching = True
        try:
            for batch in batches:
                if seen == max_batches:
                    break
                model(first_tensor(batch).to(device))
                seen += 1
        finally:
            for module in quantizers:
                module.watching = False
    if not seen:
        raise UsageError(
            "there is no calibration batch; give calibrate_(model, batches) at least one, about 100 are good"
        )
    for module in quantizers:
        module.warn_if_constant()
    return model


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


def convert_static(model: nn.Module) -> nn.Module:
    """A copy with constants only: weights on their grids, fixed steps and zero points, batch norms gone; eval mode.

    It computes what the prepared model computes in eval mode (and, once frozen, in training), bit for bit.
    """
    converted = copy.deepcopy(model).eval()
    layers = [(name, m) for name, m in converted.named_modules() if isinstance(m, ConvBNQuant2d)]
    if not layers:
        raise UsageError("the model has no layer to convert; prepare it with quantize_static(model, example) first")
    for name, layer in layers:
        set_submodule(converted, name, layer.static())
    for name, module in list(converted.named_modules()):
        if isinstance(module, ActivationQuantizer):
            step, zero = module.parameters_of_codes()
            set_submodule(converted, name, FixedActivation(module.name, module.scheme, float(step), int(zero)))
    for parameter in converted.parameters():
        parameter.requires_grad_(False)
    if isinstance(converted, fx.GraphModule):
        converted.recompile()
    return converted


def activation_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """All activation quantisers of a prepared model, in its order. Raises UsageError when there is no layer at all."""
    found = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    if not found and not any(isinstance(module, ConvBNQuant2d) for module in model.modules()):
        raise UsageError("the model is not prepared; call quantize_static(model, example) first")
    return found


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def first_tensor(batch: Any) -> Tensor:
    """The inputs of a batch: itself, its first entry, or the first tensor of a mapping."""
    while not isinstance(batch, Tensor):
        if isinstance(batch, Mapping):
            batch = tuple(batch.values())
        if not isinstance(batch, tuple | list) or not batch:
            raise UsageError(f"a batch is a {type(batch).__name__}; give a tensor, or a tuple that starts with one")
        batch = batch[0]
    return batch


@contextmanager
def _modes(model: nn.Module) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
