"""What training with tensors that are split over processes shares: gradients, local parts, placements."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


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
        if isinstance(parameter, DTensor):
            local = parameter.grad.to_local()  # type: ignore[attr-defined]
            dist.all_reduce(local, group=mesh["dp"].get_group())
            local /= processes
        else:
            dist.all_reduce(parameter.grad)
            parameter.grad /= processes
