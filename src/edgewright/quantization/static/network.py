"""Static int8 for convolutional networks: prepare, calibrate or train, convert.

    prepared = quantize_static(model, example, StaticConfig())      # a torch.fx copy; the model itself stays as it is
    calibrate_(prepared, batches)                                   # after training: ranges of activations
    freeze_after_(prepared, steps); fit(prepared, ...)              # or with training
    shipped = convert_static(prepared)                              # constants only

Source: arXiv 1806.08342. Weights are quantised per output channel or per layer from their extremes, activations per
layer from watched ranges; batch norms are folded (batchnorm.py); quantisers stand where integers will exist at run time
(rules.py). All fake quantisation is torch.fake_quantize_*, which exporters know.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgewright.errors import UsageError
from edgewright.quantization.static.batchnorm import ConvBNQuant2d, StaticLayer
from edgewright.quantization.static.config import (
    StaticConfig,
    StaticReport,
    _modes,
    activation_quantizers,
    quantization,
)
from edgewright.quantization.static.observers import ActivationQuantizer, FixedActivation
from edgewright.quantization.static.prepare import prepare


def quantize_static(model: nn.Module, example: Any, config: StaticConfig | None = None) -> nn.Module:
    """A copy with folded batch norms and fake quantisers, not yet calibrated; the model stays untouched.

    A model that torch.fx cannot trace is prepared by the names of its modules: then only layers and their inputs are
    quantised. What was done is in `static_report(result)`. A model that went through here already comes back as it is,
    with a warning.

    Args:
        model: float, with convolutions or linear layers.
        example: one input batch (a tensor, or a tuple of the model's arguments), with which the copy is compared in
            float before it is returned.
        config: what to quantise and how; by default 8 bits, one scale per output channel.

    Returns:
        The prepared network.

    Raises:
        UsageError: a model without such layers, or whose batch norms do not follow their layers.
    """
    config = config or StaticConfig()
    if any(isinstance(module, ConvBNQuant2d | StaticLayer) for module in model.modules()):
        warnings.warn("the model is quantised already; quantize_static leaves it as it is", stacklevel=2)
        return model
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    return prepare(model, inputs, config)


def static_report(model: nn.Module) -> StaticReport:
    """What happened to each part.

    Args:
        model: of `quantize_static`.

    Returns:
        What was folded, where activations are rounded, and what stays in float.

    Raises:
        UsageError: it did not come from there.
    """
    report = getattr(model, "meta", {}).get("static_report")
    if report is None:
        raise UsageError("the model has no report; it did not come from quantize_static")
    return report


def calibrate_(model: nn.Module, batches: Iterable[Any], max_batches: int = 100) -> nn.Module:
    """Set the ranges of all activations from batches through the float model, in place; modes are put back afterwards.

    Warns by name where an activation was always zero.

    Args:
        model: of `quantize_static`.
        batches: tensors of inputs, or tuples or lists whose first entry is one.
        max_batches: how many are taken; about 100 are good.

    Returns:
        The model.

    Raises:
        UsageError: there is no batch.
        FormatError: an activation holds NaN or infinity.
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


def convert_static(model: nn.Module) -> nn.Module:
    """A copy with constants only: weights on their grids, fixed scales and zero points, batch norms gone; eval mode.

    It computes what the prepared model computes in eval mode (and, once frozen, in training), bit for bit.

    Args:
        model: of `quantize_static`, calibrated.

    Returns:
        The network with integer weights and fixed scales.

    Raises:
        UsageError: there is no layer to convert, or an activation has no range.
        FormatError: a folded weight holds NaN or infinity.
    """
    converted = copy.deepcopy(model).eval()
    layers = [(name, m) for name, m in converted.named_modules() if isinstance(m, ConvBNQuant2d)]
    if not layers:
        raise UsageError("the model has no layer to convert; prepare it with quantize_static(model, example) first")
    for name, layer in layers:
        converted.set_submodule(name, layer.static())
    for name, module in list(converted.named_modules()):
        if isinstance(module, ActivationQuantizer):
            step, zero = module.parameters_of_codes()
            converted.set_submodule(name, FixedActivation(module.name, module.scheme, float(step), int(zero)))
    for parameter in converted.parameters():
        parameter.requires_grad_(False)
    if isinstance(converted, fx.GraphModule):
        converted.recompile()
    return converted


def first_tensor(batch: Any) -> Tensor:
    """The inputs of a batch: itself, its first entry, or the first tensor of a mapping."""
    while not isinstance(batch, Tensor):
        if isinstance(batch, Mapping):
            batch = tuple(batch.values())
        if not isinstance(batch, tuple | list) or not batch:
            raise UsageError(f"a batch is a {type(batch).__name__}; give a tensor, or a tuple that starts with one")
        batch = batch[0]
    return batch
