"""Rows in operators that every runtime has: bytes are gathered by id and unpacked by arithmetic.

Codes stay codes: what a file holds is what the model holds, scales in float16 as their two bytes. Every step of the
arithmetic is exact in float32, so that the vectors equal those of the model bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported
from edgewright.io.packed import PackedEmbedding, PackedTensor
from edgewright.io.row_codes import PackedRows
from edgewright.systems.low_precision_recsys.codebooks import CodebookRows
from edgewright.systems.low_precision_recsys.rows import HalfRows, StoredRows

CANDIDATES = 20  # steps that a symmetric row is tried with


class Gathered(nn.Module):
    """The vector of every id, from packed rows: int64 [...] -> float32 [..., dim]."""

    packed: Tensor
    ends: Tensor | None

    def __init__(self, rows: PackedRows) -> None:
        super().__init__()
        self.bits, self.dim = rows.bits, rows.dim
        wide = rows.bits == 8  # whose scale and bias are float32; below, they are decoded from the row's bytes
        self.width = rows.packed.shape[1] - (8 if wide else 4)
        self.register_buffer("packed", rows.packed[:, : self.width].contiguous() if wide else rows.packed)
        self.register_buffer("ends", rows.scale_bias() if wide else None)
        self.decode = None if wide else Half()

    def forward(self, ids: Tensor) -> Tensor:
        data = self.packed[ids].float()
        if self.ends is not None:
            ends = self.ends[ids]
        else:
            data, last = data.split([self.width, 4], -1)
            ends = self.decode(last)  # type: ignore[misc]
        scale, bias = ends.split(1, -1)
        return unpacked(data, self.bits, self.dim) * scale + bias


class BookGathered(nn.Module):
    """The same from codebooks."""

    codes: Tensor
    books: Tensor

    def __init__(self, rows: CodebookRows) -> None:
        super().__init__()
        self.block, self.dim, self.decode = rows.block, rows.dim, Half()
        self.register_buffer("codes", rows.packed)
        self.register_buffer("books", half_bytes(rows.books))

    def forward(self, ids: Tensor) -> Tensor:
        codes = unpacked(self.codes[ids].float(), 4, self.dim).long()
        books = self.decode(self.books[torch.div(ids, self.block, rounding_mode="floor")].float())
        return books.gather(-1, codes)


class HalfGathered(nn.Module):
    """The same from rows in float16."""

    rows: Tensor

    def __init__(self, rows: HalfRows) -> None:
        super().__init__()
        self.decode = Half()
        self.register_buffer("rows", half_bytes(rows.packed))

    def forward(self, ids: Tensor) -> Tensor:
        return self.decode(self.rows[ids].float())


class Half(nn.Module):
    """float16 from its bytes, by arithmetic that is exact in float32 (finite values): [..., 2 k] -> [..., k].

    Exporters that take float32 only, and runtimes without float16, then hold rows in two bytes a value all the same.
    """

    powers: Tensor

    def __init__(self) -> None:
        super().__init__()
        exponents = torch.arange(32).clamp_min(1) - 25  # of the last bit of the fraction; 0 stands for subnormals
        self.register_buffer("powers", torch.pow(2.0, exponents.float()))

    def forward(self, data: Tensor) -> Tensor:
        low, high = data.reshape(*data.shape[:-1], -1, 2).split(1, -1)
        negative = torch.floor(high / 128)
        rest = high - negative * 128
        exponent = torch.floor(rest / 4)
        fraction = (rest - exponent * 4) * 256 + low + exponent.clamp(0, 1) * 1024
        value = fraction * self.powers[exponent.long()] * (1 - 2 * negative)
        return value.squeeze(-1)


def half_bytes(values: Tensor) -> Tensor:
    """float16 [..., k] as uint8 [..., 2 k], the low byte first."""
    return values.contiguous().view(torch.uint8)


def unpacked(data: Tensor, bits: int, dim: int) -> Tensor:
    """Bytes [..., b] as float whole numbers -> codes [..., dim], by arithmetic that is exact in float32."""
    if bits == 8:
        return data
    parts = []
    for _ in range(8 // bits):
        rest = torch.floor(data / 2**bits)
        parts.append(data - rest * 2**bits)
        data = rest
    return torch.stack(parts, -1).flatten(-2)[..., :dim]


def gathered(stored: StoredRows) -> nn.Module:
    """The rows as they are. Raises Unsupported for tables with rows kept in float16."""
    rows = stored.rows
    if isinstance(rows, PackedRows):
        return Gathered(rows)
    if isinstance(rows, CodebookRows):
        return BookGathered(rows)
    if isinstance(rows, HalfRows):
        return HalfGathered(rows)
    raise Unsupported("a table with rows kept in float16 beside its codes cannot be written for a runtime")


def symmetric(stored: StoredRows) -> nn.Module:
    """The rows for ExecuTorch's embedding kernels, which know no bias: value = step x code, a step a row.

    Of 20 steps the one with the least squared error; float16 rows and codebooks of 4 bits are written as they are.
    """
    rows = stored.rows
    if not isinstance(rows, PackedRows) or (rows.dim * rows.bits) % 8:
        return gathered(stored)
    values = rows.dequantize()
    low, high = -(2 ** (rows.bits - 1)), 2 ** (rows.bits - 1) - 1
    reach = values.abs().amax(1, keepdim=True)
    best = torch.where(reach > 0, reach / high, torch.ones_like(reach))
    least = torch.full_like(best, float("inf"))
    codes = torch.zeros_like(values)
    for place in range(CANDIDATES):
        step = torch.where(reach > 0, reach / high * (1 - place / (2 * CANDIDATES)), torch.ones_like(reach))
        tried = (values / step).round_().clamp_(low, high)
        error = (tried * step - values).square_().sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
        codes = torch.where(better, tried, codes)
    return PackedEmbedding(PackedTensor(codes.to(torch.int8), best, f"int{rows.bits}"))
