"""What a saved QuantOptimizer holds: the base optimizer's state, latents and targets beside it, and the settings.

The form is torch's own ({"state": {number: {name: tensor}}, "param_groups": [...]}, JSON values in the groups), so that
checkpoints of any kind hold it. A parameter's entry has its latent weights as "parq_latent", and as "parq_targets" the
levels or steps of its rows [rows, blocks a row, K]; both are DTensors where the parameter is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.quantization import shards
from edgewright.quantization.proximal import Targets

if TYPE_CHECKING:
    from edgewright.quantization.parq import QuantOptimizer

LATENT, TARGETS = "parq_latent", "parq_targets"


def saved_state(optimizer: QuantOptimizer) -> dict[str, Any]:
    """The state_dict; its tensors are the live ones, as in torch."""
    saved = optimizer.base.state_dict()
    entries = {index: dict(entry) for index, entry in saved["state"].items()}
    for index, (p, group) in enumerate(optimizer.numbered()):
        if p in optimizer.targets:
            entry = entries.setdefault(index, {})
            rows = shards.matrix_rows(p, group["targets"].granularity)
            values = optimizer.targets[p].values
            values = values.reshape(1 if rows == 1 else shards.local(p).shape[0], -1, values.shape[-1])
            entry[TARGETS] = shards.as_global(values, p, sharded=rows > 1)
            if p in optimizer.latents:
                entry[LATENT] = shards.as_global(optimizer.latents[p], p)
    groups = [dict(group) for group in saved["param_groups"]]
    for group in groups:
        if group.get("targets") is not None:
            group |= {"targets": group["targets"].to_dict(), "prox": optimizer.settings()}
    return {"state": entries, "param_groups": groups}


def load_state(optimizer: QuantOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Put a `saved_state` back, and the parameters to the values that the map gives for its latents.

    Nothing is changed when it does not fit: UsageError says what differs.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    configs = [group.get("targets") for group in optimizer.param_groups]
    _check_groups(optimizer, groups)
    ours: dict[int, dict[str, Tensor]] = {}
    rest: dict[Any, Any] = {}
    for index, entry in state_dict["state"].items():
        ours[index] = {key: entry[key] for key in (LATENT, TARGETS) if key in entry}
        if theirs := {key: value for key, value in entry.items() if key not in (LATENT, TARGETS)}:
            rest[index] = theirs
    done = next(group["quant_steps"] for group in groups if "quant_steps" in group)
    begun = done > optimizer.warmup_steps and optimizer.prox.starts_by(done - 1)
    for index, (p, group) in enumerate(optimizer.numbered()):
        if group.get("targets") is not None and p.requires_grad:
            _check_entry(index, p, ours.get(index, {}), done if begun else 0)
    for group in groups:
        group.pop("prox", None)
    optimizer.base.load_state_dict({"state": rest, "param_groups": groups})
    optimizer.link()
    for live, config in zip(optimizer.param_groups, configs, strict=True):
        if config is not None:
            live["targets"] = config
    optimizer.latents, optimizer.targets = {}, {}
    for index, (p, group) in enumerate(optimizer.numbered()):
        entry, local = ours.get(index, {}), shards.local(p)
        if TARGETS in entry:
            values = shards.local(entry[TARGETS]).to(local.device, local.dtype, copy=True)
            optimizer.targets[p] = Targets(values.reshape(-1, values.shape[-1]), group["targets"].ladder)
        if LATENT in entry:
            optimizer.latents[p] = torch.empty_like(local).copy_(shards.local(entry[LATENT]))
            optimizer.map_(p, optimizer.latents[p], group, optimizer.prox, done - 1, local)


def _check_groups(optimizer: QuantOptimizer, groups: list[dict[str, Any]]) -> None:
    if len(groups) != len(optimizer.param_groups):
        counts = f"{len(groups)} parameter groups, this one {len(optimizer.param_groups)}"
        raise UsageError(f"the saved optimizer has {counts}; build it as it was")
    for index, (saved, live) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        config = live.get("targets")
        if config is not None and "quant_steps" not in saved:
            raise UsageError("the saved optimizer is a bare one without latent weights: it cannot go on as PARQ")
        was, now = saved.get("targets"), None if config is None else config.to_dict()
        if was != now:
            raise UsageError(f"group {index} was saved with targets {was}, now they are {now}; use the same")
        if config is not None and saved.get("prox") != optimizer.settings():
            raise UsageError(f"saved with {saved.get('prox')}, now {optimizer.settings()}; use the same settings")


def _check_entry(index: int, p: nn.Parameter, entry: Mapping[str, Tensor], begun: int) -> None:
    """`begun`: steps done, where the map was at work; 0 where there need not be latents yet."""
    missing = LATENT not in entry or TARGETS not in entry
    if missing and begun:
        raise UsageError(f"parameter {index} has no latent weights in the saved optimizer, which did {begun} steps")
    if LATENT in entry and (missing or entry[LATENT].shape != p.shape):
        raise UsageError(f"parameter {index} was saved as {list(entry[LATENT].shape)}, now it is {list(p.shape)}")
