"""The parameter groups of APOLLO: which parameters it sketches, and the options of a group, checked when added."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.systems.apollo.state import state_kind
from edgewright.training.distributed import is_split
from edgewright.training.optimizer import parameter_groups

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as the paper
CHOICES = {
    "scale_type": ("channel", "tensor"),
    "proj": ("random", "svd"),
    "side": ("smaller", "local"),
    "nan_policy": ("raise", "skip", "ignore"),
}
Target = str | Iterable[str] | Callable[[str, Tensor], bool]


def apollo_param_groups(
    model: nn.Module,
    rank: int | None,
    target: Target = PROJECTIONS,
    include_embeddings: bool = False,
    weight_decay: float = 0.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups for APOLLO: targeted weights of two and more dimensions with `rank`, all others with rank None (AdamW).

    target: parts of names, a regular expression that `re.search` finds in the full name, or a function of (name,
    parameter). include_embeddings: nn.Embedding weights too (a tied head with them). weight_decay reaches matrices
    only, as in the default optimizer. options: further group options, such as scale or state_dtype, for the sketched.
    Parameters that need no gradient are left out. Raises UsageError when nothing is targeted.
    """
    chosen = _chooser(target)
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    names = {id(p): name for name, p in model.named_parameters()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    wanted = [
        p for name, p in trained if p.ndim > 1 and (chosen(name, p) or (include_embeddings and id(p) in embeddings))
    ]
    if not wanted:
        known = ", ".join(name for name, p in trained if p.ndim > 1)
        raise UsageError(
            f"target={target!r} finds no trainable matrix of the model; it has {known[:300] or 'none'}. "
            "Pass e.g. target=r'weight$' for all of them"
        )
    taken = {id(p) for p in wanted}
    rest = [p for _, p in trained if id(p) not in taken]
    groups = [{"params": wanted, "rank": rank, **options}, {"params": rest, "rank": None}]
    split = parameter_groups(model, weight_decay, groups)
    return [{**group, "params": [(names[id(p)], p) for p in group["params"]]} for group in split]


def _chooser(target: Target) -> Callable[[str, Tensor], bool]:
    if isinstance(target, str):
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise UsageError(f"target={target!r} is no regular expression ({error}); e.g. r'_proj\\.weight$'") from None
        return lambda name, _: bool(pattern.search(name))
    if callable(target):
        return target
    parts = tuple(target)
    return lambda name, _: bool(set(parts) & set(name.split(".")))


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
