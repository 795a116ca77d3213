"""The arithmetic of a .pte: what codes, steps and float weights must take, each shared table once."""

from __future__ import annotations

from typing import Any

from torch import nn

from edgewright.export.executorch.layers import DynamicLinear, QuantizedTable

STEP_BYTES = 2  # bfloat16, the type in which XNNPACK keeps the steps of 4-bit groups; the steps are exact in it


def stored_bytes(prepared: nn.Module) -> dict[str, int]:
    """{"codes", "steps", "float"}: bytes that a prepared model (`executorch_layers.prepare`) must take at least."""
    parts = {"codes": 0, "steps": 0, "float": 0}
    seen: set[int] = set()
    for module in prepared.modules():
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


def stored_weights(prepared: nn.Module) -> dict[str, int]:
    """{"count", "bytes", "token_bytes"} of a prepared model: weights, their bytes, bytes that decoding a token reads.

    Codes, steps and float weights, each shared table once; of a token table that is not also the head one row is read.
    """
    held: dict[int, list[Any]] = {}  # storage -> [weights, bytes, rows, whether only looked up]
    for module in prepared.modules():
        table = isinstance(module, QuantizedTable | nn.Embedding)
        if isinstance(module, DynamicLinear | QuantizedTable):
            rows = module.out_features if isinstance(module, DynamicLinear) else module.num_embeddings
            columns = module.in_features if isinstance(module, DynamicLinear) else module.embedding_dim
            size = rows * columns * module.bits // 8 + module.step.numel() * STEP_BYTES
            _hold(held, module.codes.data_ptr(), rows * columns, size, rows, table)
        for tensor in (*module.parameters(recurse=False), *_bias(module)):
            rows = len(tensor) if tensor.ndim else 1
            _hold(held, tensor.data_ptr(), tensor.numel(), tensor.numel() * tensor.element_size(), rows, table)
    values = list(held.values())
    read = sum(size // max(rows, 1) if table else size for _, size, rows, table in values)
    return {"count": sum(v[0] for v in values), "bytes": sum(v[1] for v in values), "token_bytes": read}


def _hold(held: dict[int, list[Any]], key: int, count: int, size: int, rows: int, table: bool) -> None:
    if key in held:
        held[key][3] = held[key][3] and table
    else:
        held[key] = [count, size, rows, table]


def _bias(module: nn.Module) -> list[nn.Parameter]:
    bias = module.bias if isinstance(module, DynamicLinear) else None
    return [] if bias is None else [bias]  # type: ignore[list-item]
