"""Blocks of a decoder run one at a time: thresholds from the sparsified prefix, and TEAL's greedy allocation.

TEAL (arXiv 2408.14690): inside a block all layers start dense; the layer whose next step of sparsity moves the block's
output least takes it, until the parameter-weighted sparsity of the block is reached. Steps are inverse to the layers'
sizes, so that every step leaves out the same number of weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.measure.progress import ProgressBar
from edgewright.pruning.importance import decoder_layers
from edgewright.systems.r_sparse.calibration import Calibration, Tally, check_text, watched
from edgewright.systems.r_sparse.factors import Factors
from edgewright.systems.r_sparse.layer import RSparseLinear
from edgewright.systems.r_sparse.model import apply_rsparse, remove_rsparse, sparse_layers
from edgewright.systems.r_sparse.plan import (
    LayerPlan,
    Plan,
    RSparseConfig,
    layer_sizes,
    score_scales,
    target_layers,
    uniform_plan,
)


@dataclass
class Stream:
    """What enters the blocks for one batch: `hidden` [B, T, d] of the next block, keyword arguments of every block."""

    hidden: Tensor
    arguments: list[dict[str, Any]]

    def through(self, index: int, block: nn.Module) -> Tensor:
        """The block's output; the stream stays where it is."""
        out = block(self.hidden, **self.arguments[index])
        return out if isinstance(out, Tensor) else out[0]  # type: ignore[no-any-return]


