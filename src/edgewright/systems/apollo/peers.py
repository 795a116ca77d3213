"""APOLLO and the optimizers that it stands beside, made by name over the same weights: for recipe and benchmark."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from edgewright.errors import MissingPackage, UsageError
from edgewright.systems.apollo.groups import apollo_param_groups
from edgewright.systems.apollo.optimizer import APOLLO, APOLLOMini

VARIANTS: dict[str, dict[str, Any]] = {
    "APOLLO": {},
    "APOLLO 8-bit": {"state_dtype": "8bit"},
    "APOLLO without limiter": {"norm_growth": None},
}


def named_optimizer(method: str, model: nn.Module, rate: float, rank: int) -> torch.optim.Optimizer:
    """An optimizer over the trainable weights; one with a rank sketches the seven projections of each layer alone.

    Raises UsageError for an unknown method, MissingPackage where a peer is not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if method == "AdamW":
        return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    if method == "AdamW, foreach":
        return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, foreach=True)
    if method == "SGD with momentum":
        return torch.optim.SGD(trained, lr=rate, momentum=0.9)
    if method == "Adafactor":
        return torch.optim.Adafactor(trained, lr=rate)
    if method == "AdamW 8-bit (torchao)":
        return _peer("torchao.optim", "AdamW8bit", "torchao")(trained, lr=rate, weight_decay=0.0)
    if method == "APOLLO rank 1 by channel":
        return APOLLO(apollo_param_groups(model, 1), rate, scale="auto")
    if method == "APOLLO-Mini":
        return APOLLOMini(apollo_param_groups(model, 1), rate)
    sketched, *rest = apollo_param_groups(model, rank)
    matrices, others = [p for _, p in sketched["params"]], [p for group in rest for _, p in group["params"]]
    if method == "Muon":
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        return Several(muon, torch.optim.AdamW(others, lr=rate, weight_decay=0.0))
    if method == "GaLore":
        low = {"params": matrices, "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        made = _peer("galore_torch", "GaLoreAdamW", "galore-torch bitsandbytes")
        return made([low, {"params": others}], lr=rate, no_deprecation_warning=True)
    if method not in VARIANTS:
        raise UsageError(f"no optimizer is called {method!r}; e.g. AdamW, Adafactor, Muon, GaLore, APOLLO, APOLLO-Mini")
    return APOLLO([sketched, *rest], rate, scale="auto", **VARIANTS[method])


class Several(torch.optim.Optimizer):
    """Optimizers of different parameters as one, for the loop: Muon takes matrices alone."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
            self.state.update(part.state)
        return loss


def _peer(module: str, name: str, package: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise MissingPackage(
            f"{name} is not installed ({error}); pip install {package}, or leave it out with --set methods=..."
        ) from error
