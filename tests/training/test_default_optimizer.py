"""Which parameters the default AdamW decays, and in which groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgewright.errors import UsageError
from edgewright.training import default_optimizer, parameter_groups


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.step = nn.Parameter(torch.ones(4, 1))
        self.row_scale = nn.Parameter(torch.ones(4, 1))
        self.step_embedding = nn.Embedding(3, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def names(model: nn.Module, group) -> set[str]:
    inside = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in inside}


def test_decay_touches_matrices_only_and_no_steps_or_scales() -> None:
    model = Quantised()
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and names(model, decayed) == {"linear.weight", "step_embedding.weight"}
    assert kept["weight_decay"] == 0.0
    assert names(model, kept) == {"linear.bias", "norm.weight", "norm.bias", "step", "row_scale"}


def test_groups_keep_their_rate_and_their_own_decay() -> None:
    model = Quantised()
    groups = [
        {"params": model.linear.parameters(), "lr": 0.5},
        {"params": model.step, "lr": 0.25, "weight_decay": 0.9},
        {"params": model.frozen.parameters()},
    ]
    optimizer = default_optimizer(model, 1.0, 0.1, (0.8, 0.9), groups)
    found = [(g["lr"], g["weight_decay"], g["betas"], sorted(names(model, g))) for g in optimizer.param_groups]
    assert found == [
        (0.5, 0.1, (0.8, 0.9), ["linear.weight"]),
        (0.5, 0.0, (0.8, 0.9), ["linear.bias"]),
        (0.25, 0.9, (0.8, 0.9), ["step"]),
    ]


def test_nothing_to_train() -> None:
    with pytest.raises(UsageError, match="no trainable parameters"):
        default_optimizer(Quantised().requires_grad_(False), 1.0)
