"""Input quantisers of packed models: folders keep codes and scales, this puts the inputs' treatment back."""

from __future__ import annotations

from torch import nn

from edgewright.io.packed import PackedLinear
from edgewright.quantization.config import InputConfig


def attach_input_quantizers_(model: nn.Module, activation: InputConfig) -> nn.Module:
    """Quantise, in place, the input of every packed linear layer that has no input quantiser.

    Args:
        model: converted.
        activation: how.

    Returns:
        The model.
    """
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.input_quantizer is None:
            module.input_quantizer = activation.build(name, module.in_features)
    return model
