"""Checkpoints of the official ParetoQ code: `<layer>.weight_clip_val` is the clip scale that we call weight_scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError
from edgewright.quantization.api import quantized_modules

SUFFIX = ".weight_clip_val"


@torch.no_grad()
def load_paretoq_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load an official ParetoQ state dict into a model that `quantize_` put on the same grids, one scale by row.

    Args:
        model: with learned scales.
        state: the official linear layers hold `weight` and `weight_clip_val` [out, 1]; they have no biases, ours keep
            theirs.

    Returns:
        The model.

    Raises:
        FormatError: a scale without a layer, a layer without a scale, or another shape.
    """
    layers = {name: module for name, module in quantized_modules(model) if module.quantizer is not None}
    scales = {name.removesuffix(SUFFIX): value for name, value in state.items() if name.endswith(SUFFIX)}
    unmatched = sorted(set(scales) ^ set(layers))
    if unmatched:
        side = "the checkpoint has no scale for" if unmatched[0] in layers else "the model has no quantised layer named"
        raise FormatError(f"{side} {unmatched[0]}; quantise the same layers as the checkpoint did")
    for name, module in layers.items():
        scale = module.quantizer.weight_scale
        if scale is None or scale.shape != scales[name].shape:
            have = "recomputed scales" if scale is None else f"scales of shape {tuple(scale.shape)}"
            raise FormatError(
                f"{name}: {have}, the checkpoint's have {tuple(scales[name].shape)}; use learned row scales"
            )
    plain = {name: value for name, value in state.items() if not name.endswith(SUFFIX)}
    result = model.load_state_dict(plain, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith(("weight_scale", "bias", "lm_head.weight"))]
    if missing or result.unexpected_keys:
        raise FormatError(f"the checkpoint does not fit the model at {(missing + result.unexpected_keys)[0]}")
    for name, module in layers.items():
        module.quantizer.weight_scale.copy_(scales[name])
    return model
