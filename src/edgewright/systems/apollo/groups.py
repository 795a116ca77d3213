"""Which parameters APOLLO sketches: groups from a model, by name, pattern or function."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.training.optimizer import parameter_groups

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as the paper
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
