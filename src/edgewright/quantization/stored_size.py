"""What a model weighs once its codes are packed: bytes by part, with the head always counted."""

from __future__ import annotations

from typing import Any

from torch import nn

from edgewright.io.packed import PackedConv2d, PackedEmbedding, PackedLinear
from edgewright.quantization.layers import QuantConv2d, QuantEmbedding, QuantLinear, WeightQuantizer

PARTS = ("embedding", "head", "layers", "full precision")
STORED_BITS = {"binary": 1, "ternary": 2, "seq2": 2, "int2": 2, "int3": 3, "int4": 4, "int8": 8}
SCALE_BYTES = 2  # bfloat16 or float16
TABLES = (nn.Embedding, PackedEmbedding)


def stored_bytes(model: Any) -> dict[str, int]:
    """What a model weighs, before or after `convert_`; of a float model, its parameters.

    A table that embedding and head share counts once, as the embedding's; a head of its own is never left out, also
    where it multiplies by the latent table.

    Args:
        model: of transformers, or any module.

    Returns:
        Bytes of "embedding", "head", "layers", "full precision" and "total". Layers and tables: codes at 1 bit
        (binary), 2 bits (ternary) and so on, 2 bytes a scale; what is not quantised counts in its own type, under "full
        precision" unless it is a table.
    """
    parts = dict.fromkeys(PARTS, 0)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    modules = sorted(model.modules(), key=lambda module: not isinstance(module, TABLES))  # tables first: they share
    seen: set[int] = set()
    for module in modules:
        low_bit = _low_bit(module)
        if low_bit is not None:
            key, size = low_bit
            if key not in seen:
                seen.add(key)
                parts[_part(module, head, "layers")] += size
        if isinstance(module, WeightQuantizer):  # its scales are counted with the codes
            continue
        for name, tensor in module._parameters.items():
            if tensor is None or id(tensor) in seen or (low_bit is not None and name == "weight"):
                continue
            seen.add(id(tensor))
            part = _part(module, head, "full precision") if tensor.ndim > 1 else "full precision"
            parts[part] += tensor.numel() * tensor.element_size()
    return {**parts, "total": sum(parts.values())}


def _low_bit(module: nn.Module) -> tuple[int, int] | None:
    """(what identifies the codes, bytes of codes and scales) of a layer with low-bit weights, else None."""
    if isinstance(module, (PackedLinear, PackedEmbedding, PackedConv2d)):
        key, grid, weights, scales = id(module.codes), module.grid, module.codes.numel(), module.step.numel()
    elif isinstance(module, (QuantLinear, QuantEmbedding, QuantConv2d)) and module.quantizer is not None:
        quantizer = module.quantizer
        key, grid = id(quantizer), quantizer.config.grid
        weights, scales = module.weight.numel(), module.weight.shape[0] * quantizer.groups
    else:
        return None
    return key, -(-weights * STORED_BITS[grid] // 8) + SCALE_BYTES * scales


def _part(module: nn.Module, head: nn.Module | None, other: str) -> str:
    return "head" if module is head else "embedding" if isinstance(module, TABLES) else other
