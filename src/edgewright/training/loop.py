"""The training loop: whatever trains in edgewright trains here.

One call of `fit` is one run. With an `output` folder it can be stopped at any moment and called again, and on the same
machine the weights, the optimizer and metrics.csv come out with the bits of a run that was never stopped. On a GPU this
holds as far as the kernels that the model uses are deterministic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.training import snapshot
from edgewright.training.config import TrainConfig
from edgewright.training.interrupt import StopSignals
from edgewright.training.metrics import MetricsLog, Row, write_loss_plot
from edgewright.training.optimizer import default_optimizer
from edgewright.training.placement import place, process_accelerator, wrap
from edgewright.training.progress import Progress
from edgewright.training.resume import RunCheckpointer, TrainProgress
from edgewright.training.schedules import learning_rate_scale
from edgewright.training.step import (
    OWN_COLUMNS,
    LossFunction,
    RunObjects,
    may_pause,
    micro_step,
    update,
    zero_gradients,
)

Groups = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Args:
        steps: updates of the whole run.
        loss: of the last logged step, in the loss function's unit.
        metrics: further numbers of the last logged step.
        history: one row a logged step, as in metrics.csv.
        seconds: of this call alone.
        resumed_from: step at which this call took over an earlier one, or None.
        output: the folder of the run, or None.
    """

    steps: int
    loss: float
    metrics: dict[str, float]
    history: list[Row]
    seconds: float
    resumed_from: int | None
    output: Path | None


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run at a safe point.

    Args:
        step: updates done.
        steps: updates of the whole run.
        checkpoint: the folder that the run goes on from, or None.
    """

    def __init__(self, step: int, steps: int, checkpoint: Path | None) -> None:
        kept = f"saved in {checkpoint}; run the same command again to resume" if checkpoint else "nothing was saved"
        super().__init__(f"interrupted after {step} of {steps} steps: {kept}")
        self.step, self.steps, self.checkpoint = step, steps, checkpoint


def fit(
    model: nn.Module,
    loss_function: LossFunction,
    batches: Any,
    config: TrainConfig,
    *,
    optimizer: torch.optim.Optimizer | Groups | None = None,
    output: str | Path | None = None,
    resume: str = "auto",
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    progress: bool = True,
    label: str = "training",
    generator: torch.Generator | None = None,
    settings: Mapping[str, Any] | None = None,
    accelerator: Any = None,
) -> TrainResult:
    """Train `model` in place for `config.steps` updates.

    The run draws from torch's global generators, seeded by config.seed, and puts back their states and every module's
    train or eval mode.

    Args:
        model: trained where it is; frozen parameters stay as they are.
        loss_function: called as (model, batch) once for each batch, in train mode, under autocast where
            `config.precision` asks for it; gives a scalar, or a scalar and a dict of further numbers to record. Where
            it has `state_dict()` and `load_state_dict()` and is no nn.Module, checkpoints keep its state.
        batches: any iterator (see `training.batches`); a batch is any nesting of dicts, lists and tuples of tensors and
            is moved to the device.
        config: settings of the run.
        optimizer: a ready one, parameter groups for the default AdamW, or None.
        output: folder that receives metrics.csv, loss.png and checkpoints/; None keeps nothing.
        resume: "auto" goes on from a checkpoint where there is one, "never" starts again (and removes it), "must"
            insists on one.
        evaluate: called as (model) every `evaluate_every` steps and after the last one, in eval mode, without gradients
            and without disturbing the random numbers; its results become columns "eval_...".
        evaluate_every: updates between evaluations; 0 for none.
        progress: show a progress bar.
        label: its text, and the title of loss.png.
        generator: what the loss function draws from, if anything; its state is kept too.
        settings: further JSON values (model name, method) that must be the same in a resume.
        accelerator: an accelerate.Accelerator of your own for special distributed set-ups.

    Returns:
        Losses, metrics and times of the run.

    Raises:
        UsageError: settings that cannot work or do not match the checkpoint.
        CheckFailed: the loss or the gradient is not finite; weights and checkpoint stay at the last good step.
        TrainingInterrupted: after Ctrl-C or SIGTERM.
    """
    began = time.monotonic()
    if evaluate_every < 0 or (evaluate_every and evaluate is None):
        raise UsageError(f"evaluate_every={evaluate_every} needs a function evaluate(model) and a number of at least 0")
    folder = None if output is None else Path(output)
    accelerator = process_accelerator() if accelerator is None else accelerator
    main = accelerator.is_main_process
    device = place(model, config.device, accelerator)
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = default_optimizer(model, config.learning_rate, config.weight_decay, config.betas, optimizer)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    source = batches if hasattr(batches, "__next__") else iter(batches)
    scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None
    shaping = config.fixed() | {
        "evaluate_every": evaluate_every,
        "processes": accelerator.num_processes,
        "optimizer": snapshot.optimizer_settings(optimizer),
        "settings": dict(settings or {}),
    }

    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals(announce=progress and main))
        stack.enter_context(snapshot.preserved_random_state(device))
        stack.enter_context(snapshot.preserved_modes(model, training=True))
        stack.callback(_set_rates, optimizer, rates, 1.0)
        zero_gradients(model, optimizer)
        wrapped = wrap(model, optimizer, accelerator, folder)
        work = RunObjects(model, wrapped, loss_function, source, optimizer, scaler, accelerator, device, config)
        snapshot.seed_random_state(device, config.seed + accelerator.process_index)
        checkpointer = RunCheckpointer(
            folder, model, optimizer, source, loss_function, device, generator, scaler, accelerator, shaping
        )
        stack.push(checkpointer.finish)
        position = checkpointer.restore(resume)
        resumed = position.step if checkpointer.saved else None
        log = stack.enter_context(MetricsLog(folder / "metrics.csv" if folder and main else None, resumed))
        bar = stack.enter_context(Progress(progress and main, label, position.step, config.steps))

        def save(behind: bool = False) -> Path | None:
            log.sync()
            return checkpointer.save(position, behind)

        while position.step < config.steps:
            scale = learning_rate_scale(config.schedule, position.step, config.steps, config.warmup_steps)
            _set_rates(optimizer, rates, scale)
            amount, unit = 0, "samples"
            while position.micro < config.accumulation:
                if stop.requested and may_pause(work):
                    raise TrainingInterrupted(position.step, config.steps, save())
                count, unit = micro_step(work, position)
                amount += count
            row, stopping = update(work, position, rates[0] * scale, stop.requested is not None, checkpointer)
            position = TrainProgress(position.step + 1)
            last = position.step == config.steps
            evaluated = bool(evaluate_every) and (last or position.step % evaluate_every == 0)
            if evaluate is not None and evaluated:
                with bar.paused():
                    row |= _evaluate(evaluate, wrapped, device, generator)
            if evaluated or last or position.step % config.log_every == 0:
                log.append(row)
            bar.update(position.step, row["loss"], rates[0] * scale, amount, unit)
            if stopping:
                raise TrainingInterrupted(position.step, config.steps, save())
            if config.checkpoint_every and (last or position.step % config.checkpoint_every == 0):
                save(behind=config.checkpoint_async and not last)
        if stop.requested and not accelerator.use_distributed:
            raise TrainingInterrupted(position.step, config.steps, save())
        if not config.checkpoint_every:
            checkpointer.clear()
        if folder and main and log.rows:
            write_loss_plot(folder / "loss.png", log.rows, label)

    final = dict(log.rows[-1]) if log.rows else {}
    metrics = {name: value for name, value in final.items() if name not in OWN_COLUMNS}
    seconds = time.monotonic() - began
    return TrainResult(config.steps, final.get("loss", math.nan), metrics, log.rows, seconds, resumed, folder)


def _evaluate(
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    model: nn.Module,
    device: torch.device,
    generator: torch.Generator | None,
) -> Row:
    with snapshot.preserved_random_state(device, generator), snapshot.preserved_modes(model, False), torch.no_grad():
        return {f"eval_{name}": float(value) for name, value in evaluate(model).items()}


def _set_rates(optimizer: torch.optim.Optimizer, rates: list[float], scale: float) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * scale)
        else:
            group["lr"] = rate * scale
