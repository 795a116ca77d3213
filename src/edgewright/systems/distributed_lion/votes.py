"""Counting votes that are packed at one bit each, and the rule that breaks ties.

A vote is +1, -1 or 0. One bit cannot say 0, so there the rule of `alternate_votes` decides: a hash of place and step,
the same on every machine and without a bias over time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgewright.io.bits import unpack_codes
from edgewright.io.hashing import GOLDEN, signed64, splitmix64_

CHUNK = 2**16  # hashes worked on at a time, so that they stay in the cache


def alternate_votes(index: Tensor, step: int) -> Tensor:
    """+1 where splitmix64(index XOR step * GOLDEN) is even, else -1: int64 [n] -> int8 [n].

    `index` counts elements over all parameters of the optimizer, so that no layout of buckets changes the rule.
    """
    votes = torch.empty(index.shape, dtype=torch.int8, device=index.device)
    for piece, out in zip(index.split(CHUNK), votes.split(CHUNK), strict=True):
        lowest = splitmix64_(piece.bitwise_xor(signed64(step * GOLDEN))).bitwise_and_(1)
        out.copy_(1 - 2 * lowest)
    return votes


def count_bits(packed: Tensor) -> Tensor:
    """How many of the N rows have a one in each place: uint8 [N, n] -> uint8 [8n], or int32 where N > 255."""
    total = None
    for rows in packed.split(255):  # eight counters of a byte in one word: 255 rows cannot overflow them
        words = unpack_codes(rows[0], 1).view(torch.int64)
        for row in rows[1:]:
            words += unpack_codes(row, 1).view(torch.int64)
        counts = words.view(torch.uint8)
        total = counts if total is None else total.to(torch.int32) + counts
    assert total is not None
    return total
