"""Block codecs of the key-value cache: rows of floats to integer codes with one scale per block, and back.

All have the form value = scale * code over blocks of consecutive entries:
    symmetric  codes -(2^(b-1)-1) .. 2^(b-1)-1, scale = max|x| / (2^(b-1)-1), rounded to 16 bits (LLM-QAT, 2305.17888)
    q8_0       codes -127 .. 127, scale = fp16(max|x| / 127), halves away from zero     } llama.cpp's block formats,
    q4_0       codes -8 .. 7, scale = fp16(x_peak / -8) with x_peak the signed largest  } equal to gguf-py bit for bit
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgewright.checks import check, whole
from edgewright.errors import UsageError
from edgewright.io.bits import pack_codes, unpack_codes

GGML_BLOCK = 32
STORED_BITS = 8  # codes are kept in int8


@dataclass(frozen=True)
class Codec:
    """A block codec: rows [..., n], n a multiple of `block`, have codes [..., n] and scales [..., n / block].

    Args:
        name: "symmetric", "q8_0" or "q4_0".
        bits: of a code.
        block: entries per scale.
        scale_dtype: how scales are stored.
    """

    name: str
    bits: int
    block: int
    scale_dtype: torch.dtype = torch.float16

    def _codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes as float32 [..., n / block, block] and scales [..., n / block, 1] in `scale_dtype`."""
        if rows.shape[-1] % self.block:
            raise UsageError(f"rows of {rows.shape[-1]} entries do not divide into blocks of {self.block}")
        x = rows.float().unflatten(-1, (-1, self.block))
        if self.name == "q4_0":
            peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
            scale = peak / -8
            return (x * _inverse(scale)).add_(8.5).trunc_().clamp_(0, 15).sub_(8), scale.to(torch.float16)
        peak = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
        if self.name == "q8_0":
            scale = peak / 127
            return _round_half_away_(x * _inverse(scale)), scale.to(torch.float16)
        top = 2 ** (self.bits - 1) - 1
        scale = (peak / top).clamp(max=torch.finfo(self.scale_dtype).max).to(self.scale_dtype)
        # Codes follow the scale as stored. Unrounded, top / peak decides ties exactly as the formula does.
        inverse = _inverse(peak) * top if self.scale_dtype == torch.float32 else _inverse(scale.float())
        return (x * inverse).round_().clamp_(-top, top), scale

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of rows.

        Args:
            rows: float [..., n].

        Returns:
            (codes int8 [..., n], scales [..., n / block])

        Raises:
            UsageError: widths above 8 bits, or rows that blocks do not divide.
        """
        check("bits of stored codes", self.bits, whole(2, STORED_BITS))
        codes, scales = self._codes(rows)
        return codes.flatten(-2).to(torch.int8), scales.squeeze(-1)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """float32 [..., n]."""
        values = codes.unflatten(-1, (-1, self.block)).float()
        return values.mul_(scales.float().unsqueeze(-1)).flatten(-2)

    def values(self, rows: Tensor) -> Tensor:
        """decode(encode(rows)) without the integers in between, for any width; float32 [..., n]."""
        codes, scales = self._codes(rows)
        return codes.mul_(scales.float()).flatten(-2)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is zero or so small that its inverse overflows: such blocks decode to zero."""
    inverse = scale.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0.0)


def _round_half_away_(x: Tensor) -> Tensor:
    """C's roundf, in place. x - trunc(x) and its double are exact, so no half is missed."""
    whole = x.trunc()
    return x.sub_(whole).mul_(2).trunc_().add_(whole)


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes -8..7 [..., n] to uint8 [..., n / 2]: first half of a row in the low nibbles, second in the high."""
    return pack_codes(codes + 8, 4, "halves")


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [..., n / 2] to int8 [..., n]."""
    return unpack_codes(packed, 4, order="halves").to(torch.int8) - 8


def ggml_bytes(codes: Tensor, scales: Tensor, name: str) -> Tensor:
    """llama.cpp's layout of q8_0 or q4_0 rows: each block its scale, then its codes.

    Args:
        codes: int8 [..., n].
        scales: [..., n / 32].
        name: "q8_0" or "q4_0".

    Returns:
        uint8 [..., n / 32 * 34], or * 18 at 4 bits.
    """
    blocks = codes.unflatten(-1, (-1, GGML_BLOCK))
    body = pack_nibbles(blocks) if name == "q4_0" else blocks.contiguous().view(torch.uint8)
    head = scales.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat((head, body), dim=-1).flatten(-2)