def streams(model: nn.Module, batches: Iterable[Tensor]) -> list[Stream]:
    """Each batch before the first block."""
    layers = decoder_layers(model)
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        first: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def entering(
            _: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            first: list[Tensor] = first,
            arguments: list[dict[str, Any]] = arguments,
        ) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            if not first:
                first.append(hidden)
            arguments.append(rest)

        handles = [layer.register_forward_pre_hook(entering, with_kwargs=True) for layer in layers]
        try:
            base: Any = model.model
            base(input_ids=batch.to(device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        found.append(Stream(first[0], arguments))
    return found


@torch.no_grad()
def calibrate_sequential(
    model: nn.Module,
    batches: Iterable[Tensor],
    config: RSparseConfig,
    plan: Plan | None = None,
    *,
    factors: Factors | None = None,
    progress: bool = False,
) -> Calibration:
    """As `calibrate`, but every block is measured on what the sparsified blocks before it give it.

    The thresholds that follow fit this plan (default: the configuration's for every layer). The model is left as it
    was. deviation: the official code measures all layers on the dense model.
    """
    batches = list(batches)
    check_text(batches)
    layers = target_layers(model, config)
    plan = uniform_plan(layers, config) if plan is None else plan
    tally = Tally(score_scales(layers, config))
    factors = factors or Factors()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        flows = streams(model, batches)
        blocks = decoder_layers(model)
        with ProgressBar("calibrating", len(blocks), shown=progress) as bar:
            for index, block in enumerate(blocks):
                prefix = _name_of(model, block) + "."
                inside = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
                with watched(inside, tally):
                    dense = [flow.through(index, block) for flow in flows]
                if inside:
                    part = {name[len(prefix) :]: plan[name] for name in inside}
                    measured = {name[len(prefix) :]: tally.histograms[name] for name in inside}
                    local = dataclasses.replace(config, dense_prefill=False, path="reference")
                    apply_rsparse(block, local, Calibration(measured, 0, "", config.score), part, factors=factors)
                    dense = [flow.through(index, block) for flow in flows]
                    remove_rsparse(block)
                for flow, hidden in zip(flows, dense, strict=True):
                    flow.hidden = hidden
                bar.advance()
    finally:
        remove_rsparse(model)
        for module in training:
            module.training = True
    return tally.result(batches, config)


@torch.no_grad()
def teal_path(
    model: nn.Module,
    batches: Iterable[Tensor],
    config: RSparseConfig,
    stats: Calibration,
    sparsities: Sequence[float],
    *,
    step: float = 0.05,
    lazy: bool = True,
    progress: bool = False,
) -> dict[float, dict[str, LayerPlan]]:
    """Greedy plans at several sparsities from one ascent, rho = 1 throughout. Sparsity -> plan.

    step: of sparsity, for a layer of the block's mean size. A block's error is that of its output on the dense model's
    input, squared and summed over all tokens but the first. The model is left as it was.
    deviation: with lazy=True a layer is tried again only while its last known cost is the least; that is the same
    ascent as long as costs grow along the way, and takes fewer trials. lazy=False tries all at every step.
    """
    wanted = sorted(set(sparsities))
    if not wanted or not 0.0 <= wanted[0] <= wanted[-1] < 1.0 or not 0.0 < step < 1.0:
        raise UsageError(f"sparsities={list(sparsities)} must be in [0, 1) and step={step} in (0, 1)")
    layers = target_layers(model, config)
    sizes = layer_sizes(layers)
    free = dict.fromkeys(layers, LayerPlan(0.0))
    plans: dict[float, dict[str, LayerPlan]] = {s: {} for s in wanted}
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        flows = streams(model, batches)
        apply_rsparse(model, dataclasses.replace(config, dense_prefill=False, path="reference"), stats, free)
        blocks = decoder_layers(model)
        sparse = sparse_layers(model)
        with ProgressBar("allocating", len(blocks), shown=progress) as bar:
            for index, block in enumerate(blocks):
                prefix = _name_of(model, block) + "."
                inside = {name: layer for name, layer in sparse.items() if name.startswith(prefix)}
                targets = [flow.through(index, block) for flow in flows]  # thresholds below every score: dense
                if inside:
                    ascent = _Ascent(inside, sizes, stats, flows, targets, index, block, lazy)
                    for s in wanted:
                        plans[s] |= ascent.climb(s, step)
                    ascent.set(dict.fromkeys(inside, 0.0))
                for flow, hidden in zip(flows, targets, strict=True):
                    flow.hidden = hidden
                bar.advance()
        outside = {name: LayerPlan(0.0) for name in layers if not any(name in plan for plan in plans.values())}
    finally:
        remove_rsparse(model)
        for module in training:
            module.training = True
    return {s: {name: (plan | outside)[name] for name in layers} for s, plan in plans.items()}


def teal_greedy(
    model: nn.Module,
    batches: Iterable[Tensor],
    config: RSparseConfig,
    stats: Calibration,
    *,
    step: float = 0.05,
    progress: bool = False,
) -> dict[str, LayerPlan]:
    """TEAL's allocation of the configuration's sparsity inside each block; a plan for `apply_rsparse`."""
    path = teal_path(model, batches, config, stats, [config.sparsity], step=step, progress=progress)
    return path[config.sparsity]


class _Ascent:
    """The greedy climb inside one block, which can stop at a sparsity and go on."""

    def __init__(
        self,
        layers: dict[str, RSparseLinear],
        sizes: dict[str, int],
        stats: Calibration,
        flows: list[Stream],
        targets: list[Tensor],
        index: int,
        block: nn.Module,
        lazy: bool,
    ) -> None:
        self.lazy = lazy
        self.layers, self.stats, self.flows, self.targets = layers, stats, flows, targets
        self.index, self.block = index, block
        total = sum(sizes[name] for name in layers)
        self.share = {name: sizes[name] / total for name in layers}
        self.level = dict.fromkeys(layers, 0.0)
        self.costs = dict.fromkeys(layers, 0.0)  # growth of the error by the layer's next step, when last tried
        self.error = 0.0

    def climb(self, sparsity: float, step: float) -> dict[str, LayerPlan]:
        """Raise layers until the weighted mean is `sparsity`; the last step is cut to meet it."""
        while (missing := sparsity - self._mean()) > 1e-9:
            open_layers = [name for name, level in self.level.items() if level < self._most(name) - 1e-9]
            if not open_layers:
                raise UsageError(f"sparsity={sparsity} cannot be reached: every layer must read at least one channel")
            name, level = self._cheapest(open_layers, step, missing)
            self.level[name] = level
            self.set(self.level)
            self.error += self.costs[name]
        return {name: LayerPlan(level) for name, level in self.level.items()}

    def set(self, levels: dict[str, float]) -> None:
        for name, level in levels.items():
            self.layers[name].set(self.stats.threshold(name, level))

    def _cheapest(self, names: list[str], step: float, missing: float) -> tuple[str, float]:
        stale = set(names)
        levels = {
            name: min(self.level[name] + min(step / len(self.layers), missing) / self.share[name], self._most(name))
            for name in names
        }
        while True:
            name = min(names if self.lazy or not stale else stale, key=self.costs.__getitem__)
            if name not in stale:
                return name, levels[name]
            self.layers[name].set(self.stats.threshold(name, levels[name]))
            self.costs[name] = self._measure() - self.error
            self.layers[name].set(self.stats.threshold(name, self.level[name]))
            stale.remove(name)

    def _measure(self) -> float:
        error = 0.0
        for flow, target in zip(self.flows, self.targets, strict=True):
            difference = flow.through(self.index, self.block) - target
            error += float(difference[:, 1:].double().square().sum())
        return error

    def _mean(self) -> float:
        return sum(self.share[name] * level for name, level in self.level.items())

    def _most(self, name: str) -> float:
        """The highest sparsity that leaves one channel."""
        return 1.0 - 1.0 / self.layers[name].in_features


def _name_of(model: nn.Module, block: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is block)
