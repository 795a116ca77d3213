"""One bit a row: which rows of a table changed."""

from __future__ import annotations

import torch
from torch import Tensor


class RowBits:
    """uint8 [ceil(n / 8)]: row r is bit r % 8 of byte r // 8."""

    def __init__(self, rows: int, device: torch.device | None = None) -> None:
        self.rows = rows
        self.bits = torch.zeros(-(-rows // 8), dtype=torch.uint8, device=device)
        self._powers = (1 << torch.arange(8, device=device)).to(torch.uint8)

    def mark(self, rows: Tensor) -> None:
        """Set the bits of `rows`, int64 [m], each named once.

        Distinct rows that are not set yet have distinct bits, so that adding them to a byte is the same as OR.
        """
        place = rows >> 3
        self.bits.index_add_(0, place, self._powers[rows & 7] & ~self.bits[place])

    def merge(self, other: RowBits) -> None:
        """OR with the bits of as many rows."""
        self.bits |= other.bits

    def copy(self) -> RowBits:
        twin = RowBits(self.rows, self.bits.device)
        twin.bits = self.bits.clone()
        return twin

    def clear(self) -> None:
        self.bits.zero_()

    def fill(self) -> None:
        self.bits.fill_(255)

    def mask(self) -> Tensor:
        """bool [n]."""
        return (self.bits.unsqueeze(1) & self._powers).ne(0).flatten()[: self.rows]

    def indices(self) -> Tensor:
        """The rows whose bit is set, int64, ascending."""
        return self.mask().nonzero().squeeze(1)

    def __len__(self) -> int:
        """How many bits are set."""
        return int(self.mask().sum())
