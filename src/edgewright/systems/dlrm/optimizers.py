"""Optimizers for tables: row-wise Adagrad, a pair of optimizers as one, and DLRM's learning-rate policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator a row, as DLRM's code and the production libraries have it.

    For every row r that the batch touched, with g_r its gradient, duplicates summed first:

        s_r += mean_j g_rj^2,   W_r -= lr * g_r / (sqrt(s_r) + eps)

    The state is one float a row instead of one a weight. Rows that were not touched keep their bits. Dense gradients
    are taken too; a row whose gradient is zero stays as it is. Raises UsageError for weight decay or momentum, which
    would move every row at every step.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 0.05,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        if not lr >= 0 or not eps >= 0:
            raise UsageError(f"lr={lr}, eps={eps}: both are at least 0")
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
    if min(warmup_steps, decay_start, decay_steps) < 0 or (decay_steps and decay_start < warmup_steps):
        raise UsageError(
            f"warmup_steps={warmup_steps}, decay_start={decay_start}, decay_steps={decay_steps}: none is negative and "
            "the decay starts after the warm-up"
        )

    def scale(step: int, steps: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if decay_steps and step >= decay_start:
            left = max(decay_steps - (step - decay_start), 0) / decay_steps
            return max(left * left, floor)
        return 1.0

    scale.__qualname__ = f"dlrm_schedule({warmup_steps},{decay_start},{decay_steps},{floor:g})"
    return scale
