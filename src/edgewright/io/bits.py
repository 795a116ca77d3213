"""Integers of 1 to 8 bits in bytes and back, and trits at five a byte: where codes are packed for files and kernels.

The first number stands in the lowest bits, as in every runtime that reads such bytes. Words of several bytes are those
of a little-endian machine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from edgewright.errors import FormatError, UsageError

# "row": number after number, without gaps. "halves": the first 1 / k of a row in the lowest bits of its bytes, the next
# in the bits above, where k = 8 / bits: llama.cpp's order of nibbles.
Order = Literal["row", "halves"]
TRITS = 5  # in a byte: 3^5 = 243
_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}  # as many bytes as numbers fill one


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` numbers."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int, order: Order = "row") -> Tensor:
    """Numbers 0 .. 2^bits - 1, bool or integer [..., n] -> uint8 [..., ceil(n * bits / 8)]; every row begins a byte.

    Raises UsageError for halves of a row that cannot be halved.
    """
    codes = codes.view(torch.uint8) if codes.dtype == torch.bool else codes.to(torch.uint8)
    count = codes.shape[-1]
    if order == "halves":
        parts = _halves(bits, count)
        packed, *rest = codes.chunk(parts, -1)
        for place, part in enumerate(rest, 1):
            packed = packed | (part << (bits * place))
        return packed
    if bits == 8:
        return codes
    if bits in _WORDS:
        each = 8 // bits
        words = _words(codes, _WORDS[bits])
        # Number i times 2^(8 (each - 1) - (8 - bits) i) lands in the highest byte at bit bits * i, and no two products
        # of the word and these powers share a bit: there are no carries.
        gather = sum(1 << (8 * (each - 1) - (8 - bits) * place) for place in range(each))
        return ((words * gather) >> (8 * (each - 1))).to(torch.uint8)
    words = _words(codes, torch.int64)
    for lane, field, low in _steps(bits):  # two fields become one of twice the bits, until eight are one
        words = (words & low) | ((words >> (lane - field)) & (low << field))
    packed = words.view(torch.uint8).unflatten(-1, (-1, 8))[..., :bits].flatten(-2)
    return packed[..., : packed_bytes(count, bits)]


def unpack_codes(packed: Tensor, bits: int, count: int | None = None, order: Order = "row") -> Tensor:
    """The numbers that `pack_codes` packed: uint8 [..., bytes] -> uint8 [..., count] (None: all that the bytes hold).

    Raises FormatError where a row of `count` numbers has another number of bytes.
    """
    size = packed.shape[-1]
    count = size * 8 // bits if count is None else count
    if packed.dtype != torch.uint8 or size != packed_bytes(count, bits):
        raise FormatError(
            f"{count} numbers of {bits} bits need {packed_bytes(count, bits)} bytes, found {size} of {packed.dtype}"
        )
    if order == "halves":
        return torch.cat([(packed >> (bits * place)) & (2**bits - 1) for place in range(_halves(bits, count))], -1)
    if bits == 8:
        return packed
    if bits in _WORDS:
        words = _spread(bits, packed.device).index_select(0, packed.flatten().int()).view(packed.shape)
        return words.view(torch.uint8)[..., :count]
    groups = F.pad(packed, (0, -size % bits)).unflatten(-1, (-(-size // bits), bits))
    words = _words(groups, torch.int64).squeeze(-1)
    for lane, field, low in reversed(_steps(bits)):
        words = (words & low) | ((words & (low << field)) << (lane - field))
    return words.view(torch.uint8)[..., :count]


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, of any number of bits, one plane of bits after the other: [8n] -> uint8 [bits * n]."""
    return torch.cat([pack_codes((codes >> bit) & 1, 1) for bit in range(bits)])


def unpack_planes(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `pack_planes`: uint8 [bits * n] -> int16 [8n]."""
    planes = [unpack_codes(plane, 1).to(torch.int16) << bit for bit, plane in enumerate(packed.view(bits, -1))]
    return torch.stack(planes).sum(0, dtype=torch.int16)


def pack_trits(trits: Tensor) -> Tensor:
    """Numbers -1, 0, 1, five to a byte, the first in the lowest place: int8 [..., 5n] -> uint8 [..., n]."""
    digits = (trits + 1).to(torch.uint8).unflatten(-1, (-1, TRITS))
    packed = digits[..., TRITS - 1]
    for place in range(TRITS - 2, -1, -1):
        packed = packed * 3 + digits[..., place]
    return packed


def unpack_trits(packed: Tensor) -> Tensor:
    """The reverse of `pack_trits`: uint8 [..., n] -> int8 [..., 5n]. Bytes above 242, which none packs, count as 0."""
    return _trits(packed.device)[packed.int()].flatten(-2)


def _halves(bits: int, count: int) -> int:
    parts = 8 // bits
    if parts * bits != 8 or count % parts:
        raise UsageError(
            f"rows of {count} codes of {bits} bits cannot be packed in {parts} parts; bits are 1, 2, 4 or 8, and the "
            "length is a multiple of the parts"
        )
    return parts


def _words(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [..., n], filled up with zeros, as integers of several bytes."""
    *rows, count = numbers.shape
    size = dtype.itemsize
    if count % size or numbers.storage_offset() % size:  # of words, memory must be aligned
        numbers = F.pad(numbers, (0, -count % size))
    return numbers.flatten().view(dtype).view(*rows, -(-count // size))


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """(lane, bits of a field, mask of the lower field in every two lanes) on the way from 8 numbers in lanes of 8 bits
    to 8 * bits bits without gaps.
    """
    return [
        (lane, lane * bits // 8, sum(((1 << lane * bits // 8) - 1) << start for start in range(0, 64, 2 * lane)))
        for lane in (8, 16, 32)
    ]


# Made before any tracing, in which a tensor is none that a cache may hold.
_BYTES = torch.arange(256).unsqueeze(1)
_SPREAD = {
    bits: ((_BYTES >> torch.arange(0, 8, bits)) & (2**bits - 1)).to(torch.uint8).view(word).flatten()
    for bits, word in _WORDS.items()
}
_TRITS = (_BYTES // 3 ** torch.arange(TRITS) % 3 - 1).to(torch.int8)
_TRITS[3**TRITS :] = 0


@lru_cache(maxsize=16)
def _spread(bits: int, device: torch.device) -> Tensor:
    """Each byte as a word that has its numbers in its bytes."""
    return _SPREAD[bits].to(device)


@lru_cache(maxsize=16)
def _trits(device: torch.device) -> Tensor:
    return _TRITS.to(device)
