"""Embedding tables whose lookup is the sum of a bag: plain, as quotient and remainder, or narrow and projected.

All take (values [nnz], offsets [B + 1], weights [nnz] or None) and give [B, d]; an empty bag gives zeros. Gradients of
tables are sparse: a step touches the rows that the batch asked for and no others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import UsageError

COMBINATIONS = ("mult", "add", "concat")


class EmbeddingTable(nn.EmbeddingBag):
    """torch's EmbeddingBag as DLRM uses it: sums, sparse gradients, rows from U(-sqrt(1/n), sqrt(1/n))."""

    def __init__(self, rows: int, dim: int, generator: torch.Generator | None = None) -> None:
        weight = torch.empty(rows, dim).uniform_(-(rows**-0.5), rows**-0.5, generator=generator)
        super().__init__(rows, dim, mode="sum", sparse=True, include_last_offset=True, _weight=weight)

    @property
    def rows(self) -> int:
        """Ids that the table knows."""
        return self.num_embeddings


class QREmbeddingBag(nn.Module):
    """Two short tables in place of a long one (quotient and remainder, arXiv 1909.02107).

    Id i is row i // c of the quotients [ceil(n / c), d] and row i % c of the remainders [c, d], combined by "mult"
    (default), "add", or "concat" (both of width d / 2): every id keeps a vector of its own.

    deviation: each id's vector is formed before the bag is summed, so a bag is the sum of its ids' vectors whatever the
    combination. The official code multiplies the two sums, which is the same for bags of one id only. Remainders of
    "mult" start around 1, so that a product starts at the size of a plain table's row.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        collisions: int = 4,
        combine: str = "mult",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if combine not in COMBINATIONS:
            raise UsageError(f"combine={combine!r}; use one of {', '.join(COMBINATIONS)}")
        if not 1 <= collisions <= rows:
            raise UsageError(f"collisions={collisions} for a table of {rows} rows; it is at least 1 and at most {rows}")
        if combine == "concat" and dim % 2:
            raise UsageError(f"combine='concat' halves the width, and dim={dim} is odd")
        self.rows, self.dim, self.collisions, self.combine = rows, dim, collisions, combine
        width = dim // 2 if combine == "concat" else dim
        reach = rows**-0.5
        quotient = torch.empty(-(-rows // collisions), width).uniform_(-reach, reach, generator=generator)
        remainder = torch.empty(collisions, width)
        remainder.uniform_(*((0.5, 1.5) if combine == "mult" else (-reach, reach)), generator=generator)
        self.quotient, self.remainder = nn.Parameter(quotient), nn.Parameter(remainder)

    def forward(self, values: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        each = self.vectors(values, sparse=True)
        places = torch.arange(len(values), device=values.device)
        return F.embedding_bag(places, each, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)

    def vectors(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """The vector of every id: [...] -> [..., d]."""
        return quotient_vectors(
            ids,
            self.collisions,
            self.combine,
            lambda rows: F.embedding(rows, self.quotient, sparse=sparse),
            lambda rows: F.embedding(rows, self.remainder, sparse=sparse),
        )


def quotient_vectors(
    ids: Tensor,
    collisions: int,
    combine: str,
    quotient: Callable[[Tensor], Tensor],
    remainder: Callable[[Tensor], Tensor],
) -> Tensor:
    """The vector of every id [...] from the look-ups of its quotient and its remainder: [..., d]."""
    high, low = quotient(torch.div(ids, collisions, rounding_mode="floor")), remainder(ids % collisions)
    if combine == "concat":
        return torch.cat([high, low], -1)
    return high * low if combine == "mult" else high + low


class ProjectedTable(nn.Module):
    """A narrow table [n, w] and a matrix that lifts its sums to d (mixed dimensions, arXiv 1909.11810)."""

    def __init__(self, rows: int, width: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.table = EmbeddingTable(rows, width, generator)
        lift = torch.empty(dim, width).normal_(0.0, (2.0 / (dim + width)) ** 0.5, generator=generator)
        self.lift = nn.Parameter(lift)

    @property
    def rows(self) -> int:
        """Ids that the table knows."""
        return self.table.num_embeddings

    def forward(self, values: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.project(self.table(values, offsets, weights))

    def project(self, sums: Tensor) -> Tensor:
        """[B, w] -> [B, d]."""
        return F.linear(sums, self.lift)


Table = EmbeddingTable | QREmbeddingBag | ProjectedTable


def row_parameters(table: Table) -> list[nn.Parameter]:
    """The parameters of a table whose gradients are sparse."""
    if isinstance(table, QREmbeddingBag):
        return [table.quotient, table.remainder]
    return [(table.table if isinstance(table, ProjectedTable) else table).weight]  # type: ignore[list-item]


def table_vectors(table: Table, ids: Tensor, weights: Tensor) -> Tensor:
    """The sum of padded bags in operators that every runtime has: ids [B, m], weights [B, m] -> [B, d].

    ExecuTorch's portable runtime has no kernel for EmbeddingBag: a lookup, a mask and a sum compute the same.
    """
    if isinstance(table, QREmbeddingBag):
        return (table.vectors(ids) * weights.unsqueeze(-1)).sum(1)
    rows = F.embedding(ids, row_parameters(table)[0])
    sums = (rows * weights.unsqueeze(-1)).sum(1)
    return table.project(sums) if isinstance(table, ProjectedTable) else sums
