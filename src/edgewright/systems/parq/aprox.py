"""The theory behind PARQ: its convex regulariser, the closed form of its proximal map, and AProx.

Targets 0 = q_0 < q_1 < ... < q_m (and their negatives) are the kinks of
    Psi(w) = sum over k < m of a_k * clamp(|w| - q_k, 0, q_(k+1) - q_k),   infinite beyond q_m,
which is the paper's maximum of affine pieces for slopes 0 <= a_0 < a_1 < ... < a_(m-1).
Source: PARQ (arXiv 2503.15748), sections 2 and 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from edgewright.errors import UsageError


def par_penalty(w: Tensor, q: Sequence[float], a: Sequence[float]) -> Tensor:
    """Psi of every element, shaped as `w`. q: q_0 = 0 < ... < q_m; a: the m slopes a_0 < ... < a_(m-1)."""
    check_penalty(q, a)
    size = w.abs()
    pieces = (slope * (size - low).clamp(0, high - low) for slope, low, high in _pieces(q, a))
    return torch.where(size <= q[-1], sum(pieces, torch.zeros_like(size)), math.inf)


def prox_par(u: Tensor, q: Sequence[float], a: Sequence[float], t: float = 1.0) -> Tensor:
    """Argmin over w of t Psi(w) + (w - u)^2 / 2, element by element, in closed form.

    |u| in [t a_(k-1) + q_k, t a_k + q_k] goes to q_k; between such plateaus the slope is 1 (a_(-1) = 0, a_m infinite).
    """
    check_penalty(q, a)
    size = u.abs()
    pieces = ((size - t * slope - low).clamp(0, high - low) for slope, low, high in _pieces(q, a))
    return sum(pieces, torch.zeros_like(size)).copysign(u)


class AProx(torch.optim.Optimizer):
    """u <- u - lr * gradient at w;  w <- prox of (sum of lr so far) * strength * Psi at u.

    The plateaus widen with every step, so the last iterate settles on targets; for convex losses its gap is bounded by
    G R (2 + 1.5 ln t) / sqrt(t) with lr = R / (2 G sqrt(t)). Latents and the sum are in `state` and the groups.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, q: Sequence[float], a: Sequence[float], strength: float = 1.0
    ) -> None:
        if lr <= 0 or strength < 0:
            raise UsageError(f"lr={lr} must be positive and strength={strength} at least 0")
        check_penalty(q, a)
        super().__init__(params, {"lr": lr, "q": tuple(q), "a": tuple(a), "strength": strength, "total_lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["total_lr"] += float(group["lr"])
            for p in (p for p in group["params"] if p.grad is not None):
                latent = self.state[p].setdefault("latent", p.clone())
                latent.sub_(p.grad, alpha=float(group["lr"]))
                p.copy_(prox_par(latent, group["q"], group["a"], group["total_lr"] * group["strength"]))
        return loss


def check_penalty(q: Sequence[float], a: Sequence[float]) -> None:
    """Raise UsageError unless targets and slopes make a convex penalty."""
    rising = all(low < high for low, high in itertools.pairwise(q))
    convex = all(low < high for low, high in itertools.pairwise(a))
    if len(q) < 2 or q[0] != 0 or not rising or len(a) != len(q) - 1 or a[0] < 0 or not convex:
        raise UsageError(
            f"targets q={list(q)} with slopes a={list(a)} are no penalty: q starts at 0, a has one slope less, "
            "both rise, and no slope is negative: for example q=(0, 1, 2), a=(0.5, 1.5)"
        )


def _pieces(q: Sequence[float], a: Sequence[float]) -> Iterable[tuple[float, float, float]]:
    return zip(a, q[:-1], q[1:], strict=True)
