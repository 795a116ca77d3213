"""Optimizers for a backbone and its tables: clipped separately, and tables updated only where a token came by.

The official code of STEM (arXiv 2601.10639) runs two AdamW, each clipped by a norm of its own. Under AdamW, weight
decay shrinks a row at every step, also in the thousands between two uses of a rare token; lazy updates leave it be.
deviation: moments, decay and the count for the bias correction of a lazy row move only in steps that have its token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.systems.stem.layer import table_weights
from edgewright.systems.stem.rows import RowTable
from edgewright.training.optimizer import parameter_groups


def stem_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    lazy: bool = True,
) -> list[dict[str, Any]]:
    """Groups for `StemAdamW`: the backbone, split as `fit` splits it, and the tables. Each is clipped by itself."""
    tables = [weight for _, weight in table_weights(model)]
    held = {id(weight) for weight in tables}
    backbone = [p for p in model.parameters() if id(p) not in held]
    groups = parameter_groups(model, weight_decay, [{"params": backbone}])
    for group in groups:
        group |= {"lr": learning_rate, "clip_norm": clip_norm, "part": "backbone", "lazy": False}
    trained = [weight for weight in tables if weight.requires_grad]
    if trained:
        shared = {"lr": learning_rate, "clip_norm": clip_norm, "part": "tables", "lazy": lazy}
        groups.append({"params": trained, "weight_decay": weight_decay, **shared})
    return groups


class StemAdamW(torch.optim.Optimizer):
    """AdamW over `stem_groups`; use it with `TrainConfig(clip_norm=None)`, since it clips each part itself.

    Groups of the same `part` share one norm. A lazy group takes dense gradients, whose rows of zeros count as unseen,
    or sparse ones (`StemConfig(sparse_grad=True)`); the same holds for the store's `RowAdamW`.
    """

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> None:
        fields = {"lr": 0.0, "weight_decay": 0.0, "clip_norm": None, "part": "", "lazy": False}
        super().__init__([dict(group) for group in groups], {**fields, "betas": betas, "eps": eps})
        self.norms: dict[str, float] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        scales = self._clip()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = _lazy if group["lazy"] else _dense
                    update(parameter, parameter.grad, self.state[parameter], group, scales[group["part"]])
        return loss

    def _clip(self) -> dict[str, float]:
        """Part -> factor of its gradients."""
        squares: dict[str, Tensor | float] = {}
        limits: dict[str, float | None] = {}
        for group in self.param_groups:
            limits[group["part"]] = group["clip_norm"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    values = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
                    square = torch.linalg.vector_norm(values.float()).square()
                    squares[group["part"]] = squares.get(group["part"], 0.0) + square
        self.norms = {part: math.sqrt(float(square)) for part, square in squares.items()}
        return {part: clip_factor(norm, limits[part]) for part, norm in self.norms.items()}


def clip_factor(norm: float, limit: float | None) -> float:
    """What brings a gradient of that norm down to the limit."""
    return 1.0 if limit is None or norm <= limit else limit / (norm + 1e-6)


def _dense(p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], scale: float) -> None:
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    if not state:
        state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "step": torch.zeros(())}
    state["step"] += 1
    adamw(p, gradient * scale, state["m"], state["v"], state["step"], group)


def _lazy(p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], scale: float) -> None:
    if not state:  # memory that is never touched is never taken
        state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "count": torch.zeros(len(p), device=p.device)}
    if gradient.is_sparse:
        whole = gradient.coalesce()
        ids, values = _nonzero(whole.indices()[0], whole.values())
    else:
        ids = (gradient != 0).any(1).nonzero().squeeze(1)
        values = gradient[ids]
    rows, m, v = p[ids], state["m"][ids], state["v"][ids]
    state["count"][ids] += 1
    adamw(rows, values * scale, m, v, state["count"][ids].unsqueeze(1), group)
    p[ids], state["m"][ids], state["v"][ids] = rows, m, v


def adamw(p: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: Tensor, group: Mapping[str, Any]) -> None:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) in place; step: the number of this update, one or one a row."""
    first, second = group["betas"]
    p.mul_(1 - group["lr"] * group["weight_decay"])
    m.lerp_(gradient, 1 - first)
    v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    denominator = (v / (1 - second**step)).sqrt_().add_(group["eps"])
    p.sub_(m / denominator * (group["lr"] / (1 - first**step)))


