"""Checkpoints of a Distributed Lion run: the parameters once, the momentum of every process, for any number of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgewright.checks import check, one_of
from edgewright.errors import FormatError, UsageError
from edgewright.systems.distributed_lion.distributed import DistributedLion
from edgewright.training.checkpoint.files import open_files
from edgewright.training.checkpoint.ranks import Ranks
from edgewright.training.checkpoint.whole import SavedState, capture_state, save_state
from edgewright.training.distributed import is_split
from edgewright.training.snapshot import model_tensors

STRATEGIES = ("exact", "mean", "reset")


def save_replicas(
    root: str | Path, model: nn.Module, optimizer: DistributedLion, extra: Mapping[str, Any] | None = None
) -> str:
    """Write parameters, buffers and all momenta as a new checkpoint of `root`; every process calls.

    Args:
        root: a folder or fsspec URL of checkpoints; the one before is deleted when the new one exists.
        model: without its DDP wrapper.
        optimizer: of all processes.
        extra: values of the caller's (position of the data, settings): a tree of JSON values and tensors.

    Returns:
        The name of the checkpoint in `root`.

    Raises:
        UsageError: weights that are split, or an optimizer that votes among some processes only.
        CheckFailed: the copies of the parameters differ.
        OutputError: the disk refused; the checkpoint before is intact.
    """
    _plain(model, optimizer)
    optimizer.replica_checksum()
    state = {
        "world": optimizer.world,
        "step": optimizer.steps,
        "names": optimizer.names(),
        "shapes": [list(parameter.shape) for _, parameter in optimizer.members()],
        "extra": dict(extra or {}),
    }
    momenta = [optimizer.momentum(parameter) for _, parameter in optimizer.members()]
    with Ranks() as ranks:
        captured = capture_state(optimizer.steps, _tensors(model), state, momenta, ranks, copy=False)
        return save_state(open_files(root), ranks, captured).id


def load_replicas(
    root: str | Path, model: nn.Module, optimizer: DistributedLion, strategy: str = "exact"
) -> dict[str, Any]:
    """Read the newest checkpoint of `root` into `model` and `optimizer`. Every process calls.

    Args:
        root: a folder or fsspec URL of checkpoints.
        model: without its DDP wrapper.
        optimizer: of all processes.
        strategy: "exact" gives each process its own momentum and needs as many processes as wrote it; "mean" gives all
            the mean of the momenta, for another number of processes (our choice: the paper's workers never change);
            "reset" zeros.

    Returns:
        The `extra` that was saved.

    Raises:
        UsageError: there is no checkpoint, or model, optimizer or number of processes do not fit.
        FormatError: it is damaged; nothing has been changed then.
    """
    check("strategy", strategy, one_of(*STRATEGIES))
    _plain(model, optimizer)
    saved = SavedState(open_files(root))
    state = _checked(saved)
    world, members = state["world"], optimizer.members()
    shapes = [list(parameter.shape) for _, parameter in members]
    if shapes != state["shapes"]:
        place = next((i for i, (a, b) in enumerate(zip(shapes, state["shapes"], strict=False)) if a != b), None)
        what = f"{len(shapes)} parameters" if place is None else f"{optimizer.names()[place]} of shape {shapes[place]}"
        raise UsageError(f"{root} was written by another model: the optimizer here holds {what}, that one did not")
    if strategy == "exact" and world != optimizer.world:
        raise UsageError(
            f"{root} was written by {world} processes and here are {optimizer.world}: strategy='mean' goes on with the "
            "mean of their momenta, strategy='reset' with none"
        )
    live = _tensors(model)
    values = saved.new(live)
    momenta = [optimizer.momentum(parameter) for _, parameter in members]
    means = [torch.zeros_like(momentum) for momentum in momenta]
    if strategy == "exact":
        means = _momenta(saved, optimizer.rank, momenta)
    elif strategy == "mean":
        for rank in range(world):  # one set at a time
            torch._foreach_add_(means, _momenta(saved, rank, momenta))
        torch._foreach_div_(means, world)
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)
        for momentum, mean in zip(momenta, means, strict=True):
            momentum.copy_(mean)
    for group in optimizer.param_groups:
        group["step"] = state["step"]
    extra: dict[str, Any] = state["extra"]
    return extra


def consolidated_state(optimizer: DistributedLion) -> dict[str, Any]:
    """A state dict for plain `Lion` on one process: the mean momentum. Every process calls and gets it."""
    states = {}
    for number, (_, parameter) in enumerate(optimizer.members()):
        mean = optimizer.momentum(parameter).float().clone()
        if optimizer.exchange is not None:
            optimizer.exchange.all_reduce(mean, dist.ReduceOp.SUM).div_(optimizer.world)
        states[number] = {"exp_avg": mean.to(parameter.dtype)}
    groups, first = [], 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        kept = {name: group[name] for name in ("lr", "betas", "weight_decay")}
        groups.append({**kept, "foreach": None, "params": list(range(first, first + count))})
        first += count
    return {"state": states, "param_groups": groups}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers, by their names in a checkpoint."""
    return {f"model.{name}": tensor.detach() for name, tensor in model_tensors(model).items()}


def _momenta(saved: SavedState, rank: int, like: list[Tensor]) -> list[Tensor]:
    """The momenta of one process. Raises FormatError where they are not such as `like`."""
    found = saved.own(rank)
    if not isinstance(found, list) or len(found) != len(like):
        raise FormatError(f"{saved.manifest.id} is damaged: process {rank} has other momenta than the model")
    for value, momentum in zip(found, like, strict=True):
        if not isinstance(value, Tensor) or value.shape != momentum.shape or value.dtype != momentum.dtype:
            raise FormatError(f"{saved.manifest.id} is damaged: a momentum of process {rank} does not fit the model")
    return [value.to(momentum.device) for value, momentum in zip(found, like, strict=True)]


def _plain(model: nn.Module, optimizer: DistributedLion) -> None:
    started = dist.get_world_size() if dist.is_initialized() else 1
    if started != optimizer.world:
        raise UsageError(f"the optimizer votes among {optimizer.world} of {started} processes: checkpoints are of all")
    if any(is_split(parameter) for parameter in model.parameters()):
        raise UsageError(
            "these weights are split over processes (HSDP), each of which has momentum of its own for its part: save "
            "model and optimizer of every process through torch.distributed.checkpoint"
        )


def _checked(saved: SavedState) -> dict[str, Any]:
    """The state that `save_replicas` wrote. Raises FormatError."""
    state = saved.state()
    kinds = {"world": int, "step": int, "names": list, "shapes": list, "extra": dict}
    if not isinstance(state, dict) or any(type(state.get(name)) is not kind for name, kind in kinds.items()):
        raise FormatError(f"{saved.manifest.id} is no checkpoint of a Distributed Lion run, or is damaged")
    if state["world"] != saved.manifest.world:
        raise FormatError(f"{saved.manifest.id} is damaged: {state['world']} processes, and {saved.manifest.world}")
    return state
