"""One optimizer update in its two halves: micro steps that gather gradients, and the update that uses them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed, UsageError
from edgewright.training.config import PRECISIONS, TrainConfig
from edgewright.training.distributed import whole
from edgewright.training.metrics import Row
from edgewright.training.progress import batch_amount
from edgewright.training.resume import RunCheckpointer, TrainProgress

LossFunction = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, Mapping[str, float | Tensor]]"]
OWN_COLUMNS = ("step", "loss", "learning_rate", "gradient_norm")


@dataclass(frozen=True)
class RunObjects:
    """The live objects of a run. `wrapped` is the model as the loss function sees it."""

    model: nn.Module
    wrapped: nn.Module
    loss_function: LossFunction
    batches: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    accelerator: Any
    device: torch.device
    config: TrainConfig


def micro_step(work: RunObjects, position: TrainProgress) -> tuple[int, str]:
    """Forward and backward of the next batch: gradients add up in `.grad`, numbers in `position`.

    Returns how much all processes together used, as (amount, "tokens" or "samples").
    """
    from accelerate.utils import send_to_device

    config, accelerator = work.config, work.accelerator
    batch = _next_batch(work, position)
    gathers_only = accelerator.use_distributed and position.micro < config.accumulation - 1
    dtype = PRECISIONS[config.precision]
    with accelerator.no_sync(work.wrapped) if gathers_only else nullcontext():
        with torch.autocast(work.device.type, dtype=dtype) if dtype else nullcontext():
            result = work.loss_function(work.wrapped, send_to_device(batch, work.device))
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.requires_grad:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(f"the loss function must give a scalar tensor that depends on trained weights; got {got}")
        share = loss / config.accumulation if config.accumulation > 1 else loss
        (share if work.scaler is None else work.scaler.scale(share)).backward()
    position.losses.append(loss.detach())
    position.metrics.append({n: v.detach() if isinstance(v, Tensor) else float(v) for n, v in metrics.items()})
    position.micro += 1
    amount, unit = batch_amount(batch)
    return amount * accelerator.num_processes, unit


def update(
    work: RunObjects, position: TrainProgress, rate: float, stopping: bool, checkpointer: RunCheckpointer
) -> tuple[Row, bool]:
    """Clip and apply the gathered gradients; the row to log, and whether any process wants to stop.

    Raises CheckFailed before the weights change when the loss or the gradient is not finite.
    """
    optimizer, scaler, accelerator = work.optimizer, work.scaler, work.accelerator
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = _clip(work)
    names = list(dict.fromkeys(name for part in position.metrics for name in part))
    if clash := sorted(set(names) & set(OWN_COLUMNS)):
        raise UsageError(f"the metric name {clash[0]!r} is taken; the loop records {', '.join(OWN_COLUMNS)} itself")
    means = [_mean(position.losses)] + [_mean([m[name] for m in position.metrics if name in m]) for name in names]
    if accelerator.use_distributed:
        shared = torch.tensor([*means, float(stopping)], dtype=torch.float32, device=accelerator.device)
        *means, anyone = accelerator.reduce(shared, reduction="mean").tolist()
        stopping = anyone > 0
    _check_finite("loss", means[0], position, rate, checkpointer)
    if scaler is None:
        _check_finite("gradient norm", norm, position, rate, checkpointer)
        optimizer.step()
    else:
        scaler.step(optimizer)  # skips the update by itself when a gradient overflowed
        scaler.update()
    zero_gradients(work.model, optimizer)
    row = {"step": position.step + 1, "loss": means[0], "learning_rate": rate, "gradient_norm": norm}
    return row | dict(zip(names, means[1:], strict=True)), stopping


def zero_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Both, since either may hold parameters that the other does not."""
    model.zero_grad(set_to_none=True)
    optimizer.zero_grad(set_to_none=True)


def may_pause(work: RunObjects) -> bool:
    """Whether a checkpoint can hold a step that is half done.

    Not in a distributed run (each process has its own part of the gradient) nor with sparse gradients: there the step
    is finished first.
    """
    dense = all(p.grad is None or p.grad.layout == torch.strided for p in work.model.parameters())
    return dense and not work.accelerator.use_distributed


def _next_batch(work: RunObjects, position: TrainProgress) -> Any:
    """This process's batch. The processes take turns in one common order, so their number does not change the data."""
    index, processes = work.accelerator.process_index, work.accelerator.num_processes
    try:
        _skip(work.batches, index)
        batch = next(work.batches)
        _skip(work.batches, processes - 1 - index)
    except StopIteration:
        needed = work.config.steps * work.config.accumulation * processes
        raise UsageError(
            f"the batches ended in step {position.step + 1} of {work.config.steps}: the run needs {needed} of them; "
            "lower steps, or use an endless iterator such as edgewright.training.BlockBatches"
        ) from None
    return batch


def _skip(batches: Any, count: int) -> None:
    if count and hasattr(batches, "skip"):
        batches.skip(count)
        return
    for _ in range(count):
        next(batches)


def _clip(work: RunObjects) -> float:
    """Norm of all dense gradients before clipping; they are scaled only where that changes them."""
    limit, accelerator = work.config.clip_norm, work.accelerator
    parameters = [p for group in work.optimizer.param_groups for p in group["params"] if p.grad is not None]
    if accelerator.distributed_type == "FSDP":
        return float(accelerator.clip_grad_norm_(parameters, math.inf if limit is None else limit))
    total: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad.layout == torch.strided])
    norm = float(whole(total))
    if limit is not None and norm > limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
    return norm


def _check_finite(name: str, value: float, position: TrainProgress, rate: float, checkpointer: RunCheckpointer) -> None:
    if not math.isfinite(value):
        kept = (
            f"the last good checkpoint is {checkpointer.saved}"
            if checkpointer.saved
            else "no checkpoint was written yet"
        )
        raise CheckFailed(
            f"the {name} is {value} at step {position.step + 1} (learning rate {rate:.3g}); {kept}. Lower the learning "
            "rate or clip_norm, or look for such values in the data"
        )


def _mean(values: list[float | Tensor]) -> float:
    return sum(float(value) for value in values) / len(values)
