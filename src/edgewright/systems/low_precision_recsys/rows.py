"""A table's rows in one of the forms that a search may choose: codes with scale and bias, codebooks, or float16.

All forms answer the same: `dequantize(rows)` gives float32 values, `nbytes` what they cost. `KeptRows` adds float16
rows to any form, for rows that codes cannot hold. `StoredRows` is the module that holds a form as buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.row_codes import PackedRows, unpackable_rows
from edgewright.io.row_ranges import quantize_rows as quantize_plain_rows
from edgewright.systems.low_precision_recsys.codebooks import CodebookRows, kmeans_rows

TABLE_BITS = (2, 4, 8)  # what torch's operators look up
METHODS = ("minmax", "greedy", "kmeans")


@dataclass(frozen=True)
class HalfRows:
    """Rows as float16. packed: float16 [n, dim]."""

    packed: Tensor

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def dim(self) -> int:
        return self.packed.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return 2 * self.packed.numel()

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The float32 values of all rows or of those asked for."""
        return (self.packed if rows is None else self.packed[rows.long()]).float()


@dataclass(frozen=True)
class KeptRows:
    """`base` but for some rows: `ids` (int32 [k], rising) have the values of `kept` (float16 [k, dim])."""

    base: PackedRows | CodebookRows
    ids: Tensor
    kept: Tensor

    def __len__(self) -> int:
        return len(self.base)

    @property
    def dim(self) -> int:
        return self.base.dim

    @property
    def packed(self) -> Tensor:
        """The bytes of the base, in which kept rows are zeros."""
        return self.base.packed

    @property
    def nbytes(self) -> int:
        """Bytes of the base, the kept rows and their numbers."""
        return self.base.nbytes + 2 * self.kept.numel() + 4 * self.ids.numel()

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The float32 values of all rows or of those asked for."""
        values = self.base.dequantize(rows)
        if not len(self.ids):
            return values
        wanted = torch.arange(len(self), device=self.ids.device) if rows is None else rows.long()
        place = torch.searchsorted(self.ids.long(), wanted).clamp_max(len(self.ids) - 1)
        found = self.ids.long()[place] == wanted
        return torch.where(found.unsqueeze(1), self.kept[place].float(), values)


Rows = PackedRows | CodebookRows | HalfRows | KeptRows


def quantize_rows(
    weight: Tensor,
    bits: int = 4,
    method: str = "greedy",
    nbins: int = 200,
    ratio: float = 0.16,
    *,
    block: int = 1,
    keep: str | None = None,
) -> PackedRows | CodebookRows | KeptRows:
    """A table W [n, d] at 2, 4 or 8 bits: `.packed`, `.dequantize()`, `.nbytes`.

    method: "minmax", "greedy" (with nbins and ratio; 25 and 0.6 at 2 bits), or "kmeans" (4 bits, a codebook for every
    `block` rows). keep="fp16": rows with NaN, infinity or values that the form cannot hold, and rows so narrow that
    float16 has no scale for them, stay in float16 instead of raising UsageError with the first one's number.
    """
    if bits not in TABLE_BITS:
        raise UsageError(f"bits={bits!r}: tables have 2, 4 or 8 bits, e.g. quantize_rows(weight, bits=4)")
    if method not in METHODS or (method == "kmeans" and bits != 4):
        raise UsageError(f"method={method!r} at {bits} bits; use minmax or greedy, or kmeans at 4 bits")
    if keep not in (None, "fp16"):
        raise UsageError(f"keep={keep!r}; None refuses rows that no code holds, 'fp16' keeps them in float16")
    weight = weight.detach()
    if keep is None or weight.ndim != 2 or not len(weight):
        return _quantize(weight, bits, method, nbins, ratio, block)
    bad = unpackable_rows(weight, bits) | _too_narrow(weight, bits)
    ids = bad.nonzero().squeeze(1)
    base = _quantize(weight.masked_fill(bad.unsqueeze(1), 0.0), bits, method, nbins, ratio, block)
    return KeptRows(base, ids.to(torch.int32), weight[ids].half()) if len(ids) else base


def _quantize(
    weight: Tensor, bits: int, method: str, nbins: int, ratio: float, block: int
) -> PackedRows | CodebookRows:
    if method == "kmeans":
        return kmeans_rows(weight, block)
    return quantize_plain_rows(weight, bits, method, nbins, ratio)


def _too_narrow(weight: Tensor, bits: int) -> Tensor:
    """Bool [n]: rows that are not constant and whose scale would be zero in float16."""
    if bits == 8:
        return torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    low, high = weight.float().aminmax(dim=1)
    return (high > low) & (((high - low.half().float()) / (2**bits - 1)).half() == 0)


class StoredRows(nn.Module):
    """Rows of any form as buffers, so that they move between devices and are saved with their model.

    Several modules may hold the same StoredRows: a tied table is stored once.
    """

    packed: Tensor
    books: Tensor | None
    kept_ids: Tensor | None
    kept_rows: Tensor | None

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        base = rows.base if isinstance(rows, KeptRows) else rows
        self.bits = 16 if isinstance(base, HalfRows) else base.bits
        self.dim = base.dim
        self.block = base.block if isinstance(base, CodebookRows) else 0
        kept = rows if isinstance(rows, KeptRows) else None
        self.register_buffer("packed", base.packed)
        self.register_buffer("books", base.books if isinstance(base, CodebookRows) else None)
        self.register_buffer("kept_ids", kept.ids if kept else None)
        self.register_buffer("kept_rows", kept.kept if kept else None)

    @property
    def rows(self) -> Rows:
        """The buffers as rows. Raises FormatError where they do not fit each other."""
        base: PackedRows | CodebookRows
        if self.bits == 16:
            if self.packed.dtype != torch.float16 or self.packed.ndim != 2 or self.packed.shape[1] != self.dim:
                raise FormatError(f"rows in float16 are [n, {self.dim}], got {list(self.packed.shape)}")
            return HalfRows(self.packed)
        if self.books is not None:
            base = CodebookRows(self.packed, self.books, self.block, self.dim)
        else:
            base = PackedRows(self.packed, self.bits, self.dim)
        if self.kept_ids is None or self.kept_rows is None:
            return base
        return KeptRows(base, self.kept_ids, self.kept_rows)

    @property
    def count(self) -> int:
        """Rows of the table."""
        return len(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.rows.nbytes

    @property
    def weight(self) -> Tensor:
        """The float32 table [n, dim], built on each access."""
        return self.rows.dequantize()

    def vectors(self, ids: Tensor) -> Tensor:
        """The float32 vector of every id: [...] -> [..., dim]."""
        return self.rows.dequantize(ids.reshape(-1)).reshape(*ids.shape, self.dim)

    def extra_repr(self) -> str:
        kept = 0 if self.kept_ids is None else len(self.kept_ids)
        return f"{self.count} x {self.dim}, {self.bits} bits" + (f", {kept} rows in float16" if kept else "")
