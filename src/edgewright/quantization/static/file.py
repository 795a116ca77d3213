"""Converted int8 networks on disk: codes of 2 to 8 bits packed without gaps, everything else as it is.

Packing is for size only. Runtimes multiply int8: no convolution kernel of XNNPACK or ONNX Runtime reads fewer bits, so
loading widens the codes, and a 4-bit network runs as fast as an 8-bit one.

The file is safetensors. Of each layer NAME: `NAME.codes` uint8, the codes minus the lowest one, as one string of bits,
least significant first; `NAME.step` and `NAME.zero` [out]; `NAME.bias` float32. What is not a quantised layer keeps its
name in the state dict. The metadata entry "static" holds shapes, widths, activation scales and the configuration.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgewright.errors import EdgewrightError, FormatError, UsageError
from edgewright.io.bits import pack_codes, unpack_codes
from edgewright.io.tensors import read_tensors, save_tensors
from edgewright.io.typed import from_json
from edgewright.quantization.affine import BITS
from edgewright.quantization.static.batchnorm import ConvBNQuant2d, StaticLayer
from edgewright.quantization.static.config import StaticConfig
from edgewright.quantization.static.network import quantize_static
from edgewright.quantization.static.observers import ActivationQuantizer, FixedActivation


def save_static(converted: nn.Module, path: str | Path, config: StaticConfig) -> int:
    """Write a converted network.

    Args:
        converted: of `convert_static`.
        path: of the safetensors file.
        config: what it was prepared with.

    Returns:
        Bytes of the file.

    Raises:
        UsageError: the model has no integer weights.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    activations: dict[str, Any] = {}
    for name, module in converted.named_modules():
        if isinstance(module, FixedActivation):
            activations[name] = [module.scale, module.zero]
        elif isinstance(module, StaticLayer):
            if module.scheme is not None:
                numbers = (module.codes - module.lowest).flatten().cpu()
                tensors[f"{name}.codes"] = pack_codes(numbers, module.scheme.bits)
                tensors |= {f"{name}.step": module.scale, f"{name}.zero": module.zero}
                layers[name] = list(module.weight.shape)
            else:
                tensors[f"{name}.weight"] = module.weight.data
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias.data
    if not layers:
        raise UsageError("the model has no integer weights; save_static takes the result of convert_static")
    inside = tuple(f"{name}." for name, m in converted.named_modules() if isinstance(m, StaticLayer))
    tensors |= {key: value for key, value in converted.state_dict().items() if not key.startswith(inside)}
    record = {"version": 1, "config": asdict(config), "layers": layers, "activations": activations}
    save_tensors(path, tensors, {"static": json.dumps(record)})
    return Path(path).stat().st_size


def load_static(model: nn.Module, example: Any, path: str | Path) -> nn.Module:
    """Load a converted network into the architecture of a float model.

    Args:
        model: float, of the same architecture; its weights do not matter.
        example: an input batch, as for `quantize_static`.
        path: what `save_static` wrote.

    Raises:
        FormatError: the file is broken or of another architecture.
    """
    tensors, texts = read_tensors(path)
    try:
        record = json.loads(texts["static"])
        config = from_json(StaticConfig, record["config"], path)
        shapes, activations = record["layers"], record["activations"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise (
            error
            if isinstance(error, FormatError)
            else FormatError(f"{path} is no network written by save_static: {error}")
        ) from error
    if config.weight_bits not in BITS:
        raise FormatError(f"{path} is no network written by save_static: weight_bits is {config.weight_bits}")
    loaded = quantize_static(model, example, config).eval()
    try:
        for name, module in list(loaded.named_modules()):
            if isinstance(module, ConvBNQuant2d):
                loaded.set_submodule(name, _layer(name, module, shapes[name], tensors))
            elif isinstance(module, ActivationQuantizer):
                step, zero = activations[name]
                loaded.set_submodule(name, FixedActivation(module.name, module.scheme, float(step), int(zero)))
        inside = tuple(f"{name}." for name in shapes)
        loaded.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(inside)}, strict=False)
    except EdgewrightError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FormatError(f"{path} does not fit this model: {error}") from error
    if isinstance(loaded, fx.GraphModule):
        loaded.recompile()
    return loaded


def _layer(name: str, module: ConvBNQuant2d, shape: list[int], tensors: dict[str, Tensor]) -> StaticLayer:
    scheme = module.scheme
    assert scheme is not None  # weight_bits was checked
    if tuple(shape) != tuple(module.weight.shape):
        raise FormatError(f"layer {name} has the shape {tuple(module.weight.shape)}, the file's is {tuple(shape)}")
    lowest = scheme.code_range[0]
    numbers = unpack_codes(tensors[f"{name}.codes"], scheme.bits, module.weight.numel())
    codes = numbers.to(torch.int32).reshape(shape) + lowest
    step, zero = tensors[f"{name}.step"], tensors[f"{name}.zero"]
    wide = (-1, *(1,) * (codes.ndim - 1))
    weight = (codes - zero.reshape(wide)).float() * step.reshape(wide)
    return StaticLayer(module.operation, weight, tensors.get(f"{name}.bias"), scheme, step, zero, name)
