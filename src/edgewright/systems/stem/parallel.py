"""Tables shared out between processes: each holds some of the columns of every row.

Every process of a group gathers the distinct tokens of all, looks its columns up, and an exchange gives each process
its own rows whole; gradients go the same way back. The layout is torchtitan's: a DeviceMesh with dimensions "dp" and
"stem", tables as DTensors sharded over "stem", everything else the same everywhere.

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "stem"))
    shard_tables(model, mesh)
    ...; loss.backward(); sync_gradients(model, mesh); optimizer.step()

deviation: tokens are made distinct before they are gathered, and the division by the number of processes, which the
official code does in the exchange, is done once, in `sync_gradients`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from edgewright.errors import UsageError
from edgewright.systems.stem.layer import stem_blocks
from edgewright.training.distributed import is_split, local, split, sync_gradients


class ShardedLookup:
    """[B, T] tokens of this process -> [B, T, f], from columns that lie in all processes of the group."""

    def __init__(self, table: nn.Module, mesh: DeviceMesh) -> None:
        self.table = table
        self.group = mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()

    def __call__(self, input_ids: Tensor) -> Tensor:
        ids, places = torch.unique(input_ids, return_inverse=True)
        counts = [torch.zeros(1, dtype=torch.int64, device=ids.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(ids)], device=ids.device), group=self.group)
        numbers = [int(count) for count in counts]
        padded = F.pad(ids, (0, max(numbers) - len(ids)))
        gathered = [torch.empty_like(padded) for _ in numbers]
        dist.all_gather(gathered, padded, group=self.group)
        everyone = torch.cat([part[:number] for part, number in zip(gathered, numbers, strict=True)])
        columns = F.embedding(everyone, local(self.table.weight, gradient=True))  # [sum of numbers, f / size]
        rows = _Exchange.apply(columns, numbers, self.rank, self.group)
        return F.embedding(places, rows)


class _Exchange(torch.autograd.Function):
    """[sum of numbers, f / size] -> [numbers[rank], f]; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, numbers: list[int], rank: int, group: Any) -> Tensor:
        ctx.numbers, ctx.rank, ctx.group = numbers, rank, group
        mine = numbers[rank]
        received = columns.new_empty(mine * len(numbers), columns.shape[1])
        dist.all_to_all_single(received, columns.contiguous(), [mine] * len(numbers), numbers, group=group)
        return received.view(len(numbers), mine, -1).transpose(0, 1).reshape(mine, -1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mine, size = ctx.numbers[ctx.rank], len(ctx.numbers)
        sent = upstream.reshape(mine, size, -1).transpose(0, 1).reshape(mine * size, -1).contiguous()
        gradient = upstream.new_empty(sum(ctx.numbers), sent.shape[1])
        dist.all_to_all_single(gradient, sent, ctx.numbers, [mine] * size, group=ctx.group)
        return gradient, None, None, None


def shard_tables(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leave this process its columns of every table, in place; returns the model.

    The first process of each group gives its tables to the others. Raises UsageError for a mesh without the dimensions
    dp and stem, for rows that do not divide among the processes, and for tables that are quantised or elsewhere.
    """
    if mesh.mesh_dim_names is None or not {"dp", "stem"} <= set(mesh.mesh_dim_names):
        raise UsageError(
            f"the mesh has dimensions {mesh.mesh_dim_names}; sharded tables need ('dp', 'stem'), for example "
            "init_device_mesh('cpu', (1, 2), mesh_dim_names=('dp', 'stem'))"
        )
    group, layers = mesh["stem"], stem_blocks(model)
    for block, layer in layers.items():
        if layer.intermediate % group.size():
            raise UsageError(
                f"layer {block}: rows of {layer.intermediate} values do not divide among {group.size()} processes "
                "of stem"
            )
        if type(layer.table) is not nn.Embedding or layer.lookup is not None:
            raise UsageError(
                f"the table of layer {block} is quantised, offloaded or sharded already; shard a plain one"
            )
        if layer.table.sparse:
            raise UsageError("sparse_grad=True and sharded tables exclude each other")
    for layer in layers.values():
        table: Any = layer.table
        shard = split(table.weight, group, 1)
        table.weight = nn.Parameter(shard, requires_grad=table.weight.requires_grad)
        layer.lookup = ShardedLookup(table, group)
    return model


def sharded_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters for an optimizer, tables apart: torch's fused updates do not mix DTensors with plain ones."""
    sharded = [p for p in model.parameters() if is_split(p)]
    plain = [p for p in model.parameters() if not is_split(p)]
    return [{"params": plain}, {"params": sharded}]


__all__ = ["ShardedLookup", "shard_tables", "sharded_groups", "sync_gradients"]
