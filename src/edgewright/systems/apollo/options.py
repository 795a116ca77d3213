"""The options of an APOLLO parameter group, checked when the group is added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edgewright.errors import Unsupported, UsageError
from edgewright.systems.apollo.state import state_kind
from edgewright.training.sharded import is_split

CHOICES = {
    "scale_type": ("channel", "tensor"),
    "proj": ("random", "svd"),
    "side": ("smaller", "local"),
    "nan_policy": ("raise", "skip", "ignore"),
}


def check_group(group: dict[str, Any]) -> None:
    """Raise UsageError for a value that cannot work; `state_dtype` becomes its name."""
    for name, allowed in CHOICES.items():
        if group[name] not in allowed:
            raise UsageError(f"{name}={group[name]!r}: choose {' or '.join(map(repr, allowed))}")
    rank, scale, growth = group["rank"], group["scale"], group["norm_growth"]
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    rules = {
        "lr": (_number(group["lr"]) and float(group["lr"]) >= 0, "0 or more"),
        "betas": (pair and all(_number(b) and 0 <= b < 1 for b in betas), "two numbers in [0, 1)"),
        "eps": (_number(group["eps"]) and group["eps"] >= 0, "0 or more"),
        "weight_decay": (_number(group["weight_decay"]) and group["weight_decay"] >= 0, "0 or more"),
        "rank": (rank is None or (_whole(rank) and rank >= 1), "at least 1, or None for plain AdamW"),
        "scale": (scale == "auto" or (_number(scale) and scale > 0), "positive, or 'auto'"),
        "update_proj_gap": (_whole(group["update_proj_gap"]) and group["update_proj_gap"] >= 1, "at least 1"),
        "norm_growth": (growth is None or (_number(growth) and growth >= 1), "1 or more, or None for no limiter"),
        "seed": (_whole(group["seed"]) and group["seed"] >= 0, "0 or more"),
    }
    for name, (holds, wanted) in rules.items():
        if not holds:
            raise UsageError(f"{name}={group[name]!r}: it must be {wanted}, e.g. APOLLO(groups, lr=1e-3, rank=64)")
    if group["foreach"] and isinstance(group["lr"], Tensor):
        raise UsageError("foreach=True with a tensor as lr: give a number, or leave foreach out")
    group["state_dtype"] = state_kind(group["state_dtype"])


def check_parameter(p: Tensor, group: Mapping[str, Any], name: str) -> None:
    """Raise Unsupported for a parameter that no rule here fits."""
    if p.is_complex():
        raise Unsupported(f"parameter {name} is complex; train its real view (torch.view_as_real) instead")
    if not p.is_floating_point():
        raise Unsupported(f"parameter {name} is {p.dtype}; only floating-point parameters can be trained")
    if is_split(p) and group["proj"] == "svd":
        raise Unsupported(f"proj='svd' for parameter {name}, which is split over processes")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool) and math.isfinite(float(value))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
