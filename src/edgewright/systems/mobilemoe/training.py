"""Training a mixture of experts: load balanced through the selection bias, logits kept small, nothing printed.

Source: MobileMoE, arXiv 2605.27358. After each optimizer step, with n_e tokens routed to e over the global batch,
    b_e += rate * sign(mean(n) - n_e)
and the loss gets 1e-4 * mean over tokens of (logsumexp_e z_e)^2 on the router logits z. There is no auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.systems.mobilemoe.layer import Router, Routing, moe_layers

Z_WEIGHT = 1e-4


class LoadBalancer:
    """Moves the selection bias of every sparse layer towards equal loads.

    It counts what the routers choose in training mode, over all micro batches and all processes, until `step()`. Call
    `step()` after the optimizer's, or `attach(optimizer)` once and it is called. The biases are buffers of the model
    and saved with it; `state_dict` holds the counts of an unfinished step. `loads`: counts of the latest step by layer.
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3) -> None:
        if not 0 <= rate < 1:
            raise UsageError(f"LoadBalancer rate={rate}; choose 0 (off) up to 1, for example 1e-3")
        self.rate = rate
        self.routers: dict[str, Router] = {name: layer.gate for name, layer in moe_layers(model).items()}
        self.counts = {name: _no_tokens(router) for name, router in self.routers.items()}
        self.loads: dict[str, Tensor] = {}
        self._handles = [
            router.register_forward_hook(lambda module, _, routing, name=name: self._count(name, module, routing))
            for name, router in self.routers.items()
        ]

    def _count(self, name: str, router: Router, routing: Routing) -> None:
        if router.training and not _in_backward():
            self.counts[name] = self.counts[name].to(routing.indices.device) + routing.counts

    @torch.no_grad()
    def step(self) -> None:
        """One move of every bias, from the counts since the last one; layers without tokens stay as they are."""
        if dist.is_available() and dist.is_initialized():
            for counts in self.counts.values():
                dist.all_reduce(counts)
        for name, router in self.routers.items():
            counts, bias = self.counts[name], router.e_score_correction_bias
            load = counts.to(bias.device, torch.float64)
            bias += self.rate * torch.sign(load.mean() - load).to(bias.dtype)
            self.loads[name] = counts
            self.counts[name] = torch.zeros_like(counts)

    def attach(self, optimizer: torch.optim.Optimizer) -> LoadBalancer:
        """Step after every step of this optimizer, for loops that offer no other place; returns itself."""
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.step()))  # type: ignore[arg-type]
        return self

    def max_load(self) -> dict[str, float]:
        """Largest load over the mean one in the latest step, by layer: 1 is perfect, num_experts / top_k the worst."""
        return {name: imbalance(counts) for name, counts in self.loads.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate, "counts": {name: counts.cpu() for name, counts in self.counts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UsageError for the state of another model."""
        if set(state["counts"]) != set(self.counts):
            other = sorted(set(state["counts"]) ^ set(self.counts))[0]
            raise UsageError(f"this balancer's state is of another model: it and the model disagree on layer {other!r}")
        self.rate = state["rate"]
        self.counts = {name: state["counts"][name].to(counts.device) for name, counts in self.counts.items()}

    def close(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[tuple[str, Routing]]]:
    """The routings of every forward inside the block, in order, with their gradients; a layer that runs twice is twice.

    with record_routing(model) as routings:
        loss = model(ids, labels=ids).loss
    """
    found: list[tuple[str, Routing]] = []

    def hook(name: str) -> Any:
        return lambda module, inputs, routing: found.append((name, routing))

    handles = [layer.gate.register_forward_hook(hook(name)) for name, layer in moe_layers(model).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of (logsumexp over experts)^2; logits [N, E], zero for no tokens."""
    return torch.logsumexp(logits.float(), -1).square().sum() / max(len(logits), 1)


def imbalance(counts: Tensor) -> float:
    """Largest load over the mean load; 1.0 for no tokens at all."""
    mean = counts.double().mean()
    return float(counts.max() / mean) if mean > 0 else 1.0


class MoELoss:
    """A loss function for `edgewright.fit` around another one: adds the router z-loss, keeps the balancer's state.

    loss_function(model, batch) as `fit` takes it. Records "z_loss" (unweighted, mean over layers) and "max_load" (the
    worst layer's largest load over its mean).

        optimizer = default_optimizer(model, 1e-3)
        balancer = LoadBalancer(model).attach(optimizer)
        fit(model, MoELoss(loss, balancer), batches, config, optimizer=optimizer)
    """

    def __init__(self, loss_function: Any, balancer: LoadBalancer | None = None, z_weight: float = Z_WEIGHT) -> None:
        self.loss_function, self.balancer, self.z_weight = loss_function, balancer, z_weight

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        with record_routing(model) as routings:
            result = self.loss_function(model, batch)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        z_loss = torch.stack([router_z_loss(routing.logits) for _, routing in routings]).mean()
        worst = max(imbalance(routing.counts) for _, routing in routings)
        return loss + self.z_weight * z_loss, {**metrics, "z_loss": z_loss.detach(), "max_load": worst}

    def state_dict(self) -> dict[str, Any]:
        return self.balancer.state_dict() if self.balancer else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.balancer:
            self.balancer.load_state_dict(state)


def _no_tokens(router: Router) -> Tensor:
    return torch.zeros(router.config.num_experts, dtype=torch.int64, device=router.weight.device)


def balanced_loss(loss: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> MoELoss:
    """`loss` with the loss of the routers added, and a balancer of the model's experts behind the optimizer's steps."""
    return MoELoss(loss, LoadBalancer(model).attach(optimizer))


def _in_backward() -> bool:
    """Whether a checkpointed block is being run again for its gradients: its tokens were counted already."""
    return torch._C._current_graph_task_id() != -1
