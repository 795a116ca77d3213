"""The sets of representable numbers, each with its encoder and its gradient rule.

Every grid has the one form `value = scale * (code + offset)`. Training works on the clip scale alpha of the papers; a
grid says how many scales lie in one alpha (`scales_per_alpha`), so `scale = alpha / scales_per_alpha`.

Source: ParetoQ, arXiv 2502.02631 (stretched elastic quantisation at 1.58 and 2 bits, LSQ at 3 and 4, elastic
binarisation at 1 bit); LSQ, arXiv 1902.08153.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgewright.checks import check, one_of
from edgewright.errors import UsageError
from edgewright.io.packed import CODE_RANGES

# Fraction of the stretched range that is kept: at 1.0, rounding would produce one level too many (ParetoQ, section 3).
STRETCHED_CLIP = 0.99


@dataclass(frozen=True)
class Grid:
    """A set of representable numbers. `u` below is a weight in units of its scale: u = weight / scale.

    Args:
        name: in the table of `io.packed`.
        bits: nominal width, log2 of the number of levels.
        kind: "binary" (the sign), "stretched" (levels balanced around zero, clip at 0.99 of the range) or "integer"
            (LSQ, arXiv 1902.08153).
        scales_per_alpha: how many scales one clip scale alpha holds.
    """

    name: str
    bits: float
    kind: str
    scales_per_alpha: float

    @property
    def low(self) -> int:
        return CODE_RANGES[self.name][0]

    @property
    def high(self) -> int:
        return CODE_RANGES[self.name][1]

    @property
    def offset(self) -> float:
        return CODE_RANGES[self.name][2]

    @property
    def levels(self) -> Tensor:
        """All representable values at scale 1, ascending, float32."""
        codes = (-1, 1) if self.kind == "binary" else range(self.low, self.high + 1)
        return torch.tensor([code + self.offset for code in codes])

    @property
    def positive_limit(self) -> int:
        """Qp of the LSQ gradient factor g = 1 / sqrt(numel * Qp)."""
        return self.high if self.kind == "integer" else 1

    def clip_range(self) -> tuple[float, float]:
        """Interval of u in which the weight receives its gradient, both ends included."""
        if self.kind == "integer":
            return float(self.low), float(self.high)
        if self.kind == "stretched":
            return -STRETCHED_CLIP * self.scales_per_alpha, STRETCHED_CLIP * self.scales_per_alpha
        return -1.0, 1.0

    def encode_(self, u: Tensor) -> Tensor:
        """Replace u by its integer code, in place and still floating point; ties round half to even, sign(0) is +1.

        Args:
            u: float, any shape.

        Returns:
            `u`.
        """
        if self.kind == "binary":
            # deviation: torch.sign(0) = 0 would leave the two-valued grid, so zero counts as +1.
            return u.ge_(0).mul_(2).sub_(1)
        if self.kind == "stretched":
            low, high = self.clip_range()
            u.clamp_(low, high)
            return (u.sub_(self.offset) if self.offset else u).round_()
        return u.round_().clamp_(self.low, self.high)

    def straight_through(self, u: Tensor, official_ternary: bool = False) -> tuple[Tensor, Tensor]:
        """The two gradients of a quantised weight; `u` is left unchanged.

        Rounding counts as the identity. Inside the clip range phi = (code + offset - u) per scale, outside it is the
        outermost level; the sign is all there is to a binary grid.

        Args:
            u: float, any shape.
            official_ternary: +-1 outside of the clip range of the ternary grid, as the official code has it.

        Returns:
            (phi, mask), shaped as `u`: d value / d alpha, and d value / d weight (0.0 or 1.0).
        """
        low, high = self.clip_range()
        clipped = u.clamp(low, high)
        mask = torch.eq(clipped, u, out=torch.empty_like(u))
        if self.kind == "binary":
            return self.encode_(u.clone()), mask
        if self.offset:
            clipped.sub_(self.offset)
        level = clipped.round_()  # the code: integer bounds make round(clip(u)) = clip(round(u))
        if self.offset:
            level.add_(self.offset)
        if self.name == "ternary" and official_ternary:
            # The official code uses +-1 outside although the value there is +-2/3 alpha.
            level = torch.where(mask > 0, level, level * self.scales_per_alpha)
        phi = level.addcmul_(u, mask, value=-1.0)
        return (phi if self.scales_per_alpha == 1 else phi.div_(self.scales_per_alpha)), mask


GRIDS: dict[str, Grid] = {
    "binary": Grid("binary", 1.0, "binary", 1.0),
    "ternary": Grid("ternary", 1.58, "stretched", 1.5),
    "seq2": Grid("seq2", 2.0, "stretched", 2.0),
    "int2": Grid("int2", 2.0, "integer", 1.0),
    "int3": Grid("int3", 3.0, "integer", 1.0),
    "int4": Grid("int4", 4.0, "integer", 1.0),
    "int8": Grid("int8", 8.0, "integer", 1.0),
}

# The grid that ParetoQ found best at each width.
GRID_OF_BITS: dict[float, str] = {1: "binary", 1.58: "ternary", 2: "seq2", 3: "int3", 4: "int4", 8: "int8"}


def grid_named(name: str) -> Grid:
    """The grid of that name.

    Args:
        name: one of `GRIDS`.

    Returns:
        Its codes, levels and limits.

    Raises:
        UsageError: an unknown name.
    """
    check("grid", name, one_of(*GRIDS))
    return GRIDS[name]


def grid_for_bits(bits: float) -> Grid:
    """The grid that ParetoQ (arXiv 2502.02631) found best at a width.

    Args:
        bits: 1, 1.58, 2, 3, 4 or 8.

    Returns:
        Its codes, levels and limits.

    Raises:
        UsageError: another width.
    """
    for width, name in GRID_OF_BITS.items():
        if abs(width - bits) < 1e-6:
            return GRIDS[name]
    widths = ", ".join(f"{width:g}" for width in GRID_OF_BITS)
    raise UsageError(f"bits={bits:g} is not supported; choose one of {widths}")
