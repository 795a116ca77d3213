"""Lookups in low-precision tables: bags, single ids, and quotient and remainder; each stands for a float module.

Sums over packed rows go through torch.ops.quantized.embedding_bag_{byte,4bit,2bit}_rowwise_offsets, which unpack in
registers while they add; where torch lacks them, or rows have another form, plain torch does the same: unpack the rows
that are asked for, then add. float16 accumulation is emulated: what an accelerator that adds in half would give.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.io.row_codes import PackedRows
from edgewright.systems.dlrm.bags import check_ids
from edgewright.systems.dlrm.tables import QREmbeddingBag
from edgewright.systems.low_precision_recsys.rows import StoredRows, quantize_rows

ACCUMULATE = ("fp32", "fp16")
_OPERATORS = {8: "byte", 4: "4bit", 2: "2bit"}


def fused_operator(bits: int) -> Any | None:
    """Torch's lookup of rows at so many bits, or None where this torch has none."""
    name = f"embedding_bag_{_OPERATORS.get(bits)}_rowwise_offsets"
    return getattr(torch.ops.quantized, name) if hasattr(torch.ops.quantized, name) else None


class RowwiseQuantEmbeddingBag(nn.Module):
    """nn.EmbeddingBag over low-precision rows, in inference. Same arguments, float32 [B, dim] out; empty bags are 0.

    fused: None takes torch's operator where it can; False never does (torch operations, which give the same).
    accumulate: "fp32", or "fp16" to emulate sums in half precision (modes sum and mean).
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
        if mode not in ("sum", "mean", "max") or accumulate not in ACCUMULATE:
            raise UsageError(f"mode={mode!r}, accumulate={accumulate!r}: sum, mean or max; fp32 or fp16")
        if accumulate == "fp16" and mode == "max":
            raise UsageError("accumulate='fp16' with mode='max': nothing is added there; leave it fp32")
        self.stored, self.mode, self.include_last_offset = stored, mode, include_last_offset
        self.padding_idx, self.accumulate, self.fused = padding_idx, accumulate, fused

    @classmethod
    def from_float(
        cls, bag: nn.EmbeddingBag, bits: int = 4, method: str = "greedy", nbins: int = 200, ratio: float = 0.16
    ) -> RowwiseQuantEmbeddingBag:
        """The low-precision form of a bag (see `quantize_rows`). Its padding row becomes exactly 0."""
        return cls.like(bag, StoredRows(quantize_rows(bag_weight(bag), bits, method, nbins, ratio)))

    @classmethod
    def like(cls, bag: nn.EmbeddingBag, stored: StoredRows) -> RowwiseQuantEmbeddingBag:
        """Rows that answer as `bag` does. Raises Unsupported for bags that rescale their rows."""
        if bag.max_norm is not None:
            raise Unsupported("an EmbeddingBag with max_norm changes its rows while it looks them up; set it to None")
        return cls(stored, bag.mode, bag.include_last_offset, bag.padding_idx)

    @property
    def rows(self) -> int:
        """Ids that the table knows."""
        return self.stored.count

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.stored.nbytes

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Ids [nnz] with offsets, or [B, m] without; weights of the ids' shape in mode sum. -> [B, dim].

        Raises OutOfRangeId (an IndexError) naming the id that the table does not have.
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
        high = self.quotient.vectors(torch.div(ids, self.collisions, rounding_mode="floor"))
        low = self.remainder.vectors(ids % self.collisions)
        if self.combine == "concat":
            return torch.cat([high, low], -1)
        return high * low if self.combine == "mult" else high + low


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
