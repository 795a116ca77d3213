"""Training on clicks: row-wise Adagrad for tables, Adam for networks, and the package's loop over both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, check_fields, number, whole
from edgewright.distillation.best import Best
from edgewright.errors import UsageError
from edgewright.systems.dlrm.clicks import ClickData, ClickLoss
from edgewright.systems.dlrm.metrics import ClickMetrics, evaluate
from edgewright.training.loop import TrainConfig, TrainResult, fit
from edgewright.training.resume import latest_checkpoint
from edgewright.training.schedules import Schedule


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator a row, as DLRM's code and the production libraries have it.

    For every row r that the batch touched, with g_r its gradient, duplicates summed first:

        s_r += mean_j g_rj^2,   W_r -= lr * g_r / (sqrt(s_r) + eps)

    The state is one float a row instead of one a weight. Rows that were not touched keep their bits. Dense gradients
    are taken too; a row whose gradient is zero stays as it is.

    Args:
        parameters: tables [rows, width].
        lr: learning rate.
        eps: in the denominator; as torch's Adagrad.
        weight_decay: 0; anything else would move every row at every step.
        momentum: 0, for the same reason.

    Raises:
        UsageError: an argument breaks its rule, or a parameter is no matrix.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 0.05,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        check("lr", lr, number(0))
        check("eps", eps, number(0))
        if weight_decay or momentum:
            raise UsageError(
                f"weight_decay={weight_decay}, momentum={momentum}: either moves every row of a table at every step, "
                "also the rows that no sample asked for; leave them 0 and put such terms on the dense parameters"
            )
        super().__init__(parameters, {"lr": lr, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise UsageError(f"row-wise Adagrad takes tables [rows, width], got {list(parameter.shape)}")
                self.state[parameter]["sum"] = torch.zeros(len(parameter), device=parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that have a gradient.

        Args:
            closure: computes the loss and its gradients, as in torch.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _row_step(parameter, self.state[parameter]["sum"], group["lr"], group["eps"])
        return loss


def _row_step(weight: Tensor, total: Tensor, rate: float, eps: float) -> None:
    if weight.grad.layout == torch.strided:  # type: ignore[union-attr]
        gradient = weight.grad.float()  # type: ignore[union-attr]
        total += gradient.square().mean(1)
        weight -= (rate * gradient / (total.sqrt() + eps).unsqueeze(1)).to(weight.dtype)
        return
    gradient = weight.grad.coalesce()  # type: ignore[union-attr]
    rows, values = gradient.indices()[0], gradient.values().float()
    if not len(rows):
        return
    total[rows] += values.square().mean(1)  # rows are distinct once coalesced
    step = rate * values / (total[rows].sqrt() + eps).unsqueeze(1)
    weight.index_add_(0, rows, step.to(weight.dtype), alpha=-1)


class PairedOptimizer(torch.optim.Optimizer):
    """Two optimizers as one, so that a training loop sees a single object: tables one way, networks another."""

    def __init__(self, dense: torch.optim.Optimizer, sparse: torch.optim.Optimizer) -> None:
        self.dense, self.sparse = dense, sparse
        super().__init__([*dense.param_groups, *sparse.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.dense.step()
        self.sparse.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        dense, sparse = self.dense.state_dict(), self.sparse.state_dict()
        return {"dense": dense, "sparse": sparse, "param_groups": [*dense["param_groups"], *sparse["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.dense.load_state_dict(state_dict["dense"])
        self.sparse.load_state_dict(state_dict["sparse"])
        # torch replaces the groups when it loads; the schedule must reach the new ones
        self.param_groups = [*self.dense.param_groups, *self.sparse.param_groups]


def dlrm_optimizer(model: nn.Module, dense_lr: float = 1e-3, sparse_lr: float = 0.05) -> PairedOptimizer:
    """Adam for the networks, row-wise Adagrad for the tables of a DLRM (or whatever has its two parameter lists)."""
    dense = torch.optim.Adam(list(model.dense_parameters()), lr=dense_lr)  # type: ignore[operator]
    return PairedOptimizer(dense, RowwiseAdagrad(list(model.sparse_parameters()), lr=sparse_lr))  # type: ignore[operator]


def dlrm_schedule(
    warmup_steps: int = 0, decay_start: int = 0, decay_steps: int = 0, floor: float = 1e-7
) -> Callable[[int, int], float]:
    """DLRM's policy as a multiplier of the rate: linear warm-up, constant, then ((n - k) / n)^2, then constant.

    k counts the n = `decay_steps` updates from update number `decay_start` on; the multiplier never falls below
    `floor` and stays where the decay left it. For `TrainConfig(schedule=...)`.
    """
    check("warmup_steps", warmup_steps, whole(0))
    check("decay_steps", decay_steps, whole(0))
    check("decay_start", decay_start, whole(warmup_steps if decay_steps else 0), "the decay starts after the warm-up")

    def scale(step: int, steps: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if decay_steps and step >= decay_start:
            left = max(decay_steps - (step - decay_start), 0) / decay_steps
            return max(left * left, floor)
        return 1.0

    scale.__qualname__ = f"dlrm_schedule({warmup_steps},{decay_start},{decay_steps},{floor:g})"
    return scale


@dataclass(frozen=True)
class ClickTraining:
    """Settings of one training.

    Args:
        epochs: passes over the training part.
        batch: samples of an update.
        dense_lr: learning rate of the networks, Adam.
        sparse_lr: learning rate of the tables, row-wise Adagrad.
        schedule: of both rates.
        warmup_steps: updates of linear warm-up.
        shuffled: every epoch in an order of its own; False trains in the order of the rows.
        evaluations: how often an epoch the held-out clicks are looked at.
        checkpoint_every: updates between two checkpoints; 0 writes none before the end.
        seed: of the order.

    Raises:
        UsageError: a field breaks its rule.
    """

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

    def __post_init__(self) -> None:
        check_fields(self, {"epochs": number(above=0), "batch": whole(1), "evaluations": whole(1)})

    def steps(self, samples: int) -> int:
        """Updates of the training.

        Args:
            samples: of the training part.
        """
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
    """Train a model in place and leave it with the weights of its lowest log-loss on held-out clicks.

    Args:
        model: a DLRM, or any module that takes (dense, bags) and has `sparse_parameters()` and `dense_parameters()`.
        train: clicks to train on.
        valid: clicks to stop by.
        settings: see `ClickTraining`.
        output: folder of checkpoints; the same call goes on where an interrupted one stopped, to the same bits.
        progress: show a bar.
        resume: "auto", or "never" to start again.
        optimizer: (model, dense_lr, sparse_lr) -> the optimizer of both.
        label: of the bar.

    Returns:
        What `fit` returns: updates, losses, evaluations.
    """
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
