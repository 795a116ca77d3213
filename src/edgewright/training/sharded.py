"""Models whose weights are split over the processes of a run (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.training.checkpoint.tree import Part
from edgewright.training.distributed import is_split, whole


def shard_(model: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """Split the weights of `model` in place over all processes: each block for itself, then what is left together.

    A block is gathered when it runs. Needs an initialised process group; every process must come with the same weights.
    Make the optimizer, or let `fit` make it, afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        raise UsageError("weights are split over processes: start the command with torchrun --nproc-per-node N")
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_` was here."""
    return any(is_split(parameter) for parameter in model.parameters())


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Every parameter and buffer by name, put together; every process calls, those with `keep` get them."""
    state = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor)
        if keep:
            state[name] = full.detach().cpu()
    return state


def fill_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Tensor]:
    """Put empty tensors, split as they were, in the places of `Part`s; the tensors by key, to be read."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found: dict[str, Tensor] = {}
    for index, entries in state.get("state", {}).items():
        for name, value in entries.items():
            if isinstance(value, Part):
                entries[name] = found[value.key] = value.empty(parameters[index])
    return found
