"""The state of APOLLO: tensors only, in float32 or bfloat16, and what a loaded state must be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.systems.apollo.sharded import local

KINDS = ("float32", "bfloat16")
HOST = ("step", "proj_seed")  # numbers that the host reads: they stay on the CPU, so that no step waits for a device


def state_kind(value: Any) -> str:
    """ "float32" (also None) or "bfloat16", from that text or a torch dtype. Raises UsageError."""
    kind = "float32" if value is None else str(value).removeprefix("torch.")
    if kind not in KINDS:
        raise UsageError(f"state_dtype={value!r}: choose {' or '.join(KINDS)}")
    return kind


def stored_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """Of the tensor in the state; float32 is float64 for float64 weights."""
    return torch.bfloat16 if kind == "bfloat16" else torch.promote_types(dtype, torch.float32)


def add_moments(state: dict[str, Any], like: Tensor, kind: str) -> None:
    """Put zero moments shaped like the tensor `like` into a parameter's state."""
    for name in ("exp_avg", "exp_avg_sq"):
        dtype = stored_dtype(kind, like.dtype)
        state[name] = torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)


def read(state: Mapping[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    """A moment in the dtype of the arithmetic: the tensor of the state itself where nothing need be converted."""
    return local(state[name]).to(dtype)


def write(state: Mapping[str, Any], name: str, value: Tensor) -> None:
    """Keep what `read` gave and a step changed."""
    stored = local(state[name])
    if stored.data_ptr() != value.data_ptr():
        stored.copy_(value)


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
    found = tuple(entry["exp_avg"].shape)
    if found != shape:
        raise UsageError(
            f"the saved state of parameter {name} has moments {list(found)}, now they are {list(shape)}: the "
            "parameter's shape or its group changed; build model and optimizer as they were"
        )
