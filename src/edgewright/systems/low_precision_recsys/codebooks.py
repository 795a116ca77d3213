"""Rows at 4 bits whose 16 values are learned: a codebook for every row, or one that a block of rows shares.

Guan et al. (arXiv 1911.02079, sections 3.3 and 3.4) replace a row's even steps by 16 centres of k-means in float16.
A row of its own costs ceil(d / 2) + 32 bytes, which pays only where rows are wide; a block of B rows shares the 32.

deviation: the published variant with shared books first clusters similar rows; here a block is B rows that stand next
to each other, so that no row needs to say which book is its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgewright.errors import FormatError, UsageError
from edgewright.io.bits import pack_codes, unpack_codes
from edgewright.io.row_codes import unpackable_rows

CENTRES = 16
STEPS = 25  # of k-means; it ends earlier where nothing moves
_CHUNK = 1 << 20  # values that are clustered at once


@dataclass(frozen=True)
class CodebookRows:
    """Rows as places in books of 16 values.

    packed: uint8 [n, ceil(dim / 2)], low nibble first. books: float16 [ceil(n / block), 16], rising; row r reads book
    r // block.
    """

    packed: Tensor
    books: Tensor
    block: int
    dim: int
    bits: int = 4

    def __post_init__(self) -> None:
        width, count = -(-self.dim // 2), -(-len(self.packed) // max(self.block, 1))
        if self.packed.dtype != torch.uint8 or self.packed.ndim != 2 or self.packed.shape[1] != width:
            raise FormatError(f"codes of {self.dim} values are uint8 [n, {width}], got {list(self.packed.shape)}")
        if self.block < 1 or self.books.dtype != torch.float16 or tuple(self.books.shape) != (count, CENTRES):
            raise FormatError(
                f"{len(self.packed)} rows in blocks of {self.block} have books float16 [{count}, {CENTRES}], got "
                f"{list(self.books.shape)} of {self.books.dtype}"
            )

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and books together."""
        return self.packed.numel() + 2 * self.books.numel()

    def codes(self) -> Tensor:
        """Codes of every row, uint8 [n, dim]."""
        return unpack_codes(self.packed, self.bits, self.dim)

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The float32 values [n, dim], or of the rows (int64 [m]) asked for: [m, dim]."""
        places = torch.arange(len(self), device=self.packed.device) if rows is None else rows.long()
        codes = unpack_codes(self.packed[places], self.bits, self.dim).long()
        books = self.books[torch.div(places, self.block, rounding_mode="floor")].float()
        return books.gather(1, codes)


@torch.no_grad()
def kmeans_rows(weight: Tensor, block: int = 1, steps: int = STEPS) -> CodebookRows:
    """W [n, d] with a book for every `block` consecutive rows (1: for every row).

    Lloyd's algorithm from 16 even steps between the least and the greatest value, so that the result is never farther
    from W than min-max at 4 bits (but for float16). Where a block has a row of zeros, the centre next to 0 becomes 0:
    padding stays exactly 0. Raises UsageError naming the first row that float16 cannot hold.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.shape[1]:
        raise UsageError(f"rows to cluster are a float matrix [n, d], got {list(weight.shape)} of {weight.dtype}")
    if block < 1 or steps < 0:
        raise UsageError(f"block={block}, steps={steps}: a book serves at least one row, steps is not negative")
    weight = weight.detach().float()
    rows, dim = weight.shape
    if rows and bool((bad := unpackable_rows(weight, 4)).any()):
        row = int(bad.nonzero()[0])
        raise UsageError(f"row {row} has NaN, infinity or values that float16 cannot hold ({int(bad.sum())} such rows)")
    whole = rows // block * block
    at_once = max(_CHUNK // (block * dim), 1) * block
    parts = [weight[start : min(start + at_once, whole)] for start in range(0, whole, at_once)]
    found = [_cluster(part.reshape(-1, block, dim), steps) for part in parts]
    if whole < rows:  # the last block has fewer rows
        found.append(_cluster(weight[whole:].unsqueeze(0), steps))
    codes = torch.cat([codes for codes, _ in found]) if found else weight.new_zeros((0, dim), dtype=torch.uint8)
    books = torch.cat([books for _, books in found]) if found else weight.new_zeros((0, CENTRES), dtype=torch.float16)
    return CodebookRows(pack_codes(codes, 4), books, block, dim)


def _cluster(rows: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Blocks [g, B, d] -> (codes uint8 [g * B, d], books float16 [g, 16])."""
    values = rows.flatten(1)
    low, high = values.aminmax(dim=1, keepdim=True)
    books = low + (high - low) * (torch.arange(CENTRES, device=values.device) / (CENTRES - 1))
    for _ in range(steps):
        codes = _nearest(books, values)
        sums = torch.zeros_like(books).scatter_add_(1, codes, values)
        counts = torch.zeros_like(books).scatter_add_(1, codes, torch.ones_like(values))
        moved = torch.where(counts > 0, sums / counts.clamp_min(1), books)
        if torch.equal(moved, books):
            break
        books = moved
    stored = books.half()
    padded = (rows == 0).all(2).any(1)
    stored[padded] = stored[padded].scatter(1, stored[padded].abs().argmin(1, keepdim=True), 0.0)
    return _nearest(stored.float(), values).to(torch.uint8).reshape(-1, rows.shape[2]), stored


def _nearest(books: Tensor, values: Tensor) -> Tensor:
    """The place of the nearest centre, books rising: int64 of the values' shape."""
    middles = (books[:, 1:] + books[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), values.contiguous())
