"""The small network, its gradients and the cases that the processes of Distributed Lion's tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import EdgewrightError

STEPS, LR, DECAY = 4, 0.01, 0.1
SHAPES = {"embed": (9, 4), "weight": (7, 13), "bias": (3,), "scalar": (1,), "absent": (5,), "sometimes": (6,)}
CASES = [
    (world, aggregate, topology, zero, reply)
    for world in (2, 3, 4)
    for aggregate in ("mavo", "avg")
    for topology in ("two_phase", "all_gather")
    for zero in ("auto", "alternate")
    for reply in (("bits", "int8") if aggregate == "avg" and topology == "two_phase" else ("bits",))
]


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def gradient(name: str, step: int, rank: int) -> Tensor | None:
    """None everywhere for "absent", on some for "sometimes"; most rows of "embed" are zero, some on this rank only."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + len(name))
    value = torch.randn(SHAPES[name], generator=generator)
    if name == "absent" or (name == "sometimes" and (rank + step) % 2):
        return None
    if name == "embed":
        value[rank + 1 :] = 0
    if name == "bias":
        value[1] = 0.0
    return value


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(12, 6), nn.Flatten(), nn.Linear(18, 17), nn.Tanh(), nn.Linear(17, 12))


def rows(step: int, rank: int) -> Tensor:
    return torch.randint(0, 12, (4, 4), generator=torch.Generator().manual_seed(100 * step + rank))


def backward(network: nn.Module, step: int, rank: int) -> None:
    data = rows(step, rank)
    for parameter in network.parameters():
        parameter.grad = None
    F.cross_entropy(network(data[:, :3]), data[:, 3]).backward()


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except EdgewrightError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
