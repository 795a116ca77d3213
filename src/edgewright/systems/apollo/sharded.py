"""Weights split over processes along their rows (FSDP2): what each process holds, and the sums that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from edgewright.errors import Unsupported
from edgewright.training.sharded import is_split

BUCKET = 2**24  # numbers that one all-reduce carries


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a weight lie here; `group` is the process group that holds the others, or None."""

    start: int
    stop: int
    group: Any = None


def local(tensor: Tensor) -> Tensor:
    """The part that lies here, sharing memory with `tensor`; without gradient."""
    part: Any = tensor.detach()
    return part.to_local() if is_split(part) else part


def rows_here(parameter: Tensor, name: str) -> Rows:
    """Raises Unsupported unless the weight is whole here or split along its first dimension, once."""
    if not is_split(parameter):
        return Rows(0, len(parameter))
    split: Any = parameter
    mesh, places = split.device_mesh, split.placements
    cut = [i for i, place in enumerate(places) if not place.is_replicate()]
    if len(cut) > 1 or any(not places[i].is_shard(0) for i in cut):
        raise Unsupported(f"parameter {name} is placed as {places}; APOLLO needs it split along its first dimension")
    if not cut:
        return Rows(0, len(parameter))
    each = -(-len(parameter) // mesh.size(cut[0]))
    start = min(mesh.get_local_rank(cut[0]) * each, len(parameter))
    return Rows(start, min(start + each, len(parameter)), mesh.get_group(cut[0]))


def columns_like(part: Tensor, parameter: Tensor, columns: int) -> Tensor:
    """`part` [r, rows here] as a tensor [r, columns] split as the rows of `parameter` are."""
    like: Any = parameter
    places = [Shard(1) if place.is_shard() else place for place in like.placements]
    shape = torch.Size((part.shape[0], columns))
    return DTensor.from_local(part, like.device_mesh, places, run_check=False, shape=shape, stride=(columns, 1))


def add_up(tensors: Sequence[Tensor], groups: Sequence[Any]) -> None:
    """Sum each tensor over the processes of its group, in place; tensors travel together. None: nothing to sum."""
    waiting: dict[tuple[Any, torch.dtype], list[Tensor]] = {}

    def send(key: tuple[Any, torch.dtype]) -> None:
        parts = waiting.pop(key)
        packed = torch.cat([part.flatten() for part in parts])
        torch.distributed.all_reduce(packed, group=key[0])
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
    split: list[Any] = [p for p in parameters if is_split(p)]
    meshes = dict.fromkeys(p.device_mesh for p in split)
    for group in dict.fromkeys(mesh.get_group(i) for mesh in meshes for i in range(mesh.ndim)):
        flag = torch.tensor(float(good), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
        good = bool(flag > 0)
    return good
