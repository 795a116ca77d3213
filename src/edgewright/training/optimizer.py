"""The default optimizer: AdamW, with weight decay where it belongs and a learning rate for each group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError

UNDECAYED_NAMES = ("step", "scale")  # ends of names: such values have a size with a meaning


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay may touch a parameter: matrices and larger, but no scales or steps, no biases, no norms."""
    return parameter.ndim > 1 and not name.rsplit(".", 1)[-1].endswith(UNDECAYED_NAMES)


def parameter_groups(
    model: nn.Module, weight_decay: float, groups: Iterable[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters of `model` as optimizer groups, each split into a decayed and an undecayed half.

    `groups` are ordinary optimizer groups ({"params": ..., "lr": ...}) and default to one that holds everything; a
    group that sets "weight_decay" itself is left whole. Parameters that need no gradient are dropped.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    split: list[dict[str, Any]] = []
    for group in [{"params": model.parameters()}] if groups is None else groups:
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        trained = [parameter for parameter in given if parameter.requires_grad]
        if "weight_decay" in group:
            split.append({**group, "params": trained})
            continue
        for decayed in (True, False):
            half = [p for p in trained if decays(names.get(id(p), ""), p) == decayed]
            split.append({**group, "params": half, "weight_decay": weight_decay if decayed else 0.0})
    return [group for group in split if group["params"]]


def default_optimizer(
    model: nn.Module,
    learning_rate: float | None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    groups: Iterable[Mapping[str, Any]] | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters (Loshchilov & Hutter, arXiv 1711.05101), state in the parameters' dtype.

    The fused kernel is used where torch has one for the device: on CPU it updates a parameter in one pass over memory.
    """
    split = parameter_groups(model, weight_decay, groups)
    if not split:
        raise UsageError("the model has no trainable parameters: set requires_grad_(True) on what should learn")
    if learning_rate is None and not all("lr" in group for group in split):
        raise UsageError("TrainConfig.learning_rate is missing: give one, or an 'lr' in every parameter group")
    parameters = [parameter for group in split for parameter in group["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters)
    return torch.optim.AdamW(split, lr=learning_rate or 0.0, betas=betas, weight_decay=weight_decay, fused=fused)
