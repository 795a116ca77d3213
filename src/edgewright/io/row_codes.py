"""Table rows at few bits, each with a scale and a bias of its own: one byte layout for tables, checkpoints and updates.

Row r of W [n, d] is stored as codes q and two floats: value = scale * q + bias, bias the row's lowest value.

    bits  bytes a row            scale, bias             codes in a byte
    8     d + 8                  float32, at row end     one
    4     ceil(d / 2) + 4        float16, at row end     two, low nibble first
    2     ceil(d / 4) + 4        float16, at row end     four, low bits first
    3     ceil(3 d / 8) + 4      float16, at row end     8 codes in 3 bytes, a little-endian stream of bits

The bytes at 8, 4 and 2 bits are those of torch.ops.quantized.embedding_bag_{byte,4bit,2bit}_prepack, which FBGEMM reads
too. Scale and bias are rounded to their stored type before the codes are computed, so that packing unpacked rows again
gives the same bytes at 2, 3 and 4 bits, and the same codes at 8 (values there move by one unit in the last place).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgewright.errors import FormatError, UsageError
from edgewright.io.bits import pack_codes, packed_bytes, unpack_codes

ROW_BITS = (2, 3, 4, 8)
_HALF_LARGEST = 65504.0
_CHUNK = 1 << 22  # weights that are in flight as float32 at once


@dataclass(frozen=True)
class PackedRows:
    """Rows of a table at few bits.

    packed: uint8 [n, row_bytes(dim, bits)]. dim: values of a row. Where dim does not fill the last byte, codes 0 do.
    """

    packed: Tensor
    bits: int
    dim: int

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        wanted = row_bytes(self.dim, self.bits)
        if self.packed.dtype != torch.uint8 or self.packed.ndim != 2 or self.packed.shape[1] != wanted:
            raise FormatError(
                f"packed rows are {str(self.packed.dtype).removeprefix('torch.')}{list(self.packed.shape)}; rows of "
                f"{self.dim} values at {self.bits} bits are uint8 [n, {wanted}]"
            )

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases together."""
        return self.packed.numel()

    def scale_bias(self) -> Tensor:
        """Scale and bias of every row, float32 [n, 2]."""
        width = packed_bytes(self.dim, self.bits)
        # a view as floats wants memory of its own, with the strides of a matrix even where there is one row
        ends = self.packed[:, width:].clone(memory_format=torch.contiguous_format)
        return ends.view(torch.float32 if self.bits == 8 else torch.float16).float()

    def codes(self) -> Tensor:
        """Codes of every row, uint8 [n, dim]."""
        return unpack_codes(self.packed[:, : packed_bytes(self.dim, self.bits)], self.bits, self.dim)

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The float32 values [n, dim], or of the rows (int64 [m]) asked for: [m, dim]."""
        chosen = self if rows is None else PackedRows(self.packed[rows], self.bits, self.dim)
        scale, bias = chosen.scale_bias().unbind(1)
        return chosen.codes().float().mul_(scale.unsqueeze(1)).add_(bias.unsqueeze(1))


def row_bytes(dim: int, bits: int) -> int:
    """Bytes of a row of `dim` values at `bits` bits, scale and bias included."""
    _check_bits(bits)
    return packed_bytes(dim, bits) + (8 if bits == 8 else 4)


def unpackable_rows(weight: Tensor, bits: int) -> Tensor:
    """Bool [n]: rows with NaN or infinity, or, below 8 bits, values whose scale or bias float16 cannot hold."""
    low, high = weight.aminmax(dim=1)
    low, high = low.float(), high.float()
    bad = ~(torch.isfinite(low) & torch.isfinite(high) & torch.isfinite(high - low))
    if bits < 8:
        bad |= (low.abs() > _HALF_LARGEST) | ((high - low) / (2**bits - 1) > _HALF_LARGEST)
    return bad


def stored_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, bias, 1 / scale) as the layout stores them and the codes are computed with; all float32 of low's shape.

    Where float16 cannot hold the scale (below 6e-8) or its inverse, the scale is 1 and every code 0, as in torch's
    operator: such a row becomes its lowest value, which is closer than float16 could say.
    """
    if bits == 8:
        span = high - low
        return span / 255.0, low, 255.0 / (span + 1e-8)
    bias = low.half().float()
    span = high - bias
    scale = (span / (2**bits - 1)).half().float()
    scale = torch.where(span == 0, 1.0, scale)
    inverse = torch.where(scale == 0, 1.0, 1.0 / scale)
    # the largest inverse that the operator's float16 scale can have is finite; a zero scale stands for "too small"
    return torch.where(scale == 0, 1.0, scale), bias, inverse


def pack_rows(weight: Tensor, bits: int, low: Tensor | None = None, high: Tensor | None = None) -> PackedRows:
    """Rows [n, d] packed at 2, 3, 4 or 8 bits between low and high ([n] each; None: the row's least and largest value).

    Values outside the range become its ends. Raises UsageError naming the first row that `unpackable_rows` finds.
    """
    _check_bits(bits)
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.shape[1]:
        raise UsageError(f"rows to pack are a float matrix [n, d], got {list(weight.shape)} of {weight.dtype}")
    weight = weight.detach()
    if len(weight):
        bad = unpackable_rows(weight, bits)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise UsageError(
                f"row {row} has NaN, infinity or values that no {bits}-bit row can hold ({int(bad.sum())} such rows); "
                "keep such rows in float (unpackable_rows finds them)"
            )
    packed = torch.empty(len(weight), row_bytes(weight.shape[1], bits), dtype=torch.uint8, device=weight.device)
    step = max(_CHUNK // weight.shape[1], 1)
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        rows = weight[part].float()
        least, most = rows.aminmax(dim=1)
        packed[part] = _pack_chunk(
            rows, bits, least if low is None else low[part], most if high is None else high[part]
        )
    return PackedRows(packed, bits, weight.shape[1])


def _pack_chunk(rows: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    scale, bias, inverse = stored_range(low.float(), high.float(), bits)
    codes = rows.sub(bias.unsqueeze(1)).mul_(inverse.unsqueeze(1)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    ends = torch.stack([scale, bias], 1)
    ends = ends if bits == 8 else ends.half()
    return torch.cat([pack_codes(codes, bits), ends.contiguous().view(torch.uint8)], 1)


def _check_bits(bits: int) -> None:
    if bits not in ROW_BITS:
        raise UsageError(f"bits={bits!r}; rows are packed at {', '.join(map(str, ROW_BITS))} bits")
