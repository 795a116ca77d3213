"""Bytes of one planned tensor: packed codes for quantised matrices, rounded floats for the rest."""

from __future__ import annotations

import numpy as np

from edgewright.export.gguf import ggml
from edgewright.export.gguf.blocks import TYPE_IDS, Array, pack
from edgewright.export.gguf.layout import LayoutRow
from edgewright.export.gguf.tensors import ModelTensor
from edgewright.io.gguf.types import decode


def encode(tensor: ModelTensor, row: LayoutRow) -> Array:
    """uint8 bytes of a tensor as its row of the layout says."""
    packed = tensor.packed
    if packed is not None and row.written not in ("F16", "F32"):
        return pack(packed, row.written)
    return encode_float(tensor.values(), row.written)


def encode_float(values: Array, name: str) -> Array:
    """uint8 bytes of float32 values in F32, F16 or Q8_0 (tables left in float); the rest by llama.cpp's quantiser."""
    if name == "F32":
        return np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(-1)
    if name == "F16":
        return values.astype("<f2").view(np.uint8).reshape(-1)
    if name == "Q8_0":
        return q8_0(values).reshape(-1)
    return ggml.quantize(values, name).reshape(-1)


def q8_0(values: Array) -> Array:
    """Blocks of 32 as ggml's reference rounds them: d = absmax / 127, kept in fp16; codes round half away from 0."""
    blocks = values.reshape(-1, 32)
    out = np.empty((len(blocks), 34), np.uint8)
    piece = 1 << 15
    for start in range(0, len(blocks), piece):
        part = blocks[start : start + piece]
        d = np.abs(part).max(axis=1, keepdims=True) / np.float32(127)
        with np.errstate(divide="ignore"):
            inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
        scaled = part * inverse
        magnitude = np.abs(scaled)
        whole = np.floor(magnitude)
        whole += np.floor(2 * (magnitude - whole))  # adding 0.5 instead would itself round just below a half
        codes = np.copysign(whole, scaled).astype(np.int8)
        out[start : start + piece, :2] = d.astype("<f2").view(np.uint8)
        out[start : start + piece, 2:] = codes.view(np.uint8)
    return out


def as_written(values: Array, name: str) -> Array:
    """Float values after the rounding of the type they are written in."""
    if name == "F32":
        return values
    return decode(encode_float(values, name), TYPE_IDS[name]).reshape(values.shape)
