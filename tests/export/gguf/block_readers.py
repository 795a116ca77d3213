"""Slow readers of GGUF blocks, one number at a time, written from the layout table without the packers' code."""

from __future__ import annotations

import struct

import numpy as np


def _half(block: bytes, start: int) -> np.float32:
    return np.float32(struct.unpack_from("<e", block, start)[0])


def q4_0(block: bytes) -> list[float]:
    d, codes = _half(block, 0), block[2:]
    return [d * ((codes[j] & 15) - 8) for j in range(16)] + [d * ((codes[j] >> 4) - 8) for j in range(16)]


def q8_0(block: bytes) -> list[float]:
    d = _half(block, 0)
    return [d * code for code in struct.unpack("<32b", block[2:])]


def q1_0(block: bytes) -> list[float]:
    d = _half(block, 0)
    return [d if block[2 + j // 8] >> (j % 8) & 1 else -d for j in range(128)]


def q2_0(block: bytes) -> list[float]:
    d = _half(block, 0)
    return [d * ((block[2 + j // 4] >> 2 * (j % 4) & 3) - 1) for j in range(64)]


def _pair(quants: bytes, j: int) -> int:
    """Two bits of element j: half h of 128, place n of 4 inside it, byte m of 32."""
    h, n, m = j // 128, j % 128 // 32, j % 32
    return quants[32 * h + m] >> (2 * n) & 3


def tq2_0(block: bytes) -> list[float]:
    d = _half(block, 64)
    return [d * (_pair(block[:64], j) - 1) for j in range(256)]


def tq1_0(block: bytes) -> list[float]:
    d = _half(block, 52)
    values = []
    for j in range(256):
        if j < 160:
            byte, place = j % 32, j // 32
        elif j < 240:
            byte, place = 32 + (j - 160) % 16, (j - 160) // 16
        else:
            byte, place = 48 + (j - 240) % 4, (j - 240) // 4
        shifted = block[byte] * 3**place & 255  # the fraction's leading trit is what 3 times it carries out
        values.append(d * ((shifted * 3 >> 8) - 1))
    return values


def q2_k(block: bytes) -> list[float]:
    d, dmin = _half(block, 80), _half(block, 82)
    values = []
    for j in range(256):
        scale = block[j // 16]
        values.append(d * np.float32(scale & 15) * np.float32(_pair(block[16:80], j)) - dmin * np.float32(scale >> 4))
    return values


def q3_k(block: bytes) -> list[float]:
    d, high, quants, packed = _half(block, 108), block[:32], block[32:96], block[96:108]
    values = []
    for j in range(256):
        group = j // 16
        low = packed[group] & 15 if group < 8 else packed[group - 8] >> 4
        scale = low | (packed[8 + group % 4] >> 2 * (group // 4) & 3) << 4
        code = _pair(quants, j) + 4 * (high[j % 32] >> (j // 32) & 1) - 4
        values.append(d * np.float32(scale - 32) * np.float32(code))
    return values


# name -> (values a block, bytes a block, reader)
READERS = {
    "Q4_0": (32, 18, q4_0),
    "Q8_0": (32, 34, q8_0),
    "Q1_0": (128, 18, q1_0),
    "Q2_0": (64, 18, q2_0),
    "TQ1_0": (256, 54, tq1_0),
    "TQ2_0": (256, 66, tq2_0),
    "Q2_K": (256, 84, q2_k),
    "Q3_K": (256, 110, q3_k),
}


def read(raw: bytes, name: str) -> np.ndarray:
    """float32 values of a whole number of blocks."""
    _, size, reader = READERS[name]
    values = [reader(raw[start : start + size]) for start in range(0, len(raw), size)]
    return np.array(values, np.float32).reshape(-1)
