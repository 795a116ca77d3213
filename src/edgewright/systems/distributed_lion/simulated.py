"""Distributed Lion with all its workers in one process: for studies of N without N machines, and as the reference.

Nothing is packed or sent here; votes are added as numbers. The tests hold the processes against it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, one_of, whole
from edgewright.errors import UsageError
from edgewright.systems.distributed_lion.distributed import ZEROS, sends_zeros
from edgewright.systems.distributed_lion.exchange import AGGREGATES, alternate_votes
from edgewright.systems.distributed_lion.lion import advance_, apply_, check_settings, direction


class SimulatedLion(torch.optim.Optimizer):
    """`workers` voters over one set of parameters. Each worker's gradient is handed over by `keep`, then comes `step`.

    State: "exp_avg" of shape [workers, *parameter].

    Args:
        params: parameters or groups of them, with names for zero="auto".
        workers: how many vote, at least 1.
        lr: as of DistributedLion.
        betas: as of DistributedLion.
        weight_decay: as of DistributedLion.
        aggregate: as of DistributedLion.
        zero: as of DistributedLion.

    Raises:
        UsageError: a setting out of its range, or `step` without a gradient of every worker.
    """

    def __init__(
        self,
        params: Any,
        workers: int,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        aggregate: str = "mavo",
        zero: str = "auto",
    ) -> None:
        check_settings(lr, betas, weight_decay)
        check("workers", workers, whole(1))
        check("aggregate", aggregate, one_of(*AGGREGATES))
        check("zero", zero, one_of(*ZEROS))
        self.workers, self.aggregate = workers, aggregate
        self._kept: list[list[Tensor | None]] = []
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "zero": zero, "step": 0})

    def keep(self) -> None:
        """Take the gradients that are there as those of the next worker, and leave none behind."""
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        self._kept.append([parameter.grad for parameter in members])
        for parameter in members:
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the gradients of all workers; those that are in the parameters count as the last one's.

        Args:
            closure: none is taken, as it would give one worker's gradient.
        """
        if closure is not None:
            raise UsageError("a closure gives one gradient, here are several workers: call keep() after each backward")
        members = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        if any(parameter.grad is not None for _, parameter in members):
            self.keep()
        if len(self._kept) != self.workers:
            raise UsageError(f"{len(self._kept)} gradients were kept for {self.workers} workers: one keep() for each")
        names = [name for group in self.param_groups for name in group.get("param_names", [""] * len(group["params"]))]
        starts = [0, *accumulate(parameter.numel() for _, parameter in members)]
        for number, (group, parameter) in enumerate(members):
            gradients = [worker[number] for worker in self._kept]
            if any(gradient is not None for gradient in gradients):
                zeros = self.workers == 1 or sends_zeros(group["zero"], names[number])
                delta = self._vote(group, parameter, gradients, starts[number], zeros)
                apply_(parameter, delta, float(group["lr"]), float(group["weight_decay"]))
        self._kept = []
        for group in self.param_groups:
            group["step"] += 1
        return None

    def _vote(
        self, group: dict[str, Any], parameter: Tensor, gradients: list[Tensor | None], start: int, zeros: bool
    ) -> Tensor:
        """D of one parameter; the momenta advance."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = parameter.new_zeros((self.workers, *parameter.shape))
        places = torch.arange(start, start + parameter.numel(), device=parameter.device)
        rule = None if zeros else alternate_votes(places, int(group["step"])).view(parameter.shape)
        total = torch.zeros(parameter.shape, dtype=torch.int32, device=parameter.device)
        for momentum, gradient in zip(state["exp_avg"], gradients, strict=True):
            vote = torch.zeros_like(total)
            if gradient is not None:
                vote = direction(momentum, gradient, group["betas"][0]).sign_().to(torch.int32)
                advance_(momentum, gradient, group["betas"][1])
            total += vote if rule is None else torch.where(vote == 0, rule, vote)
        if self.aggregate == "avg":
            return total.to(parameter.dtype) / self.workers
        majority = total.sign()
        return (majority if rule is None else torch.where(majority == 0, rule, majority)).to(parameter.dtype)


class SimulatedWorkers:
    """A loss function for `fit` with accumulation=workers: every micro step is one worker's batch.

    fit(model, SimulatedWorkers(loss, optimizer), batches, TrainConfig(..., accumulation=4, clip_norm=None),
    optimizer=optimizer). The batches come in the order in which four processes would read them.

    Args:
        loss_function: (model, batch) -> the loss of one worker's batch.
        optimizer: the one that `fit` steps.
    """

    def __init__(self, loss_function: Callable[[nn.Module, Any], Any], optimizer: SimulatedLion) -> None:
        self._loss_function, self._optimizer = loss_function, optimizer

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        if any(parameter.grad is not None for parameter in model.parameters()):
            self._optimizer.keep()
        return self._loss_function(model, batch)

    def state_dict(self) -> dict[str, Any]:
        """Gradients of the workers that are done in a step that was interrupted."""
        return {"kept": list(self._optimizer._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._optimizer._kept = list(state["kept"])
