"""The rows of a parameter that have targets of their own, wherever they lie: here, or split over devices (FSDP2).

A row-wise rule is local to a shard of whole rows; a rule for the whole tensor needs its statistics added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from edgewright.checks import Allowed
from edgewright.errors import UsageError
from edgewright.training.distributed import is_split, local

Granularity = Literal["row", "tensor"] | int
GRANULARITY = Allowed(
    "'row', 'tensor' or a number of weights from 1 up, such as 32",
    lambda value: value in ("row", "tensor") or (isinstance(value, int) and value >= 1),
)


def matrix_rows(p: Tensor, granularity: Granularity) -> int:
    """Rows with targets of their own in the whole parameter; 1 means one set for all of it.

    Args:
        p: split over devices or not.
        granularity: one row per "row", for the "tensor", or per that many weights.
    """
    if isinstance(granularity, int):
        return p.numel() // granularity
    return 1 if granularity == "tensor" or p.ndim < 2 else p.shape[0]


def rows_columns(p: Tensor, part: Tensor, granularity: Granularity, name: str = "") -> tuple[int, int]:
    """Shape [R, C] of the matrix whose rows have targets of their own.

    Args:
        p: the whole parameter.
        part: what lies here of it.
        granularity: one row per "row", for the "tensor", or per that many weights.
        name: such as "layer head: ", for the error.

    Raises:
        UsageError: a block size that does not divide the rows.
    """
    if isinstance(granularity, int):
        columns = p.numel() // p.shape[0] if p.ndim > 1 else p.numel()
        if columns % granularity:
            raise UsageError(
                f"{name}its rows of {columns} weights do not divide into blocks of {granularity}; use a divisor"
            )
        return part.numel() // granularity, granularity
    if matrix_rows(p, granularity) == 1:
        return 1, part.numel()
    return part.shape[0], p.numel() // p.shape[0]


@contextmanager
def holding(tensors: dict[nn.Parameter, Tensor], update: bool) -> Iterator[None]:
    """Inside, every parameter has the values of its tensor; afterwards its own memory again.

    An ordinary parameter only points elsewhere meanwhile, so nothing is copied. A sharded one is copied.

    Args:
        tensors: parameter -> values of the part of it that lies here.
        update: the tensors receive what the parameters became, and a sharded parameter keeps the values that it has
            then.
    """
    own: dict[nn.Parameter, Tensor] = {}
    try:
        for parameter, tensor in tensors.items():
            if is_split(parameter):
                own[parameter] = torch.empty(0) if update else local(parameter).clone()
                local(parameter).copy_(tensor)
            else:
                own[parameter] = parameter.data
                parameter.data = tensor
        yield
    finally:
        for parameter, before in own.items():
            if is_split(parameter):
                if update:
                    tensors[parameter].copy_(local(parameter))
                else:
                    local(parameter).copy_(before)
            else:
                if update:
                    tensors[parameter] = parameter.data
                parameter.data = before
