"""Low-precision tables: rows as codes, codebooks or float16, and the lookups that stand for float modules.

All forms of rows answer the same: `dequantize(rows)` gives float32 values, `nbytes` what they cost. `MixedRows` adds
float16 rows to any form, for rows that codes cannot hold. `StoredRows` is the module that holds a form as buffers.

Codebooks: Guan et al. (arXiv 1911.02079, sections 3.3 and 3.4) replace a row's even levels by 16 centres of k-means in
float16. A row of its own costs ceil(d / 2) + 32 bytes, which pays only where rows are wide; a block of B rows shares
the 32.

deviation: the published variant with shared books first clusters similar rows; here a block is B rows that stand next
to each other, so that no row needs to say which book is its own.

Sums over packed rows go through torch.ops.quantized.embedding_bag_{byte,4bit,2bit}_rowwise_offsets, which unpack in
registers while they add; where torch lacks them, or rows have another form, plain torch does the same: unpack the rows
that are asked for, then add. float16 accumulation is emulated: what an accelerator that adds in half would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, one_of, whole
from edgewright.errors import FormatError, Unsupported, UsageError
from edgewright.io.bits import pack_codes, unpack_codes
from edgewright.io.row_codes import PackedRows, unpackable_rows
from edgewright.io.row_ranges import quantize_rows as quantize_plain_rows
from edgewright.systems.dlrm.clicks import check_ids
from edgewright.systems.dlrm.model import QREmbeddingBag, quotient_vectors

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

    Lloyd's algorithm from 16 even levels between the least and the greatest value, so that the result is never farther
    from W than min-max at 4 bits (but for float16). Where a block has a row of zeros, the centre next to 0 becomes 0:
    padding stays exactly 0. Raises UsageError naming the first row that float16 cannot hold.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.shape[1]:
        raise UsageError(f"rows to cluster are a float matrix [n, d], got {list(weight.shape)} of {weight.dtype}")
    check("block", block, whole(1))
    check("steps", steps, whole(0))
    weight = weight.detach().float()
    rows, dim = weight.shape
    if rows and bool((bad := unpackable_rows(weight, 4)).any()):
        row = int(bad.nonzero()[0])
        raise UsageError(f"row {row} has NaN, infinity or values that float16 cannot hold ({int(bad.sum())} such rows)")
    full = rows // block * block
    at_once = max(_CHUNK // (block * dim), 1) * block
    parts = [weight[start : min(start + at_once, full)] for start in range(0, full, at_once)]
    found = [_cluster(part.reshape(-1, block, dim), steps) for part in parts]
    if full < rows:  # the last block has fewer rows
        found.append(_cluster(weight[full:].unsqueeze(0), steps))
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


TABLE_BITS = (2, 4, 8)  # what torch's operators look up
METHODS = ("minmax", "greedy", "kmeans")


@dataclass(frozen=True)
class Float16Rows:
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
class MixedRows:
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


Rows = PackedRows | CodebookRows | Float16Rows | MixedRows


def quantize_rows(
    weight: Tensor,
    bits: int = 4,
    method: str = "greedy",
    nbins: int = 200,
    ratio: float = 0.16,
    *,
    block: int = 1,
    keep: str | None = None,
) -> PackedRows | CodebookRows | MixedRows:
    """A table at 2, 4 or 8 bits, value = scale x code + bias with the row's least value as bias.

    Args:
        weight: W [n, d], float.
        bits: of a code.
        method: "minmax"; "greedy", the range of least squared error (arXiv 1911.02079, algorithm 1); or "kmeans"
            (4 bits, a codebook for every `block` rows).
        nbins: parts of the range by which "greedy" cuts it; torch's default.
        ratio: share of the range that "greedy" cuts at most; torch's default. At 2 bits nbins=25 and ratio=0.6 halve
            the squared error, the defaults barely help.
        block: neighbouring rows that share a codebook.
        keep: None refuses rows with NaN, infinity or values that the form cannot hold; "fp16" keeps them, and rows so
            narrow that float16 has no scale for them, in float16.

    Returns:
        The rows: `.packed` (uint8 [n, bytes]), `.dequantize()` (float32 [n, d]), `.nbytes`.

    Raises:
        UsageError: an argument breaks its rule, or the first row that no code holds, by its number.
    """
    check("bits", bits, one_of(*TABLE_BITS))
    check("method", method, one_of(*METHODS) if bits == 4 else one_of("minmax", "greedy"), "kmeans goes with bits=4")
    check("keep", keep, one_of(None, "fp16"))
    weight, kept = weight.detach(), None
    if keep and weight.ndim == 2 and len(weight):
        bad = unpackable_rows(weight, bits) | _too_narrow(weight, bits)
        ids = bad.nonzero().squeeze(1)
        if len(ids):
            kept = ids.to(torch.int32), weight[ids].half()
            weight = weight.masked_fill(bad.unsqueeze(1), 0.0)
    base = kmeans_rows(weight, block) if method == "kmeans" else quantize_plain_rows(weight, bits, method, nbins, ratio)
    return MixedRows(base, *kept) if kept else base


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
        base = rows.base if isinstance(rows, MixedRows) else rows
        self.bits = 16 if isinstance(base, Float16Rows) else base.bits
        self.dim = base.dim
        self.block = base.block if isinstance(base, CodebookRows) else 0
        kept = rows if isinstance(rows, MixedRows) else None
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
            return Float16Rows(self.packed)
        if self.books is not None:
            base = CodebookRows(self.packed, self.books, self.block, self.dim)
        else:
            base = PackedRows(self.packed, self.bits, self.dim)
        if self.kept_ids is None or self.kept_rows is None:
            return base
        return MixedRows(base, self.kept_ids, self.kept_rows)

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


ACCUMULATE = ("fp32", "fp16")
_OPERATORS = {8: "byte", 4: "4bit", 2: "2bit"}


def fused_operator(bits: int) -> Any | None:
    """Torch's lookup of rows at so many bits, or None where this torch has none."""
    name = f"embedding_bag_{_OPERATORS.get(bits)}_rowwise_offsets"
    return getattr(torch.ops.quantized, name) if hasattr(torch.ops.quantized, name) else None


