"""The arithmetic of a .pte: what codes, steps and float weights must take, each shared table once."""

from __future__ import annotations

from torch import nn

from edgewright.export.executorch_layers import DynamicLinear, QuantizedTable

STEP_BYTES = 2  # bfloat16, the type in which XNNPACK keeps the steps of 4-bit groups; the steps are exact in it


def stored_bytes(twin: nn.Module) -> dict[str, int]:
    """{"codes", "steps", "float"}: bytes that a prepared model (`executorch_layers.prepare`) must take at least."""
    parts = {"codes": 0, "steps": 0, "float": 0}
    seen: set[int] = set()
    for module in twin.modules():
        if isinstance(module, DynamicLinear | QuantizedTable):
            key = module.codes.data_ptr()
            if key not in seen:
                per_byte = (
                    2 if isinstance(module, DynamicLinear) and module.bits == 4 else 1
                )  # tables are packed already
                parts["codes"] += module.codes.numel() // per_byte
                parts["steps"] += module.step.numel() * STEP_BYTES
            seen.add(key)
        for tensor in (*module.parameters(recurse=False), *(_bias(module))):
            if tensor.data_ptr() not in seen:
                parts["float"] += tensor.numel() * tensor.element_size()
            seen.add(tensor.data_ptr())
    return parts


def _bias(module: nn.Module) -> list[nn.Parameter]:
    bias = module.bias if isinstance(module, DynamicLinear) else None
    return [] if bias is None else [bias]  # type: ignore[list-item]
