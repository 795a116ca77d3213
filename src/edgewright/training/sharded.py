"""Models whose weights are split over the processes of a run (FSDP2): splitting, and checkpoints that every process
writes its part of.

`sharded_parts` writes and reads the files of parts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, OutputError, UsageError
from edgewright.training.distributed import cuts, is_split, whole, zeros_like_split

FOLDER = "sharded"


@dataclass(frozen=True)
class Part:
    """Stands in a saved state for a tensor that lies in the folder of parts, under `key`.

    shape and dtype of the whole; cuts: for each dimension of the mesh the tensor's dimension that it splits, or None.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    cuts: tuple[int | None, ...]

    @classmethod
    def of(cls, key: str, tensor: Any) -> Part:
        """The stand-in of a split tensor."""
        return cls(key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), cuts(tensor))

    def empty(self, parameter: Tensor) -> Tensor:
        """Zeros for the tensor, on the mesh of the parameter whose state it is; whole where the parameter is whole."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise FormatError(f"the state {self.key!r} is of an unknown type {self.dtype[:20]!r}")
        if not is_split(parameter):
            return torch.zeros(self.shape, dtype=dtype, device=parameter.device)
        mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
        if len(self.cuts) != mesh.ndim:
            raise UsageError(
                f"the state {self.key!r} was split over a mesh of {len(self.cuts)} dimensions, and the model is over "
                f"one of {mesh.ndim}; resume on a mesh of as many dimensions"
            )
        return zeros_like_split(self.shape, dtype, parameter, self.cuts)


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


def begin_folder(path: Path) -> Path:
    """A fresh temporary folder beside `path`, under a name that all processes know."""
    temporary = path.parent / f".{path.name}.part"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write into {path.parent}: {error.strerror}") from error
    return temporary


def finish_folder(temporary: Path, path: Path) -> None:
    """Give the complete folder its name."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
