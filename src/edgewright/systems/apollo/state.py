"""The state of APOLLO: tensors only, in float32, bfloat16 or 8 bits, and what a loaded state must be.

8 bits: blocks of 256 numbers, each with its largest magnitude as a float32 and codes into the dynamic-exponent map of
8-bit Adam (Dettmers et al., arXiv 2110.02861), signed for the mean and unsigned for the square.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.systems.apollo.sharded import local

KINDS = ("float32", "bfloat16", "8bit")
BLOCK = 256
SMALLEST = 4096  # numbers below which a state stays float32 in "8bit": it would save nothing
SCALE = "_scale"
HOST = ("step", "proj_seed")  # numbers that the host reads: they stay on the CPU, so that no step waits for a device


def state_kind(value: Any) -> str:
    """ "float32" (also None), "bfloat16" or "8bit", from that text or a torch dtype. Raises UsageError."""
    kind = "float32" if value is None else str(value).removeprefix("torch.")
    if kind not in KINDS:
        raise UsageError(f"state_dtype={value!r}: choose {', '.join(KINDS)}")
    return kind


@lru_cache(maxsize=2)
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the 8-bit dynamic exponent, ascending, float32, in [-1, 1] or [0, 1].

    Decade 10^(e - 6), e = 0..6, holds 2^e values (2^(e + 1) without a sign): the middles of equal parts of [0.1, 1].
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent if signed else exponent + 1) + 1)
        middles = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-value for value in middles] * signed
    return torch.tensor(sorted(values))


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 like `values`, scales float32 [blocks]) of float numbers: the nearest value of the map."""
    flat = values.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    table = dynamic_map(signed).to(values.device)
    unit = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: flat.numel()].view(values.shape), scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The float32 numbers that `encode` kept."""
    table = dynamic_map(signed).to(codes.device)
    values = table[codes.flatten().int()]
    padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    return (padded * scale.unsqueeze(1)).flatten()[: values.numel()].view(codes.shape)


def stored_dtype(kind: str, numbers: int, dtype: torch.dtype) -> torch.dtype:
    """Of the tensor in the state; float32 is float64 for float64 weights."""
    if kind == "8bit" and numbers >= SMALLEST:
        return torch.uint8
    return torch.bfloat16 if kind == "bfloat16" else torch.promote_types(dtype, torch.float32)


def add_moments(state: dict[str, Any], like: Tensor, kind: str) -> None:
    """Put zero moments shaped like the tensor `like` into a parameter's state."""
    dtype = stored_dtype(kind, like.numel(), like.dtype)
    for name in ("exp_avg", "exp_avg_sq"):
        if dtype == torch.uint8:
            state[name], state[name + SCALE] = encode(torch.zeros_like(like), name == "exp_avg")
        else:
            state[name] = torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)


def read(state: Mapping[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    """A moment in the dtype of the arithmetic: the tensor of the state itself where nothing need be converted."""
    if name + SCALE in state:
        return decode(state[name], state[name + SCALE], name == "exp_avg").to(dtype)
    return local(state[name]).to(dtype)


def write(state: Mapping[str, Any], name: str, value: Tensor) -> None:
    """Keep what `read` gave and a step changed."""
    if name + SCALE in state:
        codes, scale = encode(value, name == "exp_avg")
        state[name].copy_(codes)
        state[name + SCALE].copy_(scale)
    elif local(state[name]).data_ptr() != value.data_ptr():
        local(state[name]).copy_(value)


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
