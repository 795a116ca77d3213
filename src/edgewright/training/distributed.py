"""What training with tensors that are split over processes (DTensors) shares: parts, placements, sums, gradients.

The one module that knows torch.distributed.tensor. That takes a second to import, so it is imported where a DTensor is
made; one that is there is told from a plain tensor by its mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from edgewright.errors import Unsupported

BUCKET = 2**24  # numbers that one all-reduce of `add_up` carries


def is_split(tensor: Any) -> bool:
    """Whether this process holds a part of the tensor alone."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any, *, gradient: bool = False) -> Tensor:
    """The part that lies here, sharing memory with `tensor`; without gradient unless that is asked for."""
    part: Tensor = tensor.to_local() if is_split(tensor) else tensor
    return part if gradient else part.detach()


def whole(tensor: Any) -> Tensor:
    """The tensor put together; every process that holds a part calls."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def local_box(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, first indices) of the part of a split tensor that lies here."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def cuts(tensor: Any) -> tuple[int | None, ...]:
    """For each dimension of a split tensor's mesh the tensor's dimension that it splits, or None."""
    return tuple(place.dim if place.is_shard() else None for place in tensor.placements)


def check_rows(parameter: Any, name: str) -> None:
    """Raise Unsupported unless whole rows lie together."""
    if any(not place.is_replicate() and not place.is_shard(0) for place in getattr(parameter, "placements", ())):
        raise Unsupported(f"parameter {name} is placed as {parameter.placements}; shard it along its first dimension")


@dataclass(frozen=True)
class RowRange:
    """Rows `start` to `stop` of a weight lie here; `group` is the process group that holds the others, or None."""

    start: int
    stop: int
    group: Any = None


def row_range(parameter: Any, name: str) -> RowRange:
    """Raises Unsupported unless the weight is whole here or split along its first dimension, once."""
    if not is_split(parameter):
        return RowRange(0, len(parameter))
    check_rows(parameter, name)
    places = [i for i, cut in enumerate(cuts(parameter)) if cut is not None]
    if len(places) > 1:
        raise Unsupported(f"parameter {name} is placed as {parameter.placements}; split its rows once")
    if not places:
        return RowRange(0, len(parameter))
    mesh, place = parameter.device_mesh, places[0]
    each = -(-len(parameter) // mesh.size(place))
    start = min(mesh.get_local_rank(place) * each, len(parameter))
    return RowRange(start, min(start + each, len(parameter)), mesh.get_group(place))


def split(tensor: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """The tensor of the mesh's first process, split along `dim`."""
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor.detach(), mesh, [Shard(dim)])


def join_rows(part: Tensor, mesh: DeviceMesh, rows: int) -> Tensor:
    """`part` as this process's share, in the order of the mesh, of a tensor with so many rows."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size([rows, *part.shape[1:]])
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=part.stride())


def part_like(part: Tensor, parameter: Any, dim: int | None = 0) -> Tensor:
    """`part` as this process's share of a tensor whose dimension `dim` is split as the rows of `parameter` are.

    dim None: it is the same everywhere. A distributed checkpoint then stores the whole of it. `part` itself where the
    parameter is not split.
    """
    if not is_split(parameter):
        return part
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = parameter.device_mesh
    if dim is None:
        return DTensor.from_local(part, mesh, [Replicate()] * mesh.ndim, run_check=False)
    shape = torch.Size([*part.shape[:dim], parameter.shape[0], *part.shape[dim + 1 :]])
    places = [Shard(dim) if place.is_shard() else place for place in parameter.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, places, run_check=False, shape=shape, stride=stride)


def zeros_like_split(shape: Sequence[int], dtype: torch.dtype, parameter: Any, cut: Sequence[int | None]) -> Tensor:
    """Zeros on the mesh of `parameter`, split as `cuts` says."""
    from torch.distributed.tensor import Replicate, Shard, zeros

    places = [Replicate() if dim is None else Shard(dim) for dim in cut]
    return zeros(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=places)


def reducer(parameter: Any) -> Callable[[Tensor, str], Tensor] | None:
    """All-reduce ("sum" or "max") over the processes among which the parameter is split; None when it is whole here."""
    if not is_split(parameter):
        return None
    groups = [parameter.device_mesh.get_group(i) for i, cut in enumerate(cuts(parameter)) if cut is not None]
    if not groups:
        return None

    def reduce(tensor: Tensor, how: str) -> Tensor:
        for group in groups:
            dist.all_reduce(tensor, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group=group)
        return tensor

    return reduce


def add_up(tensors: Sequence[Tensor], groups: Sequence[Any]) -> None:
    """Sum each tensor over the processes of its group, in place; tensors travel together. None: nothing to sum."""
    waiting: dict[tuple[Any, torch.dtype], list[Tensor]] = {}

    def send(key: tuple[Any, torch.dtype]) -> None:
        parts = waiting.pop(key)
        packed = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(packed, group=key[0])
        for part, total in zip(parts, packed.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view(part.shape))

    for tensor, group in zip(tensors, groups, strict=True):
        if group is not None:
            key = (group, tensor.dtype)
            waiting.setdefault(key, []).append(tensor)
            if sum(part.numel() for part in waiting[key]) >= BUCKET:
                send(key)
    for key in list(waiting):
        send(key)


def all_agree(good: bool, parameters: Sequence[Tensor], device: torch.device) -> bool:
    """Whether every process that holds a part of these parameters says so."""
    meshes = dict.fromkeys(p.device_mesh for p in parameters if is_split(p))  # type: ignore[attr-defined]
    for group in dict.fromkeys(mesh.get_group(i) for mesh in meshes for i in range(mesh.ndim)):
        flag = torch.tensor(float(good), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
        good = bool(flag > 0)
    return good


def sync_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make every gradient that of the mean loss over all processes.

    An expert's gradient has gathered the tokens of its whole "ep" group already; what is left is its sum over "dp".
    """
    processes = mesh.size()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # no token here came by: the others still wait for this process
            parameter.grad = torch.zeros_like(parameter)
        gradient = local(parameter.grad)
        dist.all_reduce(gradient, group=mesh["dp"].get_group() if is_split(parameter) else None)
        gradient /= processes
