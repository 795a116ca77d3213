"""The sketch of APOLLO: which way a weight is contracted, the projection that a seed stands for, moments, factors.

A weight of shape [O, ...] is the matrix [O, I]. One of its two dimensions is contracted, the other has the channels.
Everything here sees the matrix as [contracted C, channels N]; with projection P [r, C] the sketch R = P G is [r, N].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgewright.io.hashing import mixed_seed

TINY = 1e-8  # keeps the two quotients of norms finite (official code)
STACKED = 2**24  # numbers of gradients that one batched product stacks


@dataclass(frozen=True)
class Sketch:
    """Shape of one weight's sketch. `by_row`: channels are the rows of the weight, columns are contracted."""

    rank: int
    contracted: int
    channels: int
    by_row: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.rank, self.channels

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like the weight (or some rows of it) as [contracted, channels]."""
        matrix = tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
        return matrix.t() if self.by_row else matrix

    def spread(self, factor: Tensor, weight: Tensor) -> Tensor:
        """Factors [channels], or one [], in a shape that multiplies `weight`."""
        if factor.ndim == 0:
            return factor
        return factor.view(-1, *(1,) * (weight.ndim - 1)) if self.by_row else factor.view(weight.shape[1:])


def sketch_of(shape: Sequence[int], rank: int, side: str = "smaller") -> Sketch:
    """The smaller dimension is contracted, of a square the columns (as the official code); side "local": the columns.

    The rank is at most the contracted dimension.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    by_row = side == "local" or rows >= columns
    contracted, channels = (columns, rows) if by_row else (rows, columns)
    return Sketch(min(rank, contracted), contracted, channels, by_row)


def projection(seed: int, window: int, sketch: Sketch) -> Tensor:
    """P [r, C] float32 with entries N(0, 1/r), on the CPU: the same bits on every machine with the same torch."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, window))
    return torch.randn(sketch.rank, sketch.contracted, generator=generator).mul_(sketch.rank**-0.5)


def svd_projection(gradient: Tensor, sketch: Sketch) -> Tensor:
    """P [r, C]: the leading left singular vectors of a gradient [C, N], as rows (GaLore's choice)."""
    return torch.linalg.svd(gradient, full_matrices=False).U[:, : sketch.rank].t().contiguous()


def sketches(projections: Sequence[Tensor], gradients: Sequence[Tensor], batched: bool) -> list[Tensor]:
    """P G for pairs of equal shapes, P [r, C] and G [C, N]; `batched`: in few products of stacked matrices."""
    if not batched:
        return [p @ g.to(p.dtype) for p, g in zip(projections, gradients, strict=True)]
    at_once = max(1, STACKED // max(1, gradients[0].numel()))
    found: list[Tensor] = []
    for start in range(0, len(gradients), at_once):
        part = slice(start, start + at_once)
        stacked = torch.stack(list(projections[part]))
        found += torch.bmm(stacked, torch.stack(list(gradients[part])).to(stacked.dtype)).unbind()
    return found


def column_norms(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms [N] of the columns of [C, N], computed in `dtype`.

    torch's own reduction is 5 to 9 times as slow on a CPU where the columns do not lie in one piece.
    """
    if matrix.stride(0) == 1:
        return torch.linalg.vector_norm(matrix, dim=0, dtype=dtype)
    return matrix.to(dtype).square().sum(0).sqrt()


def moment_norms(
    sketch: list[Tensor], average: list[Tensor], square: list[Tensor], betas: tuple[float, float], eps: float
) -> list[tuple[Tensor, Tensor]]:
    """Advance the moments in place; for each sketch the norms [N] of its Adam direction's columns and of its own.

    M = b1 M + (1 - b1) R, V = b2 V + (1 - b2) R R, direction M / (sqrt(V) + eps): steps 3 and 4 of the algorithm,
    without bias correction, which belongs to the learning rate.
    """
    foreach: Any = torch  # the list operations have no stubs
    foreach._foreach_lerp_(average, sketch, 1 - betas[0])
    foreach._foreach_mul_(square, betas[1])
    foreach._foreach_addcmul_(square, sketch, sketch, 1 - betas[1])
    direction = foreach._foreach_sqrt(square)
    foreach._foreach_add_(direction, eps)
    direction = foreach._foreach_div(average, direction)
    return [(column_norms(d, d.dtype), column_norms(r, r.dtype)) for d, r in zip(direction, sketch, strict=True)]


def limited(norm: Tensor, previous: Tensor, growth: float) -> tuple[Tensor, Tensor]:
    """(divisor, norm to remember) of the norm-growth limiter: no update is larger than `growth` x the one before.

    `previous` 0: there was none yet. deviation: a norm of 0 is not remembered; after one all-zero gradient the
    official code lets updates grow again from 1e-8 by 1 % a step.
    """
    divisor = torch.clamp(norm / (previous + TINY), min=growth) / growth
    divisor = torch.where(previous > 0, divisor, torch.ones_like(divisor))
    kept = norm / divisor
    return divisor, torch.where(kept > 0, kept, previous)
