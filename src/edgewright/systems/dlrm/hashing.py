"""Hashes that are the same on every machine: of texts and of pairs of ids, to rows of a table."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

_FIRST, _SECOND, _GAP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): a bijection of 64-bit numbers that spreads every bit."""
    x = np.asarray(values).astype(np.uint64)
    with np.errstate(over="ignore"):
        x = x + _GAP
        x = (x ^ (x >> np.uint64(30))) * _FIRST
        x = (x ^ (x >> np.uint64(27))) * _SECOND
        return x ^ (x >> np.uint64(31))


def hash_ids(ids: np.ndarray, rows: int, salt: int = 0) -> np.ndarray:
    """Ids (integers of any size) to rows 0 .. rows - 1, int64; another salt is another hash."""
    keyed = mix(np.asarray(ids).astype(np.int64).view(np.uint64) ^ mix(np.array(salt)))
    return (keyed % np.uint64(rows)).astype(np.int64)


def cross(first: np.ndarray, second: np.ndarray, rows: int, salt: int = 0) -> np.ndarray:
    """Rows for pairs of ids: the pair is one feature of its own, hashed to `rows` rows."""
    pair = mix(np.asarray(first).astype(np.int64).view(np.uint64)) ^ np.asarray(second).astype(np.int64).view(np.uint64)
    return hash_ids(mix(pair).view(np.int64), rows, salt)


def hash_texts(texts: Iterable[str], rows: int, salt: int = 0) -> np.ndarray:
    """Texts to rows 0 .. rows - 1, int64, by the CRC-32 of their UTF-8 bytes."""
    crc = zlib.crc32
    codes = np.fromiter((crc(text.encode("utf-8", "surrogateescape")) for text in texts), np.int64)
    return hash_ids(codes, rows, salt)
