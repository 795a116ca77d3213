"""The bond between a model and its QuantOptimizer: parameter groups before training, packed layers after it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.io.own_forward import keeping_forward
from edgewright.io.packed import PackedConv2d, PackedEmbedding, PackedLinear, PackedTensor
from edgewright.quantization import shards
from edgewright.quantization.api import QUANTIZABLE, QUANTIZED
from edgewright.quantization.config import QuantConfig
from edgewright.systems.parq.lsbq import TargetConfig, Uniform
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.training import distributed
from edgewright.training.optimizer import decays

BINS = 81
REACH = 1.5  # of the outermost target


def quantized_groups(
    model: nn.Module,
    config: QuantConfig | Mapping[str, TargetConfig],
    *,
    weight_decay: float = 0.0,
    skip: tuple[str, ...] = ("*embed*", "*lm_head"),
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for a base optimizer: one for every kind of targets, the rest in a decayed and an undecayed one.

    Only weights of linear, embedding and convolution layers are selected, never a bias or a norm; a tied weight once,
    by the first of its names.

    Args:
        model: without fake-quantised layers.
        config: the QuantConfig that would also serve `quantize_` (its grids, granularities and scale rules are used),
            or {pattern of module names: LSBQ or Uniform}, where the first match wins.
        weight_decay: of selected weights and other matrices.
        skip: patterns of names that stay as they are, where `config` is a mapping.
        options: such as lr, for every group.

    Returns:
        Groups with "params" (pairs of name and parameter), "weight_decay" and, where quantised, "targets".

    Raises:
        UsageError: a pattern that matches nothing, a block size that does not divide a row, or nothing selected.
    """
    if any(isinstance(module, QUANTIZED) for module in model.modules()):
        raise UsageError("the model holds fake-quantised layers already; PARQ starts from a plain model")
    owners = {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}
    patterns = [rule.pattern for rule in config.rules] if isinstance(config, QuantConfig) else list(config)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in owners):
            some = ", ".join(list(owners)[:3]) or "none"
            raise UsageError(f"pattern {pattern!r} matches no linear, embedding or convolution layer, such as {some}")
    chosen: dict[nn.Parameter, TargetConfig] = {}
    for name, module in owners.items():
        targets = _targets_for(name, config, skip)
        if targets is None or not module.weight.requires_grad:
            continue
        shards.rows_columns(module.weight, module.weight, targets.granularity, f"layer {name}: ")
        chosen.setdefault(cast(nn.Parameter, module.weight), targets)
    if not chosen:
        skipped = config.skip if isinstance(config, QuantConfig) else skip
        raise UsageError(f"nothing is selected by {patterns} after leaving out {skipped}")
    groups: dict[Any, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = weight_decay if p in chosen or decays(name, p) else 0.0
        kind = chosen.get(p, decay)
        group = groups.setdefault(kind, {"params": [], "weight_decay": decay, **options})
        group["params"].append((name, p))
        if p in chosen:
            group["targets"] = chosen[p]
    return list(groups.values())


@torch.no_grad()
def convert_parq_(model: nn.Module, optimizer: QuantOptimizer) -> nn.Module:
    """Replace, in place, the layers that `optimizer` quantised by packed ones.

    Codes and scales are those of the optimizer's targets, so the packed weights are `hard_weights()` bit for bit; a
    weight that several layers share is packed once. Before `anneal_end` there is a UserWarning.

    Args:
        model: that was trained.
        optimizer: that trained it.

    Returns:
        The model.

    Raises:
        UsageError: targets without an integer grid (LSBQ of 2 bits or more, half3, half4).
        Unsupported: a parameter that is not the weight of a linear, embedding or convolution layer. Nothing is changed
            when something cannot be packed.
    """
    if (slope := optimizer.inverse_slope) > 0:
        warnings.warn(
            f"annealing ends at step {optimizer.prox.anneal_end}, this is step {optimizer.steps} with inverse slope "
            f"{slope:.3g}: the packed weights differ from those that the model computes with now",
            stacklevel=2,
        )
    layers: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    names = {p: name for name, p in model.named_parameters()}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QUANTIZABLE):
            layers.setdefault(cast(nn.Parameter, module.weight), []).append((name, module))
    packed: dict[nn.Parameter, PackedTensor] = {}
    hard = optimizer.hard_tensors()
    for group in optimizer.quantized_groups():
        for p in (p for p in group["params"] if p in hard):
            name = names.get(p, f"of shape {list(p.shape)}")
            if p not in layers:
                raise Unsupported(
                    f"parameter {name} is not the weight of a linear, embedding or convolution layer of the model and "
                    "cannot be packed; save the model under optimizer.hard_weights() instead"
                )
            packed[p] = _pack(name, p, group["targets"], hard[p], optimizer.targets[p].values)
    for p, tensor in packed.items():
        for name, module in layers[p]:
            layer = _layer(module, tensor).train(module.training)
            model.set_submodule(name, keeping_forward(module, layer))
    return model


