"""The state of APOLLO: tensors only, in float32 or bfloat16; what a loaded state must be; how many bytes it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, one_of
from edgewright.errors import UsageError
from edgewright.systems.apollo.step import sketch_of

KINDS = ("float32", "bfloat16")
HOST = ("step", "proj_seed")  # numbers that the host reads: they stay on the CPU, so that no step waits for a device
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


def state_kind(value: Any) -> str:
    """ "float32" (also None) or "bfloat16", from that text or a torch dtype. Raises UsageError."""
    kind = "float32" if value is None else str(value).removeprefix("torch.")
    check("state_dtype", kind, one_of(*KINDS))
    return kind


def stored_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """Of the tensor in the state; float32 is float64 for float64 weights."""
    return torch.bfloat16 if kind == "bfloat16" else torch.promote_types(dtype, torch.float32)


def add_moments(state: dict[str, Any], like: Tensor, kind: str) -> None:
    """Put zero moments shaped like the tensor `like` into a parameter's state."""
    for name in ("exp_avg", "exp_avg_sq"):
        dtype = stored_dtype(kind, like.dtype)
        state[name] = torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)


def restore_dtypes(optimizer: torch.optim.Optimizer, saved: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> None:
    """Undo what torch's load_state_dict does to numbers: it casts all of them to the parameter's dtype and device."""
    for parameter, entries in saved:
        live = optimizer.state[parameter]
        for name, value in entries.items():
            if name in HOST:
                live[name] = value.detach().cpu().clone()
            elif live[name].dtype != value.dtype:
                live[name] = value.to(live[name].device)


def check_entry(name: str, entry: Mapping[str, Any], shape: tuple[int, ...], sketched: bool) -> None:
    """Raise UsageError unless a saved entry belongs to this parameter. `shape`: of its moments."""
    missing = {"step", "exp_avg", "exp_avg_sq"} | ({"last_norm", "proj_seed"} if sketched else set())
    if missing := missing - entry.keys():
        raise UsageError(
            f"the saved state of parameter {name} has no {sorted(missing)[0]!r}: it was saved by another optimizer or "
            "with other parameter groups; build the optimizer as it was"
        )
    saved = tuple(entry["exp_avg"].shape)
    if saved != shape:
        raise UsageError(
            f"the saved state of parameter {name} has moments {list(saved)}, now they are {list(shape)}: the "
            "parameter's shape or its group changed; build model and optimizer as they were"
        )


# -- bytes -------------------------------------------------------------------------------------------------------------


def state_floats(method: str, shape: Sequence[int], rank: int = 1) -> int:
    """Numbers of state for one weight by the formulas of the paper (APOLLO, arXiv 2412.05270, table 1).

    Args:
        method: one of AdamW, SGD with momentum, Lion, GaLore, Fira, Flora, APOLLO, APOLLO-Mini.
        shape: of the weight, seen as a matrix [first, others]; with fewer than two dimensions it is AdamW's.
        rank: of the sketch, cut to the smaller side.

    Returns:
        How many numbers the optimizer keeps.

    Raises:
        UsageError: an unknown method.
    """
    check("method", method, one_of(*FORMULAS))
    if len(shape) < 2:
        return 2 * math.prod(shape) if method not in ("Lion", "SGD with momentum") else math.prod(shape)
    m, n = sorted((shape[0], math.prod(shape[1:])))
    return int(FORMULAS[method](m, n, min(rank, m)))


def optimizer_memory(model: nn.Module, optimizer: Any) -> dict[str, float]:
    """Bytes of state, from shapes alone and so before the first step.

    Args:
        model: that the optimizer trains.
        optimizer: an APOLLO, or groups as `apollo_param_groups` makes.

    Returns:
        "lowrank" (the sketched weights' share), "adamw" (that of the others), "total", and "vs_adamw": how many times
        more AdamW would keep for them in float32. An optimizer that has stepped adds "live", the bytes of its tensors.

    Raises:
        UsageError: groups without "rank", or parameters that are not of `model`.
    """
    known = {id(p) for p in model.parameters()}
    live = isinstance(optimizer, torch.optim.Optimizer)
    groups: Iterable[Mapping[str, Any]] = optimizer.param_groups if live else optimizer
    sizes = {"lowrank": 0, "adamw": 0}
    numbers = 0
    for group in groups:
        if "rank" not in group:
            raise UsageError("the groups have no 'rank': pass an APOLLO, or apollo_param_groups(model, rank=64)")
        for entry in group["params"]:
            p: Tensor = entry[1] if isinstance(entry, tuple) else entry
            if id(p) not in known:
                raise UsageError(f"the optimizer has a parameter of shape {list(p.shape)} that is not of this model")
            sketched = group["rank"] is not None and p.ndim > 1
            sizes["lowrank" if sketched else "adamw"] += _bytes_of(p, group)
            numbers += p.numel()
    total = sum(sizes.values())
    result: dict[str, float] = {**sizes, "total": total, "vs_adamw": 8 * numbers / max(1, total)}
    if live and optimizer.state:
        result["live"] = state_bytes(optimizer)
    return result


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps; quantised ones count what they hold inside.

    Args:
        optimizer: of any kind. The projector objects of galore-torch are looked into as well.

    Returns:
        Their sum.
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
