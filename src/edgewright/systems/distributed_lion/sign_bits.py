"""Votes as bytes: signs at one bit, trits at five a byte, small counts in bit planes, and the rule that breaks ties.

A vote is +1, -1 or 0. One bit cannot say 0, so there the rule of `alternate_votes` decides: a hash of place and step,
the same on every machine and without a bias over time.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # the constants of splitmix64 (Steele, Lea & Flood, OOPSLA 2014)
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# Byte i of a word (0 or 1) times 2^(56 - 7i) lands on bit 56 + i, and no two products share a bit: no carries.
GATHER = 0x0102040810204080
TRITS = 5  # in a byte: 3^5 = 243
CHUNK = 2**16  # hashes worked on at a time, so that they stay in the cache


def _signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2^64."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def alternate_votes(index: Tensor, step: int) -> Tensor:
    """+1 where splitmix64(index XOR step * GOLDEN) is even, else -1: int64 [n] -> int8 [n].

    `index` counts elements over all parameters of the optimizer, so that no layout of buckets changes the rule.
    """
    votes = torch.empty(index.shape, dtype=torch.int8, device=index.device)
    for piece, out in zip(index.split(CHUNK), votes.split(CHUNK), strict=True):
        mixed = piece.bitwise_xor(_signed(step * GOLDEN)).add_(_signed(GOLDEN))
        for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
            high = (mixed >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # the shift of int64 drags the sign along
            mixed.bitwise_xor_(high).mul_(_signed(multiplier))
        lowest = (mixed ^ (mixed >> 31)).bitwise_and_(1)
        out.copy_(1 - 2 * lowest)
    return votes


def pack_bits(bits: Tensor) -> Tensor:
    """Zeros and ones, eight to a byte, the first in the lowest bit: bool or uint8 [..., 8n] -> uint8 [..., n]."""
    words = bits.contiguous().view(torch.uint8).view(torch.int64)
    return ((words * GATHER) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of `pack_bits`: uint8 [..., n] -> uint8 [..., 8n]."""
    return _spread(packed).view(torch.uint8)


def count_bits(packed: Tensor) -> Tensor:
    """How many of the N rows have a one in each place: uint8 [N, n] -> uint8 [8n], or int32 where N > 255."""
    total = None
    for rows in packed.split(255):  # eight counters of a byte in one word: 255 rows cannot overflow them
        words = _spread(rows[0])
        for row in rows[1:]:
            words += _spread(row)
        counts = words.view(torch.uint8)
        total = counts if total is None else total.to(torch.int32) + counts
    assert total is not None
    return total


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, one plane of bits after the other: integer [8n] -> uint8 [bits * n]."""
    return torch.cat([pack_bits(((codes >> bit) & 1).to(torch.uint8)) for bit in range(bits)])


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [bits * n] -> int16 [8n]."""
    planes = [unpack_bits(plane).to(torch.int16) << bit for bit, plane in enumerate(packed.view(bits, -1))]
    return torch.stack(planes).sum(0, dtype=torch.int16)


def pack_trits(votes: Tensor) -> Tensor:
    """Votes of -1, 0, 1, five to a byte, the first in the lowest place: int8 [..., 5n] -> uint8 [..., n]."""
    digits = (votes + 1).to(torch.uint8).unflatten(-1, (-1, TRITS))
    packed = digits[..., TRITS - 1]
    for place in range(TRITS - 2, -1, -1):
        packed = packed * 3 + digits[..., place]
    return packed


def unpack_trits(packed: Tensor) -> Tensor:
    """The inverse of `pack_trits`: uint8 [..., n] -> int8 [..., 5n]. Bytes above 242, which none packs, count as 0."""
    return _trit_table(packed.device)[packed.int()].flatten(-2)


def _spread(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> int64 [..., n]: bit i of the byte as byte i of the word."""
    return _bit_table(packed.device).index_select(0, packed.flatten().int()).view(packed.shape)


@lru_cache(maxsize=16)
def _bit_table(device: torch.device) -> Tensor:
    places = torch.arange(256).unsqueeze(1) >> torch.arange(8)
    return (places & 1).to(torch.uint8).view(torch.int64).flatten().to(device)


@lru_cache(maxsize=16)
def _trit_table(device: torch.device) -> Tensor:
    codes = torch.arange(256).unsqueeze(1)
    digits = codes // 3 ** torch.arange(TRITS) % 3 - 1
    return digits.masked_fill(codes >= 3**TRITS, 0).to(torch.int8).to(device)
