"""Hashes that are the same on every machine: of texts and of pairs of ids, to rows of a table."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edgewright.io.hashing import crc32_each, splitmix64


def hash_ids(ids: np.ndarray, rows: int, salt: int = 0) -> np.ndarray:
    """Ids (integers of any size) to rows 0 .. rows - 1, int64; another salt is another hash."""
    salted = splitmix64(np.array([salt], np.int64).view(np.uint64))
    return (splitmix64(_unsigned(ids) ^ salted) % np.uint64(rows)).astype(np.int64)


def cross(first: np.ndarray, second: np.ndarray, rows: int, salt: int = 0) -> np.ndarray:
    """Rows for pairs of ids: the pair is one feature of its own, hashed to `rows` rows."""
    pair = splitmix64(_unsigned(first)) ^ _unsigned(second)
    return hash_ids(splitmix64(pair).view(np.int64), rows, salt)


def hash_texts(texts: Iterable[str], rows: int, salt: int = 0) -> np.ndarray:
    """Texts to rows 0 .. rows - 1, int64, by the CRC-32 of their UTF-8 bytes."""
    codes = np.fromiter(crc32_each(texts), np.int64)
    return hash_ids(codes, rows, salt)


def _unsigned(ids: np.ndarray) -> np.ndarray:
    return np.asarray(ids).astype(np.int64).view(np.uint64)
