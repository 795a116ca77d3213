"""Optimizers for a backbone and its tables, clipped separately, and tables shared out between processes.

The official code of STEM (arXiv 2601.10639) runs two AdamW, each clipped by a norm of its own. Under AdamW, weight
decay shrinks a row at every step, also in the thousands between two uses of a rare token; lazy updates leave it be.
deviation: moments, decay and the count for the bias correction of a lazy row move only in steps that have its token.

Shared out, each process holds some of the columns of every row. Every process of a group gathers the distinct tokens of
all, looks its columns up, and an exchange gives each process its own rows whole; gradients go the same way back. The
layout is torchtitan's: a DeviceMesh with dimensions "dp" and "stem", tables as DTensors sharded over "stem", everything
else the same everywhere.

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "stem"))
    shard_tables(model, mesh)
    ...; loss.backward(); sync_gradients(model, mesh); optimizer.step()

deviation: tokens are made distinct before they are gathered, and the division by the number of processes, which the
official code does in the exchange, is done once, in `training.distributed.sync_gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from edgewright.checks import check, number
from edgewright.errors import UsageError
from edgewright.systems.stem.layer import stem_blocks, table_weights
from edgewright.training.distributed import is_split, local, split
from edgewright.training.optimizer import parameter_groups


def stem_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    lazy: bool = True,
) -> list[dict[str, Any]]:
    """Groups for `StemAdamW`: the backbone, split as `fit` splits it, and the tables.

    Args:
        model: an edge decoder with STEM layers.
        learning_rate: of both parts, as published.
        weight_decay: of the tables and of the backbone's matrices.
        clip_norm: of each part by itself, as in the official code; None clips nothing.
        lazy: rows of tables move only in steps that have their token; False is the published AdamW.

    Returns:
        Two groups of the backbone, with and without decay, and one of the tables that are trained, if there are any.

    Raises:
        UsageError: the model has no STEM layers.
    """
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
    """AdamW (arXiv 1711.05101) over `stem_groups`; with `TrainConfig(clip_norm=None)`, since it clips each part itself.

    Groups of the same `part` share one norm, which `norms` holds after a step. In a lazy group rows whose gradient is
    zero throughout count as unseen.

    Args:
        groups: of `stem_groups`, or dicts with "params" and any of lr, weight_decay, clip_norm, part and lazy.
        betas: decay of the first and second moments; the defaults are the paper's.
        eps: added to the root of the second moment.
    """

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> None:
        fields = {"lr": 0.0, "weight_decay": 0.0, "clip_norm": None, "part": "", "lazy": False}
        super().__init__([dict(group) for group in groups], {**fields, "betas": betas, "eps": eps})
        self.norms: dict[str, float] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One update; returns the loss of `closure` where one is given, which computes it and its gradients."""
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
                    square = torch.linalg.vector_norm(parameter.grad.float()).square()
                    squares[group["part"]] = squares.get(group["part"], 0.0) + square
        self.norms = {part: math.sqrt(float(square)) for part, square in squares.items()}
        return {part: clip_factor(norm, limits[part]) for part, norm in self.norms.items()}


def clip_factor(norm: float, limit: float | None) -> float:
    """What brings a gradient of that norm down to the limit."""
    return 1.0 if limit is None or norm <= limit else limit / (norm + 1e-6)


def _dense(p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], scale: float) -> None:
    if not state:
        state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "step": torch.zeros(())}
    state["step"] += 1
    adamw(p, gradient * scale, state["m"], state["v"], state["step"], group)


def _lazy(p: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], scale: float) -> None:
    if not state:
        state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "count": torch.zeros(len(p), device=p.device)}
    ids = (gradient != 0).any(1).nonzero().squeeze(1)
    p[ids] = _updated(p[ids], gradient[ids] * scale, ids, state, group)


def _updated(rows: Tensor, gradient: Tensor, ids: Tensor, state: Mapping[str, Tensor], group: Any) -> Tensor:
    """Rows [n, width] of distinct ids after their own next step; state: "m", "v" and "count" of the whole table."""
    m, v = state["m"][ids], state["v"][ids]
    state["count"][ids] += 1
    adamw(rows, gradient, m, v, state["count"][ids].unsqueeze(1), group)
    state["m"][ids], state["v"][ids] = m, v
    return rows


def adamw(p: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: Tensor, group: Mapping[str, Any]) -> None:
    """AdamW in place; step: the number of this update, one or one a row."""
    first, second = group["betas"]
    p.mul_(1 - group["lr"] * group["weight_decay"])
    m.lerp_(gradient, 1 - first)
    v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    denominator = (v / (1 - second**step)).sqrt_().add_(group["eps"])
    p.sub_(m / denominator * (group["lr"] / (1 - first**step)))


