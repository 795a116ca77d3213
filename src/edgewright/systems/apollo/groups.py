"""The parameter groups of APOLLO: which parameters it sketches, and the options of a group, checked when added."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from edgewright.checks import Allowed, check, number, one_of, optional, whole
from edgewright.errors import Unsupported, UsageError
from edgewright.systems.apollo.state import state_kind
from edgewright.training.distributed import is_split
from edgewright.training.optimizer import parameter_groups

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as the paper
RULES = {
    "betas": Allowed(
        "two numbers in [0, 1)",
        lambda betas: isinstance(betas, tuple | list) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
    ),
    "eps": number(0),
    "weight_decay": number(0),
    "rank": optional(whole(1)),
    "scale_type": one_of("channel", "tensor"),
    "update_proj_gap": whole(1),
    "norm_growth": optional(number(1)),
    "proj": one_of("random", "svd"),
    "seed": whole(0),
    "side": one_of("smaller", "local"),
    "nan_policy": one_of("raise", "skip", "ignore"),
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

    Parameters that need no gradient are left out.

    Args:
        model: whose parameters are taken, with their names.
        rank: of the sketches; None: AdamW for these too.
        target: parts of names, a regular expression that `re.search` finds in the full name, or a function of (name,
            parameter); the paper sketches the seven projections of each layer.
        include_embeddings: nn.Embedding weights too (a tied head with them).
        weight_decay: of matrices only, as in the default optimizer.
        options: further group options, such as scale or state_dtype, for the sketched.

    Returns:
        Groups with "params" (pairs of name and parameter), "rank" and "weight_decay".

    Raises:
        UsageError: nothing is targeted, or no regular expression.
    """
    chosen = _chooser(target)
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    names = {id(p): name for name, p in model.named_parameters()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    targeted = [
        p for name, p in trained if p.ndim > 1 and (chosen(name, p) or (include_embeddings and id(p) in embeddings))
    ]
    if not targeted:
        known = ", ".join(name for name, p in trained if p.ndim > 1)
        raise UsageError(
            f"target={target!r} finds no trainable matrix of the model; it has {known[:300] or 'none'}. "
            "Pass e.g. target=r'weight$' for all of them"
        )
    taken = {id(p) for p in targeted}
    rest = [p for _, p in trained if id(p) not in taken]
    groups = [{"params": targeted, "rank": rank, **options}, {"params": rest, "rank": None}]
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
    check("lr", float(group["lr"]), number(0))
    for name, rule in RULES.items():
        check(name, group[name], rule, "e.g. APOLLO(groups, lr=1e-3, rank=64)")
    if group["scale"] != "auto":
        check("scale", group["scale"], number(above=0), "or 'auto'")
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