@torch.no_grad()
def on_target(optimizer: QuantOptimizer) -> float:
    """Fraction of the quantised weights that are exactly on a target now, 0..1."""
    hits = total = 0
    for p, hard in optimizer.hard_tensors().items():
        hits += int((distributed.local(p) == hard).sum())
        total += hard.numel()
    return hits / max(total, 1)


@torch.no_grad()
def weight_histogram(optimizer: QuantOptimizer) -> Tensor:
    """Shares [BINS] of all quantised weights from -REACH to REACH, each in units of the outermost target of its row."""
    counts = torch.zeros(BINS)
    optimizer.hard_tensors()  # fits what has no targets yet
    for group in optimizer.quantized_groups():
        for p in (p for p in group["params"] if p in optimizer.targets):
            local = distributed.local(p)
            weights = local.reshape(shards.rows_columns(p, local, group["targets"].granularity))
            outermost = optimizer.targets[p].levels().abs().amax(1, keepdim=True)
            counts += torch.histc((weights / outermost).clamp(-REACH, REACH).float().cpu(), BINS, -REACH, REACH)
    return counts / counts.sum().clamp_min(1)


def _pack(name: str, p: Tensor, config: TargetConfig, hard: Tensor, values: Tensor) -> PackedTensor:
    """Codes [out, in] and scales [out, groups] of the hard values."""
    even = config.even
    if even is None or not even.grid:
        raise UsageError(
            f"the targets of {name} ({config.to_dict()}) have no integer grid and cannot be packed; refit to even "
            "levels: train on, or anew, with Uniform('seq2'), Uniform('int4') or LSBQ of 0 or 1 bits"
        )
    if distributed.is_split(p) or values.dtype != torch.float32:
        raise Unsupported(f"{name} is {values.dtype}, sharded or not: only whole float32 weights are packed")
    rows = 1 if p.ndim < 2 else p.shape[0]
    scales = values.reshape(-1, 1)
    units = hard.reshape(scales.shape[0], -1) / scales  # within rounding of the level that the weight is on
    offset = PackedTensor(hard, scales, even.grid).offset
    codes = (units - offset).round_().to(torch.int8).reshape(rows, -1)
    scales = scales.expand(rows, 1) if scales.shape[0] == 1 else scales.reshape(rows, -1)
    return PackedTensor(codes, scales.contiguous(), even.grid)


def _layer(module: nn.Module, packed: PackedTensor) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(packed, module.padding_idx, module.weight.dtype)
    if isinstance(module, nn.Conv2d):
        return PackedConv2d(packed, module)
    assert isinstance(module, nn.Linear)
    return PackedLinear(packed, module.bias)


def _targets_for(
    name: str, config: QuantConfig | Mapping[str, TargetConfig], skip: tuple[str, ...]
) -> TargetConfig | None:
    if isinstance(config, QuantConfig):
        rule = config.rule_for(name)
        return None if rule is None or rule.weight is None else Uniform.of(rule.weight)
    if any(fnmatchcase(name, pattern) for pattern in skip):
        return None
    return next((targets for pattern, targets in config.items() if fnmatchcase(name, pattern)), None)