class RowwiseQuantEmbeddingBag(nn.Module):
    """nn.EmbeddingBag over low-precision rows, in inference. Same arguments, float32 [B, dim] out; empty bags are 0.

    Args:
        stored: the rows.
        mode: "sum", "mean" or "max", as nn.EmbeddingBag.
        include_last_offset: offsets have an entry for the end of the last bag.
        padding_idx: row that bags leave out; it is stored as zeros.
        accumulate: "fp32", or "fp16" to emulate sums in half precision (modes sum and mean).
        fused: None takes torch's operator where it can; False never does (torch operations, which give the same).

    Raises:
        UsageError: another mode or accumulation, or "fp16" with "max".
    """

    def __init__(
        self,
        stored: StoredRows,
        mode: str = "sum",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        accumulate: str = "fp32",
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        check("mode", mode, one_of("sum", "mean", "max"))
        check("accumulate", accumulate, one_of("fp32") if mode == "max" else one_of(*ACCUMULATE))
        self.stored, self.mode, self.include_last_offset = stored, mode, include_last_offset
        self.padding_idx, self.accumulate, self.fused = padding_idx, accumulate, fused

    @classmethod
    def from_float(
        cls, bag: nn.EmbeddingBag, bits: int = 4, method: str = "greedy", nbins: int = 200, ratio: float = 0.16
    ) -> RowwiseQuantEmbeddingBag:
        """The low-precision form of a bag; its padding row becomes exactly 0.

        Args:
            bag: the float bag, without max_norm.
            bits: of a code: 2, 4 or 8.
            method: of the range, see `quantize_rows`.
            nbins: steps of the greedy search.
            ratio: share of the range that it may cut.

        Returns:
            A bag with the same mode, offsets and padding.

        Raises:
            UsageError: an argument of `quantize_rows` or a row that no code holds.
            Unsupported: the bag rescales its rows.
        """
        return cls.like(bag, StoredRows(quantize_rows(bag_weight(bag), bits, method, nbins, ratio)))

    @classmethod
    def like(cls, bag: nn.EmbeddingBag, stored: StoredRows) -> RowwiseQuantEmbeddingBag:
        """Rows that answer as a float bag does.

        Args:
            bag: whose mode, offsets and padding are taken.
            stored: the rows.

        Raises:
            Unsupported: the bag rescales its rows (max_norm).
        """
        if bag.max_norm is not None:
            raise Unsupported("an EmbeddingBag with max_norm changes its rows while it looks them up; set it to None")
        return cls(stored, bag.mode, bag.include_last_offset, bag.padding_idx)

    @property
    def rows(self) -> int:
        """Ids that the table knows."""
        return self.stored.count

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """The sum, mean or maximum of every bag's rows.

        Args:
            input: ids, int64 or int32 [nnz] with offsets, or [B, m] without.
            offsets: where each bag begins, [B] or [B + 1] with `include_last_offset`.
            per_sample_weights: float of the ids' shape, in mode "sum".

        Returns:
            float32 [B, dim].

        Raises:
            UsageError: weights in another mode, or offsets that do not go with the ids.
            OutOfRangeId: an id that the table does not have (an IndexError too).
        """
        if per_sample_weights is not None and self.mode != "sum":
            raise UsageError(f"weights are for mode='sum', this bag has mode={self.mode!r}")
        last = self.include_last_offset
        if input.ndim == 2:
            if offsets is not None:
                raise UsageError("ids [B, m] are bags of m ids each; offsets go with ids in one row")
            size, width = input.shape
            offsets = torch.arange(0, (size + 1) * max(width, 1), max(width, 1), device=input.device)[: size + 1]
            offsets, last = offsets * (width > 0), True
            input = input.reshape(-1)
            per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        if offsets is None:
            raise UsageError("ids in one row need offsets that say where each bag begins")
        if not last:
            offsets = torch.cat([offsets, offsets.new_tensor([len(input)])])
        try:
            return self._sums(input, offsets, per_sample_weights)
        except (RuntimeError, IndexError):
            check_ids(input, self.rows, "of this bag", offsets)  # says which id
            raise

    def _sums(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        rows = self.stored.rows
        operator = None
        if self.mode != "max" and self.accumulate == "fp32" and self.fused is not False and ids.device.type == "cpu":
            operator = fused_operator(rows.bits) if isinstance(rows, PackedRows) else None
        if operator is None:
            return self._in_torch(ids, offsets, weights)
        if weights is not None:
            weights = weights.detach().float().contiguous()
        ids, offsets = ids.long().contiguous(), offsets.long().contiguous()
        # the row of padding is exactly 0, so that sums need not know of it
        sums = operator(self.stored.packed, ids, offsets, False, 0, False, weights, None, True)[:, : rows.dim]
        return sums if self.mode == "sum" else sums / self._counts(ids, offsets)

    def _in_torch(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Unpack what is asked for, then add."""
        check_ids(ids, self.rows, "of this bag", offsets)
        vectors = self.stored.vectors(ids)
        if self.accumulate == "fp16":
            sums = _half_sums(vectors, offsets, weights)
            return sums if self.mode == "sum" else sums / self._counts(ids, offsets)
        places = torch.arange(len(ids), device=ids.device)
        padding = None
        if self.padding_idx is not None:  # one more row stands for all padding, and is left out
            padding = len(ids)
            places = torch.where(ids == self.padding_idx, padding, places)
            vectors = torch.cat([vectors, vectors.new_zeros(1, self.stored.dim)])
        if not len(vectors):
            return vectors.new_zeros(len(offsets) - 1, self.stored.dim)
        return F.embedding_bag(
            places,
            vectors,
            offsets.long(),
            mode=self.mode,
            per_sample_weights=None if weights is None else weights.float(),
            include_last_offset=True,
            padding_idx=padding,
        )

    def _counts(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Ids of every bag that are not padding, at least 1: float32 [B, 1]."""
        there = torch.ones_like(ids) if self.padding_idx is None else (ids != self.padding_idx).long()
        ends = torch.cat([there.new_zeros(1), there.cumsum(0)])
        return (ends[offsets[1:].long()] - ends[offsets[:-1].long()]).clamp_min(1).float().unsqueeze(1)

    def extra_repr(self) -> str:
        return f"mode={self.mode}, padding_idx={self.padding_idx}, accumulate={self.accumulate}"


class RowwiseQuantEmbedding(nn.Module):
    """nn.Embedding over low-precision rows, in inference. int64 [...] -> float32 [..., dim]."""

    def __init__(self, stored: StoredRows) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, input: Tensor) -> Tensor:
        check_ids(input.reshape(-1), self.stored.count, "of this embedding")
        return self.stored.vectors(input)


class RowwiseQuantQRBag(nn.Module):
    """`QREmbeddingBag` over two low-precision tables; each is quantised once, the products are formed in float32."""

    def __init__(self, table: QREmbeddingBag, quotient: StoredRows, remainder: StoredRows) -> None:
        super().__init__()
        self.rows, self.collisions, self.combine = table.rows, table.collisions, table.combine
        self.quotient, self.remainder = quotient, remainder

    def forward(self, values: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        check_ids(values, self.rows, "of quotients and remainders", offsets)
        places = torch.arange(len(values), device=values.device)
        vectors = self.vectors(values)
        return F.embedding_bag(
            places, vectors, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    def vectors(self, ids: Tensor) -> Tensor:
        """The vector of every id: [...] -> [..., d]."""
        return quotient_vectors(ids, self.collisions, self.combine, self.quotient.vectors, self.remainder.vectors)


def bag_weight(table: nn.EmbeddingBag | nn.Embedding) -> Tensor:
    """The float32 rows, the padding row of a bag as zeros: a bag leaves it out whatever it holds."""
    weight = table.weight.detach().float()
    if isinstance(table, nn.EmbeddingBag) and table.padding_idx is not None:
        weight = weight.clone()
        weight[table.padding_idx] = 0.0
    return weight


def _half_sums(vectors: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """Bags added one id after the other, the sum rounded to float16 after each: [B, d] float32."""
    begin, lengths = offsets[:-1].long(), offsets.diff()
    total = vectors.new_zeros(len(begin), vectors.shape[1])
    for place in range(int(lengths.max()) if len(lengths) else 0):
        bags = (lengths > place).nonzero().squeeze(1)
        at = begin[bags] + place
        term = vectors[at] if weights is None else vectors[at] * weights[at].float().unsqueeze(1)
        total[bags] = (total[bags] + term).half().float()
    return total
