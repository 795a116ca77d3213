"""Training on clicks: the package's loop with the right optimizers, and the best weights on held-out clicks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgewright.distillation.best import Best
from edgewright.errors import UsageError
from edgewright.systems.dlrm.clicks import ClickData, ClickLoss
from edgewright.systems.dlrm.metrics import ClickMetrics, evaluate
from edgewright.systems.dlrm.optimizers import dlrm_optimizer
from edgewright.training.loop import TrainConfig, TrainResult, fit
from edgewright.training.resume import latest_checkpoint
from edgewright.training.schedules import Schedule


@dataclass(frozen=True)
class ClickTraining:
    """Settings of one training. evaluations: how often an epoch the held-out clicks are looked at."""

    epochs: float = 2.0
    batch: int = 256
    dense_lr: float = 1e-3
    sparse_lr: float = 0.01
    schedule: Schedule = "linear"
    warmup_steps: int = 0
    shuffled: bool = True
    evaluations: int = 2
    checkpoint_every: int = 0
    seed: int = 0

    def steps(self, samples: int) -> int:
        """Updates for a training part of so many samples."""
        return max(1, round(self.epochs * samples / self.batch))


def train_clicks(
    model: nn.Module,
    train: ClickData,
    valid: ClickData,
    settings: ClickTraining,
    *,
    output: str | Path | None = None,
    progress: bool = False,
    resume: str = "auto",
    optimizer: Callable[[Any, float, float], torch.optim.Optimizer] = dlrm_optimizer,
    label: str = "training",
) -> TrainResult:
    """Train `model` in place and leave it with the weights of its lowest log-loss on `valid`.

    model: a DLRM, or any module that takes (dense, bags) and has `sparse_parameters()` and `dense_parameters()`.
    With an `output` folder the same call goes on where an interrupted one stopped, to the same bits.
    """
    if settings.epochs <= 0 or settings.batch < 1 or settings.evaluations < 1:
        raise UsageError(
            f"epochs={settings.epochs}, batch={settings.batch}, evaluations={settings.evaluations}: epochs is "
            "positive, the others at least 1"
        )
    steps = settings.steps(len(train))
    every = max(1, round(len(train) / settings.batch / settings.evaluations))
    folder = None if output is None else Path(output)
    resumes = folder is not None and resume != "never" and latest_checkpoint(folder) is not None
    best = Best(folder, higher_is_better=False, fresh=not resumes)

    def look(network: nn.Module) -> dict[str, float]:
        found: ClickMetrics = evaluate(network, valid)
        values = {"logloss": found.logloss, "auc": found.auc, "ne": found.ne}
        best.offer(found.logloss, values, network)
        return values

    result = fit(
        model,
        ClickLoss(train.schema.slots),
        train.batches(settings.batch, settings.seed, settings.shuffled),
        TrainConfig(
            steps=steps,
            learning_rate=settings.dense_lr,
            schedule=settings.schedule,
            warmup_steps=min(settings.warmup_steps, steps - 1),
            clip_norm=None,
            checkpoint_every=settings.checkpoint_every,
            log_every=max(1, steps // 200),
            seed=settings.seed,
        ),
        optimizer=optimizer(model, settings.dense_lr, settings.sparse_lr),
        output=folder,
        resume=resume,
        evaluate=look,
        evaluate_every=every,
        progress=progress,
        label=label,
    )
    best.restore(model)
    return result
