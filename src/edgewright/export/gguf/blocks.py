"""Integer codes into GGUF blocks: exact packers for every (grid, block type) pair that represents the grid exactly.

The float values are never looked at. A block stores small unsigned numbers q and one fp16 number d; for each pair there
are integers a, b and a factor f with q = a * code + b and d = f * step such that the block's formula gives
step * (code + offset) without rounding.

Block formulas (ggml's ggml-common.h and ggml-quants.c), j = element in the block:
    Q1_0   bit ? d : -d              Q2_0, TQ1_0, TQ2_0   d * (q - 1)        Q4_0   d * (q - 8)    Q8_0   d * q, signed
    Q2_K   d * sc * q - dmin * m     Q3_K                 d * (s - 32) * (q - 4)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from edgewright.errors import CheckFailed, FormatError, UsageError
from edgewright.io.gguf.types import GGML_TYPES, GGMLType
from edgewright.io.packed import CODE_RANGES, PackedTensor

Array = np.ndarray[Any, Any]

TYPE_IDS: dict[str, int] = {kind.name: type_id for type_id, kind in GGML_TYPES.items()}

# Codes packed at once: small enough that a piece and its temporaries stay in a core's second-level cache.
PIECE = 1 << 19

# Q3_K's twelve scale bytes when all sixteen 6-bit scales are 33: four low bits 0001 each, two high bits 10 each.
Q3_K_SCALES = (0x11,) * 8 + (0xAA,) * 4


class BlockEncoding(NamedTuple):
    """q = a * code + b, d = factor * step; Q2_K also needs its scale byte, sc in the low and m in the high nibble."""

    a: int
    b: int
    factor: float
    scale_byte: int = 0


# grid -> block type -> encoding, smallest type first.
ENCODINGS: dict[str, dict[str, BlockEncoding]] = {
    "binary": {
        "Q1_0": BlockEncoding(1, 0, 1.0),  # its packer keeps only the sign
        "TQ1_0": BlockEncoding(1, 1, 1.0),
        "TQ2_0": BlockEncoding(1, 1, 1.0),
        "Q2_0": BlockEncoding(1, 1, 1.0),
        "Q4_0": BlockEncoding(1, 8, 1.0),
        "Q8_0": BlockEncoding(1, 0, 1.0),
    },
    "ternary": {
        "TQ1_0": BlockEncoding(1, 1, 1.0),
        "TQ2_0": BlockEncoding(1, 1, 1.0),
        "Q2_0": BlockEncoding(1, 1, 1.0),
        "Q4_0": BlockEncoding(1, 8, 1.0),
        "Q8_0": BlockEncoding(1, 0, 1.0),
    },
    # The half step makes the levels odd integers. In Q2_K, d = dmin = step / 2 with sc = 2 and m = 3: the obvious
    # dmin = 1.5 * step would not fit fp16 for most steps.
    "seq2": {
        "Q2_K": BlockEncoding(1, 2, 0.5, 0x32),
        "Q4_0": BlockEncoding(2, 9, 0.5),
        "Q8_0": BlockEncoding(2, 1, 0.5),
    },
    # The levels -2..1 are those of (q - 1) * d read backwards, hence the negative d.
    "int2": {
        "TQ2_0": BlockEncoding(-1, 1, -1.0),
        "Q2_0": BlockEncoding(-1, 1, -1.0),
        "Q2_K": BlockEncoding(1, 2, 1.0, 0x21),
        "Q4_0": BlockEncoding(1, 8, 1.0),
        "Q8_0": BlockEncoding(1, 0, 1.0),
    },
    "int3": {
        "Q3_K": BlockEncoding(1, 4, 1.0),
        "Q4_0": BlockEncoding(1, 8, 1.0),
        "Q8_0": BlockEncoding(1, 0, 1.0),
    },
    "int4": {"Q4_0": BlockEncoding(1, 8, 1.0), "Q8_0": BlockEncoding(1, 0, 1.0)},
    "int8": {"Q8_0": BlockEncoding(1, 0, 1.0)},
}


def ggml_type(name: str) -> GGMLType:
    """Block size and bytes of a type. Raises UsageError for an unknown name."""
    if name not in TYPE_IDS:
        raise UsageError(f"unknown GGUF type {name!r}; known are {', '.join(TYPE_IDS)}")
    return GGML_TYPES[TYPE_IDS[name]]


def bits_per_weight(name: str) -> float:
    """Bits that one weight takes in a type, its share of the block's scales included."""
    kind = ggml_type(name)
    return 8 * kind.bytes / kind.block


def misfit(grid: str, name: str, columns: int, group: int) -> str | None:
    """Why a matrix of this grid, row length and group cannot be stored in a type; None when it can."""
    if name not in ENCODINGS[grid]:
        return f"{name} cannot hold the levels of {grid}"
    block = ggml_type(name).block
    if columns % block:
        return f"{name} needs rows divisible by {block}, this one has {columns}"
    if group % block:
        return f"{name} has one scale for {block} weights, the groups have {group}"
    return None


def inexact(packed: PackedTensor, name: str) -> str | None:
    """Why the steps cannot be stored in a type without rounding; None when every scale is an fp16 number."""
    factor = ENCODINGS[packed.grid][name].factor
    wanted = packed.step.detach().cpu().numpy().astype(np.float32) * np.float32(factor)
    with np.errstate(over="ignore"):
        wrong = wanted.astype(np.float16).astype(np.float32) != wanted
    if not wrong.any():
        return None
    value = float(wanted[wrong][0])
    return f"{name} stores scales in fp16, which rounds {int(wrong.sum())} of them (such as {value:.9g})"


