"""Expert parallelism: each process of a group keeps a share of the experts; tokens travel to them and back.

The layout is torchtitan's: a DeviceMesh with dimensions "dp" and "ep". Every process has its own batch. Experts are
DTensors sharded over "ep" and the same over "dp"; everything else is the same everywhere. Checkpoints written with
torch.distributed.checkpoint hold whole [E, ...] tensors, so that another number of processes can go on.

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    parallelize_experts(model, mesh)
    ...; loss.backward(); sync_gradients(model, mesh); optimizer.step(); balancer.step()
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from edgewright.errors import UsageError
from edgewright.systems.mobilemoe import backends
from edgewright.systems.mobilemoe.layer import Experts, Routing, moe_layers
from edgewright.training.distributed import is_split, split


class ExpertParallel:
    """Stands in for the experts of one layer: rows to the processes that own their experts, results back."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        self.experts = experts
        self.group = mesh.get_group()
        self.size = mesh.size()

    def __call__(self, u: Tensor, routing: Routing, capacity: int | None = None) -> Tensor:
        """As `Experts.forward`; a capacity counts the tokens of this process. u: [N, d] -> [N, d]."""
        weights = self.experts.weights
        total, k = self.experts.config.num_experts, routing.indices.shape[1]
        u = backends.quantized_input(weights.gate_up, u)
        sent = backends.keep_first(backends.counting_sort(routing.indices.reshape(-1), total), capacity)
        theirs = torch.empty_like(sent.counts)  # [processes * local experts], what each sends to each expert of ours
        dist.all_to_all_single(theirs, sent.counts, group=self.group)
        outgoing = sent.counts.view(self.size, -1).sum(1).tolist()
        incoming = theirs.view(self.size, -1).sum(1).tolist()
        rows = _AllToAll.apply(u.index_select(0, sent.order // k), outgoing, incoming, self.group)

        local = total // self.size
        owner = torch.arange(local, device=u.device).repeat(self.size).repeat_interleave(theirs)
        ours = backends.counting_sort(owner, local)
        name = "grouped_mm" if self.experts.config.backend == "grouped_mm" or u.is_cuda else "sorted"
        results = backends.on_rows(name, rows.index_select(0, ours.order), ours.counts, weights)
        results = torch.zeros_like(results).index_copy(0, ours.order, results)
        back = _AllToAll.apply(results, incoming, outgoing, self.group)
        return backends.combine(back, sent.order, routing.weights, u)


class _AllToAll(torch.autograd.Function):
    """rows [sum(send), d] -> [sum(receive), d]; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _exchange(upstream, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


def parallelize_experts(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leave this process its share of the experts of every layer, in place; returns the model.

    The first process of each group gives its experts to the others. Raises UsageError for a mesh without the
    dimensions dp and ep, for experts that do not divide among the processes, and for quantised ones.
    """
    if mesh.mesh_dim_names is None or not {"dp", "ep"} <= set(mesh.mesh_dim_names):
        raise UsageError(
            f"the mesh has dimensions {mesh.mesh_dim_names}; expert parallelism needs ('dp', 'ep'), for example "
            "init_device_mesh('cpu', (1, 2), mesh_dim_names=('dp', 'ep'))"
        )
    group = mesh["ep"]
    layers = moe_layers(model)
    for name, layer in layers.items():
        if layer.config.num_experts % group.size():
            raise UsageError(
                f"{name}: num_experts={layer.config.num_experts} does not divide among {group.size()} processes of ep"
            )
        for stack in Experts.weight_stacks:
            if not isinstance(getattr(layer.experts, stack), nn.Parameter):
                raise UsageError(f"{name}.experts.{stack} is quantised; parallelise first, then call quantize_")
            if is_split(getattr(layer.experts, stack)):
                raise UsageError(f"{name}.experts.{stack} is distributed already")
    for layer in layers.values():
        for stack in Experts.weight_stacks:
            weight = getattr(layer.experts, stack)
            shard = split(weight, group, 0)
            setattr(layer.experts, stack, nn.Parameter(shard, requires_grad=weight.requires_grad))
        layer.expert_parallel = ExpertParallel(layer.experts, group)
    return model


@torch.no_grad()
def parallel_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups that do not mix distributed and plain parameters, which torch's multi-tensor steps refuse."""
    trained = [p for p in model.parameters() if p.requires_grad]
    halves = ([p for p in trained if is_split(p)], [p for p in trained if not is_split(p)])
    return [{"params": half} for half in halves if half]
