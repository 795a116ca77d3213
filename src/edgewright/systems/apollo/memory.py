"""How much an optimizer remembers: formulas by shape, bytes before training, bytes of a live state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.systems.apollo.sketch import sketch_of
from edgewright.systems.apollo.state import state_kind, stored_dtype

# Numbers that a method keeps for one m x n weight, m <= n (table 1 of the paper); r is the rank.
FORMULAS = {
    "AdamW": lambda m, n, r: 2 * m * n,
    "SGD with momentum": lambda m, n, r: m * n,
    "Lion": lambda m, n, r: m * n,
    "GaLore": lambda m, n, r: 2 * n * r + m * r,
    "Fira": lambda m, n, r: 2 * n * r + m * r + 1,
    "Flora": lambda m, n, r: 2 * n * r + 1,
    "APOLLO": lambda m, n, r: 2 * n * r + 2,
    "APOLLO-Mini": lambda m, n, r: 2 * n + 2,
}


def state_floats(method: str, shape: Sequence[int], rank: int = 1) -> int:
    """Numbers of state for one weight by the paper's formula; tensors of fewer dimensions than two are AdamW's."""
    if method not in FORMULAS:
        raise UsageError(f"method={method!r}: choose {', '.join(FORMULAS)}")
    if len(shape) < 2:
        return 2 * math.prod(shape) if method not in ("Lion", "SGD with momentum") else math.prod(shape)
    m, n = sorted((shape[0], math.prod(shape[1:])))
    return int(FORMULAS[method](m, n, min(rank, m)))


def optimizer_memory(model: nn.Module, optimizer: Any) -> dict[str, float]:
    """Bytes of state, from shapes alone and so before the first step: {"lowrank", "adamw", "total", "vs_adamw"}.

    optimizer: an APOLLO, or groups as `apollo_param_groups` makes. "lowrank" is the sketched weights' share, "adamw"
    that of the others; "vs_adamw" says how many times more AdamW would keep for them in float32. An optimizer that has
    stepped adds "live", the bytes of its tensors. Raises UsageError for parameters that are not of `model`.
    """
    known = {id(p) for p in model.parameters()}
    live = isinstance(optimizer, torch.optim.Optimizer)
    groups: Iterable[Mapping[str, Any]] = optimizer.param_groups if live else optimizer
    found = {"lowrank": 0, "adamw": 0}
    numbers = 0
    for group in groups:
        if "rank" not in group:
            raise UsageError("the groups have no 'rank': pass an APOLLO, or apollo_param_groups(model, rank=64)")
        for entry in group["params"]:
            p: Tensor = entry[1] if isinstance(entry, tuple) else entry
            if id(p) not in known:
                raise UsageError(f"the optimizer has a parameter of shape {list(p.shape)} that is not of this model")
            sketched = group["rank"] is not None and p.ndim > 1
            found["lowrank" if sketched else "adamw"] += _bytes_of(p, group)
            numbers += p.numel()
    total = sum(found.values())
    result: dict[str, float] = {**found, "total": total, "vs_adamw": 8 * numbers / max(1, total)}
    if live and optimizer.state:
        result["live"] = state_bytes(optimizer)
    return result


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps, of any kind: quantised ones count what they hold inside.

    Python numbers and the projector objects of galore-torch are looked into as well.
    """
    return sum(_tensor_bytes(value, set()) for entries in optimizer.state.values() for value in entries.values())


def _bytes_of(p: Tensor, group: Mapping[str, Any]) -> int:
    wide = torch.promote_types(p.dtype, torch.float32)
    count, rest = p.numel(), 4  # the step
    if group["rank"] is not None and p.ndim > 1:
        sketch = sketch_of(p.shape, group["rank"], group.get("side", "smaller"))
        count, rest = math.prod(sketch.shape), 4 + wide.itemsize + 8  # step, last norm, seed
        if group.get("proj") == "svd":
            rest += sketch.rank * sketch.contracted * wide.itemsize
    return 2 * count * stored_dtype(state_kind(group.get("state_dtype")), p.dtype).itemsize + rest


def _tensor_bytes(value: Any, seen: set[int]) -> int:
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
            names = value.__tensor_flatten__()[0]  # type: ignore[operator]
            return sum(_tensor_bytes(getattr(value, name), seen) for name in names)
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(part, seen) for part in value)
    if isinstance(value, Mapping):
        return sum(_tensor_bytes(part, seen) for part in value.values())
    return sum(_tensor_bytes(part, seen) for part in vars(value).values()) if hasattr(value, "__dict__") else 0