class Moments:
    """First and second moments and counts of the rows of one table that were ever trained; grows with them."""

    def __init__(self, count: int, width: int) -> None:
        self.slot_of = torch.full((count,), -1, dtype=torch.int64)
        self.m, self.v = torch.zeros(0, width), torch.zeros(0, width)
        self.count, self.used = torch.zeros(0), 0

    def slots(self, ids: Tensor) -> Tensor:
        """Places of distinct ids, made where there are none."""
        new = ids[self.slot_of[ids] < 0]
        while self.used + len(new) > len(self.m):
            more = max(256, len(self.m))
            self.m, self.v = (torch.cat([x, x.new_zeros(more, x.shape[1])]) for x in (self.m, self.v))
            self.count = torch.cat([self.count, torch.zeros(more)])
        self.slot_of[new] = torch.arange(self.used, self.used + len(new))
        self.used += len(new)
        return self.slot_of[ids]

    def ids(self) -> Tensor:
        return (self.slot_of >= 0).nonzero().squeeze(1)

    def state(self, ids: Tensor) -> dict[str, Tensor]:
        slots = self.slots(ids)
        return {"m": self.m[slots], "v": self.v[slots], "count": self.count[slots]}


class RowAdamW:
    """The lazy AdamW of a store: gradients gathered by layer and row, applied together, clipped by one norm."""

    def __init__(
        self,
        learning_rate: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        clip_norm: float | None = 1.0,
    ) -> None:
        if learning_rate < 0 or weight_decay < 0:
            raise UsageError(f"learning_rate={learning_rate}, weight_decay={weight_decay}; give numbers from 0 up")
        self.group: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        self.clip_norm = clip_norm
        self.moments: dict[int, Moments] = {}
        self.pending: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def gather(self, layer: int, ids: Tensor, gradient: Tensor) -> None:
        self.pending.setdefault(layer, []).append((ids, gradient.detach().to("cpu", torch.float32)))

    def apply(
        self, tables: Mapping[int, RowTable], write: Callable[[int, Tensor, Tensor], None], learning_rate: float | None
    ) -> float:
        """Update the rows of `tables` through `write`; the norm before clipping."""
        group = self.group if learning_rate is None else self.group | {"lr": learning_rate}
        gradients = {layer: _summed(parts) for layer, parts in sorted(self.pending.items())}
        self.pending = {}
        norm = math.sqrt(sum(float(g.square().sum(dtype=torch.float64)) for _, g in gradients.values()))
        scale = clip_factor(norm, self.clip_norm)
        for layer, (ids, gradient) in gradients.items():
            rows = tables[layer].read(ids).float()  # a copy of its own
            kept = self.moments.setdefault(layer, Moments(tables[layer].count, tables[layer].format.width))
            slots = kept.slots(ids)
            kept.count[slots] += 1
            m, v = kept.m[slots], kept.v[slots]
            adamw(rows, gradient * scale, m, v, kept.count[slots].unsqueeze(1), group)
            kept.m[slots], kept.v[slots] = m, v
            write(layer, ids, rows)
        return norm

    def reset(self) -> None:
        self.moments, self.pending = {}, {}

    def restore(self, layer: int, state: Mapping[str, Tensor], count: int) -> None:
        """What `EmbeddingStore.state_dict` kept of a layer with `count` rows."""
        ids = state["ids"]
        kept = Moments(count, state["m"].shape[1])
        self.moments[layer] = kept
        slots = kept.slots(ids)
        kept.m[slots], kept.v[slots], kept.count[slots] = state["m"], state["v"], state["count"]


def _nonzero(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Without the rows that predicted nothing, such as a text's last token."""
    seen = (gradient != 0).any(1)
    return ids[seen], gradient[seen]


def _summed(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(ids ascending, gradient) with the contributions to a row added in the order in which they came."""
    ids, places = torch.unique(torch.cat([ids for ids, _ in parts]), return_inverse=True)
    total = torch.zeros(len(ids), parts[0][1].shape[1])
    total.index_add_(0, places, torch.cat([gradient for _, gradient in parts]))
    return _nonzero(ids, total)
