"""The rows of a parameter that have targets of their own, wherever they lie: here, or split over devices (FSDP2).

A row-wise rule is local to a shard of whole rows; a rule for the whole tensor needs its statistics added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError

Granularity = Literal["row", "tensor"] | int


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # a DTensor; asked this way, nothing distributed need be imported


def local(tensor: Tensor) -> Tensor:
    """The part that lies here, sharing memory with `tensor`; without gradient."""
    part: Any = tensor.detach()
    return part.to_local() if is_sharded(tensor) else part


def check(parameter: Tensor, name: str) -> None:
    """Raise Unsupported unless whole rows lie together."""
    placements = getattr(parameter, "placements", ())
    if not all(placement.is_replicate() or placement.is_shard(0) for placement in placements):
        raise Unsupported(f"parameter {name} is placed as {placements}; shard it along its first dimension")


def reducer(parameter: Tensor) -> Callable[[Tensor, str], Tensor] | None:
    """All-reduce ("sum" or "max") over the devices among which the parameter is split; None when it is whole here."""
    if not is_sharded(parameter):
        return None
    import torch.distributed as dist

    sharded: Any = parameter
    groups = [sharded.device_mesh.get_group(i) for i, place in enumerate(sharded.placements) if place.is_shard()]
    if not groups:
        return None

    def reduce(tensor: Tensor, how: str) -> Tensor:
        for group in groups:
            dist.all_reduce(tensor, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group=group)
        return tensor

    return reduce


def as_global(part: Tensor, parameter: Tensor, sharded: bool = True) -> Tensor:
    """`part` placed as `parameter` is, or replicated, so that a distributed checkpoint can store it whole."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor, Replicate

    like: Any = parameter
    if not sharded:
        return DTensor.from_local(part, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    shape = torch.Size([parameter.shape[0], *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def matrix_rows(p: Tensor, granularity: Granularity) -> int:
    """Rows with targets of their own in the whole parameter; 1 means one set for all of it."""
    if isinstance(granularity, int):
        return p.numel() // granularity
    return 1 if granularity == "tensor" or p.ndim < 2 else p.shape[0]


def rows_columns(p: Tensor, part: Tensor, granularity: Granularity) -> tuple[int, int]:
    """Shape [R, C] of the matrix whose rows have targets of their own, for the part `part` of `p`.

    Raises UsageError when a block size does not divide the rows.
    """
    if isinstance(granularity, int):
        columns = p.numel() // p.shape[0] if p.ndim > 1 else p.numel()
        if columns % granularity:
            raise UsageError(f"its rows of {columns} weights do not divide into blocks of {granularity}; use a divisor")
        return part.numel() // granularity, granularity
    if matrix_rows(p, granularity) == 1:
        return 1, part.numel()
    return part.shape[0], p.numel() // p.shape[0]


@contextmanager
def holding(tensors: dict[nn.Parameter, Tensor], update: bool) -> Iterator[None]:
    """Inside, every parameter has the values of its tensor; afterwards its own memory again.

    An ordinary parameter only points elsewhere meanwhile, so nothing is copied. A sharded one is copied. With `update`
    the tensors receive what the parameters became, and a sharded parameter keeps the values that it has then.
    """
    own: dict[nn.Parameter, Tensor] = {}
    try:
        for parameter, tensor in tensors.items():
            if is_sharded(parameter):
                own[parameter] = torch.empty(0) if update else local(parameter).clone()
                local(parameter).copy_(tensor)
            else:
                own[parameter] = parameter.data
                parameter.data = tensor
        yield
    finally:
        for parameter, before in own.items():
            if is_sharded(parameter):
                if update:
                    tensors[parameter].copy_(local(parameter))
                else:
                    local(parameter).copy_(before)
            else:
                if update:
                    tensors[parameter] = parameter.data
                parameter.data = before
