"""Checkpoints of a Distributed Lion run: the parameters once, the momentum of every process, for any number of them.

`folder/sharded/` holds safetensors written through torch.distributed.checkpoint, `folder/lion.json` what they are. The
folder gets its name when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.systems.distributed_lion.distributed import DistributedLion
from edgewright.systems.distributed_lion.exchange import spread
from edgewright.training.distributed import is_split
from edgewright.training.sharded import FOLDER, begin_folder, finish_folder
from edgewright.training.sharded_parts import new_parts, write_parts

FORMAT = 1
MANIFEST = "lion.json"
STRATEGIES = ("exact", "mean", "reset")


def save_replicas(
    folder: str | Path, model: nn.Module, optimizer: DistributedLion, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write parameters, buffers and all momenta into a new `folder`; every process calls.

    model: without its DDP wrapper. extra: JSON values of the caller's (step of the data, settings). Raises UsageError
    for a folder that is there already, CheckFailed when the copies differ, OutputError.
    """
    path = Path(folder)
    _plain(model, optimizer)
    if path.exists():
        raise UsageError(f"{path} is there already: a checkpoint needs a folder of its own, as runs/step-1000")
    optimizer.replica_checksum()
    tensors = {f"model.{name}": tensor.detach() for name, tensor in _tensors(model).items()}
    if optimizer.rank:
        tensors = {}  # the first process's, which are everybody's
    momenta = {
        f"{_owner(optimizer.rank)}{number:05d}": optimizer.momentum(parameter)
        for number, (_, parameter) in enumerate(optimizer.members())
    }
    if optimizer.rank == 0:
        begin_folder(path)
    _barrier(optimizer)
    temporary = path.parent / f".{path.name}.part"
    write_parts(temporary / FOLDER, tensors | momenta)
    if optimizer.rank == 0:
        manifest = {
            "format": FORMAT,
            "world": optimizer.world,
            "step": optimizer.steps,
            "names": optimizer.names(),
            "shapes": [list(parameter.shape) for _, parameter in optimizer.members()],
            "extra": dict(extra or {}),
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        finish_folder(temporary, path)
    _barrier(optimizer)
    return path


def load_replicas(
    folder: str | Path, model: nn.Module, optimizer: DistributedLion, strategy: str = "exact"
) -> dict[str, Any]:
    """Read a checkpoint into `model` and `optimizer`; the `extra` that was saved. Every process calls.

    strategy: "exact" gives each process its own momentum and needs as many processes as wrote it; "mean" gives all the
    mean of the momenta, for another number of processes (our choice: the paper's workers never change); "reset" zeros.
    Raises UsageError where model, optimizer or number of processes do not fit, FormatError for a damaged checkpoint.
    """
    path = Path(folder)
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy={strategy!r} is unknown; use one of {', '.join(STRATEGIES)}")
    _plain(model, optimizer)
    manifest = _manifest(path)
    world, members = manifest["world"], optimizer.members()
    shapes = [list(parameter.shape) for _, parameter in members]
    if shapes != manifest["shapes"]:
        place = next((i for i, (a, b) in enumerate(zip(shapes, manifest["shapes"], strict=False)) if a != b), None)
        what = f"{len(shapes)} parameters" if place is None else f"{optimizer.names()[place]} of shape {shapes[place]}"
        raise UsageError(f"{path} was written by another model: the optimizer here holds {what}, that one did not")
    if strategy == "exact" and world != optimizer.world:
        raise UsageError(
            f"{path} was written by {world} processes and here are {optimizer.world}: strategy='mean' goes on with the "
            "mean of their momenta, strategy='reset' with none"
        )
    live = {f"model.{name}": tensor.detach() for name, tensor in _tensors(model).items()}
    values = new_parts(path / FOLDER, live)
    momenta = [optimizer.momentum(parameter) for _, parameter in members]
    means = [torch.zeros_like(momentum) for momentum in momenta]
    if strategy == "exact":
        means = list(new_parts(path / FOLDER, _named(_owner(optimizer.rank), momenta)).values())
    elif strategy == "mean":
        for rank in range(world):  # one set at a time
            torch._foreach_add_(means, list(new_parts(path / FOLDER, _named(_owner(rank), momenta)).values()))
        torch._foreach_div_(means, world)
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)
        for momentum, mean in zip(momenta, means, strict=True):
            momentum.copy_(mean)
    for group in optimizer.param_groups:
        group["step"] = manifest["step"]
    extra: dict[str, Any] = manifest["extra"]
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
    """Parameters (tied ones once) and persistent buffers."""
    kept = model.state_dict(keep_vars=True).keys()
    return {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in kept}}


def _owner(rank: int) -> str:
    return f"momentum.{rank:05d}."


def _named(owner: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{owner}{number:05d}": tensor for number, tensor in enumerate(tensors)}


def _plain(model: nn.Module, optimizer: DistributedLion) -> None:
    started = dist.get_world_size() if dist.is_initialized() else 1
    if started != optimizer.world:
        raise UsageError(f"the optimizer votes among {optimizer.world} of {started} processes: checkpoints are of all")
    if any(is_split(parameter) for parameter in model.parameters()):
        raise UsageError(
            "these weights are split over processes (HSDP), each of which has momentum of its own for its part: save "
            "model and optimizer of every process through torch.distributed.checkpoint"
        )


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise FormatError(f"{path} has format {manifest['format']!r}; this version reads {FORMAT}")
        world, step, shapes = manifest["world"], manifest["step"], manifest["shapes"]
        if not (isinstance(world, int) and 1 <= world <= 2**20 and isinstance(step, int) and isinstance(shapes, list)):
            raise FormatError(f"{path / MANIFEST} is damaged: world {world!r}, step {step!r}")
        manifest["extra"].keys()
    except OSError as error:
        raise UsageError(f"{path} is no checkpoint of a Distributed Lion run: {error.strerror} ({MANIFEST})") from error
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path / MANIFEST} is damaged ({error!r}): remove that checkpoint") from error
    return manifest  # type: ignore[no-any-return]


def _barrier(optimizer: DistributedLion) -> None:
    """Wait for all, for no longer than the optimizer's timeout."""
    if optimizer.exchange is not None:
        spread(optimizer.exchange, [0], next(p for _, p in optimizer.members()).device)
