"""Lion (arXiv 2302.06675): an optimizer that steps by the sign of its momentum and keeps nothing else.

For each element, with learning rate e and weight decay w:

    u = sign(b1 * m + (1 - b1) * g)        the momentum m before this step
    x = x - e * (u + w * x)
    m = b2 * m + (1 - b2) * g
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgewright.checks import Allowed, check, number
from edgewright.errors import UsageError

BETAS = Allowed(
    "two numbers of at least 0 and below 1, as (0.9, 0.99)",
    lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
)


def check_settings(lr: float | Tensor, betas: tuple[float, float], weight_decay: float) -> None:
    """Raise UsageError for numbers that no Lion can use."""
    check("lr", float(lr), number(above=0), "Lion wants a third to a tenth of AdamW's, as 1e-4")
    check("betas", betas, BETAS)
    check("weight_decay", float(weight_decay), number(0), "Lion wants 3 to 10 times AdamW's")


def check_parameter(parameter: Tensor, name: str) -> None:
    """Raise UsageError for a parameter whose elements have no sign or no order in memory."""
    if parameter.is_complex() or not parameter.is_floating_point():
        raise UsageError(
            f"{name} is of {parameter.dtype}: Lion steps by signs and needs real floating-point parameters"
        )
    if not parameter.is_contiguous():
        raise UsageError(
            f"{name} of shape {list(parameter.shape)} is not contiguous: give nn.Parameter(tensor.contiguous())"
        )


def check_gradient(gradient: Tensor, name: str) -> None:
    """Raise UsageError for a sparse gradient."""
    if gradient.layout != torch.strided:
        raise UsageError(
            f"{name} has a {gradient.layout} gradient; Lion needs dense ones: Embedding(..., sparse=False)"
        )


def direction(momentum: Tensor, gradient: Tensor, beta: float) -> Tensor:
    """b1 * m + (1 - b1) * g, whose sign is the update; a new tensor."""
    return momentum.mul(beta).add_(gradient, alpha=1 - beta)


def advance_(momentum: Tensor, gradient: Tensor, beta: float) -> None:
    """M = b2 * m + (1 - b2) * g in place."""
    momentum.mul_(beta).add_(gradient, alpha=1 - beta)


def apply_(parameter: Tensor, delta: Tensor, lr: float, weight_decay: float) -> None:
    """X = (1 - e * w) * x - e * delta in place: always in these two operations, so that every process rounds alike."""
    if weight_decay:
        parameter.mul_(1 - lr * weight_decay)
    parameter.add_(delta, alpha=-lr)


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675, Algorithm 2) over any dense parameters.

    The state is `exp_avg` alone, in the parameter's shape and dtype.

    Args:
        params: parameters or groups of them, as torch's optimizers take them: real, contiguous.
        lr: learning rate, above 0; a third to a tenth of AdamW's.
        betas: weights of the momentum in the update and in its own average, at least 0 and below 1.
        weight_decay: decoupled, multiplied by lr, at least 0; 3 to 10 times AdamW's.
        foreach: True works on all tensors of a group in one call, which helps where launching a kernel is what costs;
            None does that on accelerators only. Both give the same bits.

    Raises:
        UsageError: a setting out of its range; a parameter that is complex, integer or not contiguous; a sparse
            gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "foreach": foreach})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with every setting and parameter checked.

        Args:
            param_group: "params", and settings that differ from the defaults.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_settings(group["lr"], group["betas"], group["weight_decay"])
        for index, parameter in enumerate(group["params"]):
            check_parameter(parameter, f"parameter {index} of group {len(self.param_groups) - 1}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            The closure's value, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for index, parameter in enumerate(parameters):
                check_gradient(parameter.grad, f"parameter {index} with a gradient")
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self.state[parameter]["exp_avg"] for parameter in parameters]
            (b1, b2), lr, weight_decay = group["betas"], float(group["lr"]), float(group["weight_decay"])
            foreach = group["foreach"]
            if foreach is None:
                foreach = all(parameter.device.type != "cpu" for parameter in parameters)
            if not foreach or not parameters:
                for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                    apply_(parameter, direction(momentum, gradient, b1).sign_(), lr, weight_decay)
                    advance_(momentum, gradient, b2)
                continue
            updates = torch._foreach_mul(momenta, b1)
            torch._foreach_add_(updates, gradients, alpha=1 - b1)
            torch._foreach_sign_(updates)
            if weight_decay:
                torch._foreach_mul_(parameters, 1 - lr * weight_decay)
            torch._foreach_add_(parameters, updates, alpha=-lr)
            torch._foreach_mul_(momenta, b2)
            torch._foreach_add_(momenta, gradients, alpha=1 - b2)
        return loss