def pack(packed: PackedTensor, name: str) -> Array:
    """The bytes of a matrix in a block type: uint8 [out, bytes of a row].

    Raises UsageError when grid, row length or group do not fit the type, CheckFailed when a step is not exact in fp16,
    FormatError when a code lies outside its grid.
    """
    rows, columns = packed.codes.shape
    reason = misfit(packed.grid, name, columns, packed.group)
    if reason is not None:
        raise UsageError(f"a {packed.grid} matrix [{rows}, {columns}] does not fit: {reason}")
    reason = inexact(packed, name)
    if reason is not None:
        raise CheckFailed(f"a {packed.grid} matrix [{rows}, {columns}] would change: {reason}")
    codes = np.ascontiguousarray(packed.codes.detach().cpu().numpy())
    check_codes(codes, packed.grid)

    encoding, kind = ENCODINGS[packed.grid][name], ggml_type(name)
    step = packed.step.detach().cpu().numpy().astype(np.float32)
    d = np.repeat((step * np.float32(encoding.factor)).astype("<f2"), packed.group // kind.block, axis=1).reshape(-1)
    blocks = codes.reshape(-1, kind.block)  # [blocks, elements]
    out = np.empty((len(blocks), kind.bytes), np.uint8)
    piece = max(1, PIECE // kind.block)
    for start in range(0, len(blocks), piece):
        part = slice(start, start + piece)
        q = (blocks[part] * np.int8(encoding.a) + np.int8(encoding.b)).view(np.uint8)
        _PACKERS[name](q, d[part].view(np.uint8).reshape(-1, 2), out[part], encoding)
    return out.reshape(rows, -1)


def check_codes(codes: Array, grid: str) -> None:
    """Raise FormatError when a code is none of its grid's."""
    low, high, _ = CODE_RANGES[grid]
    smallest, largest = int(codes.min()), int(codes.max())
    if smallest < low or largest > high:
        raise FormatError(f"codes from {smallest} to {largest} are outside the {grid} grid, which has {low} to {high}")
    if grid == "binary" and not codes.all():
        raise FormatError("a binary matrix holds the code 0; only -1 and +1 are allowed")


# One packer a type: q uint8 [blocks, elements], d two bytes [blocks, 2], out uint8 [blocks, bytes].


def _q1_0(q: Array, d: Array, out: Array, encoding: BlockEncoding) -> None:
    """d, then bit j % 8 of byte j / 8."""
    out[:, :2] = d
    out[:, 2:] = np.packbits(q.view(np.int8) > 0, axis=1, bitorder="little")


def _q2_0(q: Array, d: Array, out: Array, encoding: BlockEncoding) -> None:
    """d, then bits 2 (j % 4) of byte j / 4."""
    out[:, :2] = d
    out[:, 2:] = q[:, 0::4] | q[:, 1::4] << 2 | q[:, 2::4] << 4 | q[:, 3::4] << 6


def _q4_0(q: Array, d: Array, out: Array, encoding: BlockEncoding) -> None:
    """d, then byte j with element j in the low and j + 16 in the high nibble."""
    out[:, :2] = d
    out[:, 2:] = q[:, :16] | q[:, 16:] << 4


def _q8_0(q: Array, d: Array, out: Array, encoding: BlockEncoding) -> None:
    """d, then 32 signed bytes."""
    out[:, :2] = d
    out[:, 2:] = q


def _two_bits(q: Array) -> Array:
    """256 numbers of 2 bits in 64 bytes: byte 32 h + m holds elements 128 h + 32 n + m at bits 2 n."""
    q = q.reshape(-1, 2, 4, 32)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(-1, 64)


def _tq2_0(q: Array, d: Array, out: Array, encoding: BlockEncoding) -> None:
    """64 bytes of 2-bit numbers, then d."""
    out[:, :64] = _two_bits(q)
    out[:, 64:] = d


def _base3(trits: Array) -> Array:
    """Five or four trits a byte, [blocks, trits, bytes] -> [blocks, bytes]: a fraction of 3^5 in 256ths, rounded up."""
    value = np.zeros((len(trits), trits.shape[2]), np.uint16)
    for place in range(5):
        value *= 3
        if place < trits.shape[1]:
            value += trits[:, place]
    return ((value.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8)


def _tq1_0(q: Array, d: Array, out: Array, encoding: BlockEncoding) -> None:
    """32 bytes of 5 trits 32 apart, 16 bytes of 5 trits 16 apart, 4 bytes of 4 trits 4 apart, then d."""
    out[:, :32] = _base3(q[:, :160].reshape(-1, 5, 32))
    out[:, 32:48] = _base3(q[:, 160:240].reshape(-1, 5, 16))
    out[:, 48:52] = _base3(q[:, 240:].reshape(-1, 4, 4))
    out[:, 52:] = d


def _q2_k(q: Array, d: Array, out: Array, encoding: BlockEncoding) -> None:
    """16 scale bytes, 64 bytes of 2-bit numbers, d, dmin = d."""
    out[:, :16] = encoding.scale_byte
    out[:, 16:80] = _two_bits(q)
    out[:, 80:82] = d
    out[:, 82:] = d


def _q3_k(q: Array, d: Array, out: Array, encoding: BlockEncoding) -> None:
    """32 bytes of high bits (bit n of byte m = element 32 n + m), 64 bytes of low pairs, 12 scale bytes, d."""
    high = (q >> 2).reshape(-1, 8, 32)
    out[:, :32] = np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    out[:, 32:96] = _two_bits(q & 3)
    out[:, 96:108] = Q3_K_SCALES
    out[:, 108:] = d


_PACKERS: dict[str, Callable[[Array, Array, Array, BlockEncoding], None]] = {
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "Q4_0": _q4_0,
    "Q8_0": _q8_0,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
}
