"""Where a run happens: accelerate's view of processes and devices, and the model on its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgewright.errors import Unsupported, UsageError
from edgewright.training.sharded import is_sharded


def process_accelerator() -> Any:
    """The Accelerator of this process.

    Its mixed precision stays off (or as the caller's own script set it): accelerate fixes that once for a process,
    while the loop's own autocast lets two runs of one process differ.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    precision = AcceleratorState().mixed_precision if is_initialized() else "no"
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision)


def place(model: nn.Module, wanted: str | None, accelerator: Any) -> torch.device:
    """Move `model` to the device of the run and return it; `wanted` is TrainConfig.device."""
    if wanted is None and not accelerator.use_distributed:
        return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        chosen_for_us = accelerator.use_distributed or wanted == "auto"
        device = accelerator.device if chosen_for_us else torch.device(str(wanted))
        if accelerator.distributed_type != "FSDP":
            model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={wanted!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def wrap(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any, output: Path | None) -> nn.Module:
    """The model as the loss function sees it: itself, or inside accelerate's wrapper in a distributed run.

    A model that `training.sharded.shard_` split is a distributed model by itself and can be checkpointed.
    """
    if not accelerator.use_distributed or is_sharded(model):
        return model
    if accelerator.distributed_type == "FSDP" and output is not None:
        raise Unsupported(
            "accelerate's FSDP cannot be checkpointed here: split the model with edgewright.training.sharded.shard_, "
            "use DDP, or fit(..., output=None)"
        )
    return accelerator.prepare(model, optimizer, device_placement=[False, False])[0]