class RowAdamW:
    """The lazy AdamW of a store: gradients gathered by layer and row, applied together, clipped by one norm.

    Args:
        learning_rate: where `EmbeddingStore.step` is given none.
        weight_decay: of the rows that a step touches.
        betas: decay of the first and second moments; the defaults are the paper's.
        eps: added to the root of the second moment.
        clip_norm: of all gradients of a step together; None clips nothing.

    Raises:
        UsageError: a negative rate or decay.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        clip_norm: float | None = 1.0,
    ) -> None:
        check("learning_rate", learning_rate, number(0))
        check("weight_decay", weight_decay, number(0))
        self.group: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        self.clip_norm = clip_norm
        self.states: dict[int, dict[str, Tensor]] = {}
        self.pending: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def gather(self, layer: int, ids: Tensor, gradient: Tensor) -> None:
        """Keep the gradient [U, f] of rows of distinct ids for the next `apply`."""
        self.pending.setdefault(layer, []).append((ids, gradient.detach().to("cpu", torch.float32)))

    def apply(
        self, tables: Mapping[int, Any], write: Callable[[int, Tensor, Tensor], None], learning_rate: float | None
    ) -> float:
        """Update the rows of `tables` through `write`; the norm before clipping."""
        group = self.group if learning_rate is None else self.group | {"lr": learning_rate}
        gradients = {layer: _summed(parts) for layer, parts in sorted(self.pending.items())}
        self.pending = {}
        norm = math.sqrt(sum(float(g.square().sum(dtype=torch.float64)) for _, g in gradients.values()))
        scale = clip_factor(norm, self.clip_norm)
        for layer, (ids, gradient) in gradients.items():
            table = tables[layer]
            state = self.states.setdefault(layer, _row_states(table.count, table.format.width))
            write(layer, ids, _updated(table.read(ids).float(), gradient * scale, ids, state, group))
        return norm

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Layer -> "ids" of the rows that were ever trained, ascending, with their "m", "v" and "count"."""
        saved = {}
        for layer, state in self.states.items():
            ids = state["count"].nonzero().squeeze(1)
            saved[str(layer)] = {"ids": ids, **{name: values[ids] for name, values in state.items()}}
        return saved

    def load_state_dict(self, states: Mapping[str, Mapping[str, Tensor]], counts: Mapping[int, int]) -> None:
        """Put such states back in place of those that are here; counts: rows of each layer's table."""
        self.states, self.pending = {}, {}
        for layer, saved in states.items():
            state = self.states[int(layer)] = _row_states(counts[int(layer)], saved["m"].shape[1])
            for name, values in state.items():
                values[saved["ids"]] = saved[name]


def _row_states(count: int, width: int) -> dict[str, Tensor]:
    """Zeros from NumPy, which take memory only where they are written; torch's take it at once."""
    shapes = {"m": (count, width), "v": (count, width), "count": (count,)}
    return {name: torch.from_numpy(np.zeros(shape, np.float32)) for name, shape in shapes.items()}


def _summed(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(ids ascending, gradient), contributions to a row added in the order in which they came, without rows of zeros,
    which predicted nothing, such as a text's last token.
    """
    ids, places = torch.unique(torch.cat([ids for ids, _ in parts]), return_inverse=True)
    total = torch.zeros(len(ids), parts[0][1].shape[1])
    total.index_add_(0, places, torch.cat([gradient for _, gradient in parts]))
    seen = (total != 0).any(1)
    return ids[seen], total[seen]


class ShardedLookup:
    """[B, T] tokens of this process -> [B, T, f], from columns that lie in all processes of the group."""

    def __init__(self, table: nn.Module, mesh: DeviceMesh) -> None:
        self.table, self.group = table, mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()

    def __call__(self, input_ids: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_to_all_single

        ids, places = torch.unique(input_ids, return_inverse=True)
        counts = [torch.zeros(1, dtype=torch.int64, device=ids.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(ids)], device=ids.device), group=self.group)
        numbers = [int(count) for count in counts]
        padded = F.pad(ids, (0, max(numbers) - len(ids)))
        gathered = [torch.empty_like(padded) for _ in numbers]
        dist.all_gather(gathered, padded, group=self.group)
        everyone = torch.cat([part[:number] for part, number in zip(gathered, numbers, strict=True)])
        columns = F.embedding(everyone, local(self.table.weight, gradient=True))  # [sum of numbers, f / size]
        received = columns.new_empty(len(ids) * self.size, columns.shape[1])
        received = all_to_all_single(received, columns, [len(ids)] * self.size, numbers, group=self.group)
        rows = received.view(self.size, len(ids), -1).transpose(0, 1).reshape(len(ids), -1)
        return F.embedding(places, rows)


def shard_tables(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leave this process its columns of every table, in place.

    Args:
        model: an edge decoder with STEM layers; the first process of each group gives its tables to the others.
        mesh: with the dimensions "dp" and "stem".

    Returns:
        The model.

    Raises:
        UsageError: a mesh without these dimensions, rows that do not divide among the processes of "stem", or tables
            that are quantised, offloaded or sharded already.
    """
    if mesh.mesh_dim_names is None or not {"dp", "stem"} <= set(mesh.mesh_dim_names):
        raise UsageError(
            f"the mesh has dimensions {mesh.mesh_dim_names}; sharded tables need ('dp', 'stem'), for example "
            "init_device_mesh('cpu', (1, 2), mesh_dim_names=('dp', 'stem'))"
        )
    group, layers = mesh["stem"], stem_blocks(model)
    for block, layer in layers.items():
        if layer.intermediate % group.size():
            raise UsageError(
                f"layer {block}: rows of {layer.intermediate} values do not divide among {group.size()} processes "
                "of stem"
            )
        if type(layer.table) is not nn.Embedding or layer.lookup is not None:
            raise UsageError(
                f"the table of layer {block} is quantised, offloaded or sharded already; shard a plain one"
            )
    for layer in layers.values():
        table: Any = layer.table
        table.weight = nn.Parameter(split(table.weight, group, 1), requires_grad=table.weight.requires_grad)
        layer.lookup = ShardedLookup(table, group)
    return model


def sharded_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters for an optimizer, tables apart: torch's fused updates do not mix DTensors with plain ones."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if is_split(p) == sharded]} for sharded in (False, True)]
