"""The tensor types of GGUF: id -> (name, values a block, bytes a block), and how each block becomes float32.

The ids and block layouts are those of ggml. Types that the `gguf` package can decode are left to it, except the three
commonest, which are decoded here in cache-sized pieces because that is the time a user waits for; Q1_0 and Q2_0 are
decoded here because the package has no decoder for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from edgewright.errors import Unsupported

Array = np.ndarray[Any, Any]

# Blocks decoded at once: 8192 blocks of 32 values are 1 MiB of float32, which stays in a core's cache.
PIECE = 8192


class GGMLType(NamedTuple):
    """Storage of one tensor type: `block` values occupy `bytes` bytes."""

    name: str
    block: int
    bytes: int


GGML_TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    9: GGMLType("Q8_1", 32, 36),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    15: GGMLType("Q8_K", 256, 292),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    24: GGMLType("I8", 1, 1),
    25: GGMLType("I16", 1, 2),
    26: GGMLType("I32", 1, 4),
    27: GGMLType("I64", 1, 8),
    28: GGMLType("F64", 1, 8),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
    34: GGMLType("TQ1_0", 256, 54),
    35: GGMLType("TQ2_0", 256, 66),
    39: GGMLType("MXFP4", 32, 17),
    40: GGMLType("NVFP4", 64, 36),
    41: GGMLType("Q1_0", 128, 18),
    42: GGMLType("Q2_0", 64, 18),
}

_PLAIN = {0: "<f4", 1: "<f2", 24: "<i1", 25: "<i2", 26: "<i4", 27: "<i8", 28: "<f8"}


def decode(raw: Array, type_id: int) -> Array:
    """float32 [values] of the blocks in `raw`, uint8 [bytes], little endian, a whole number of blocks.

    Raises Unsupported, naming the type, where neither this module nor the installed `gguf` package has a decoder.
    """
    kind = GGML_TYPES[type_id]
    if type_id in _PLAIN:
        with np.errstate(over="ignore"):
            return raw.view(_PLAIN[type_id]).astype(np.float32)
    if type_id == 30:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(-1, kind.bytes)
    decoder = _DECODERS.get(type_id)
    if decoder is None:
        return _decode_with_package(blocks, kind.name)
    values = np.empty((len(blocks), kind.block), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf scales are reported by name later, not here
        for start in range(0, len(blocks), PIECE):
            decoder(blocks[start : start + PIECE], values[start : start + PIECE])
    return values.reshape(-1)


def _half(blocks: Array, start: int) -> Array:
    """The fp16 number at byte `start` of each block, as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _q4_0(blocks: Array, values: Array) -> None:
    codes = blocks[:, 2:]
    values[:, :16] = codes & 15
    values[:, 16:] = codes >> 4
    values -= 8
    values *= _half(blocks, 0)


def _q4_1(blocks: Array, values: Array) -> None:
    codes = blocks[:, 4:]
    values[:, :16] = codes & 15
    values[:, 16:] = codes >> 4
    values *= _half(blocks, 0)
    values += _half(blocks, 2)


def _q8_0(blocks: Array, values: Array) -> None:
    values[:] = blocks[:, 2:].view(np.int8)
    values *= _half(blocks, 0)


def _q1_0(blocks: Array, values: Array) -> None:
    """Bit j % 8 of byte j / 8 is the sign of value j: set means +d, clear means -d."""
    values[:] = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    values *= 2
    values -= 1
    values *= _half(blocks, 0)


def _q2_0(blocks: Array, values: Array) -> None:
    """Bits 2 (j % 4) of byte j / 4 hold q of value j; the value is (q - 1) d, q in 0..3."""
    codes = blocks[:, 2:]
    for place in range(4):
        values[:, place::4] = (codes >> (2 * place)) & 3
    values -= 1
    values *= _half(blocks, 0)


_DECODERS: dict[int, Callable[[Array, Array], None]] = {2: _q4_0, 3: _q4_1, 8: _q8_0, 41: _q1_0, 42: _q2_0}


def _decode_with_package(blocks: Array, name: str) -> Array:
    from gguf import GGMLQuantizationType, quants

    kind = getattr(GGMLQuantizationType, name, None)
    if kind is not None:
        try:
            with np.errstate(invalid="ignore", over="ignore"):
                return np.asarray(quants.dequantize(blocks, kind), np.float32).reshape(-1)
        except NotImplementedError:
            pass
    known = ", ".join(GGML_TYPES[i].name for i in (*_PLAIN, 30, *_DECODERS))
    raise Unsupported(
        f"tensor type {name} has no decoder in the installed gguf package; {known} and the K-quants can be read"
    )
