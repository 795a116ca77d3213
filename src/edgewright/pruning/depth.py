"""Depth pruning: leave out the blocks that change the residual stream least (ShortGPT, arXiv 2403.03853).

What is left is an ordinary model of its class with fewer layers: saved and loaded by transformers, its cache works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from edgewright.errors import UsageError
from edgewright.pruning.importance import Importance, MLPNames, check_prunable, decoder_layers

Measure = Callable[[nn.Module], Importance]


def prune_depth_(
    model: nn.Module,
    layers: int | None = None,
    stats: Importance | None = None,
    *,
    keep: Sequence[int] | None = None,
    protect: Sequence[int] = (0, -1),
    iterative: Measure | None = None,
    names: MLPNames | None = None,
) -> tuple[int, ...]:
    """Cut the model in place to some of its blocks.

    Args:
        model: a decoder of transformers.
        layers: how many blocks stay, those of highest importance.
        stats: measured by `pruning.importance.collect`.
        keep: the blocks that stay, in place of `layers` and `stats`.
        protect: blocks that stay whatever their importance (our choice: first and last); negative ones count from the
            end.
        iterative: a function that measures a model; then one block goes at a time and the rest is measured again (our
            choice; the published cut is made at once from `stats`).
        names: what the linear layers of an MLP are called; default: those of Llama.

    Returns:
        Indices of the blocks that stayed, ascending.

    Raises:
        UsageError: more blocks than there are, none, or too few to hold the protected ones.
    """
    check_prunable(model, names or MLPNames())
    count = len(decoder_layers(model))
    if keep is not None:
        kept = _checked(keep, count)
    else:
        kept = _by_importance(model, count, layers, stats, protect, iterative)
    keep_layers_(model, kept)
    return kept


def lowest_blocks(stats: Importance, layers: int, protect: Sequence[int] = (0, -1)) -> tuple[int, ...]:
    """The blocks to keep, ascending: all but the least important that are not protected; of equals the later goes."""
    scores = stats.blocks
    count = len(scores)
    safe = {index % count for index in protect}
    if layers < len(safe):
        raise UsageError(f"layers={layers} cannot hold the {len(safe)} protected blocks; protect=() protects none")
    free = sorted((i for i in range(count) if i not in safe), key=lambda i: (float(scores[i]), -i))
    dropped = set(free[: count - layers])
    return tuple(i for i in range(count) if i not in dropped)


def keep_layers_(model: nn.Module, kept: Sequence[int]) -> None:
    """Keep some blocks, renumber them for the cache, and write their number into the configuration."""
    layers = decoder_layers(model)
    count = len(layers)
    base: Any = model.model
    base.layers = nn.ModuleList(layers[i] for i in kept)
    for index, layer in enumerate(base.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config: Any = model.config
    for key, value in list(config.to_dict().items()):  # per-layer lists, such as layer_types
        if isinstance(value, list) and len(value) == count and "layer" in key:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


def _by_importance(
    model: nn.Module,
    count: int,
    layers: int | None,
    stats: Importance | None,
    protect: Sequence[int],
    iterative: Measure | None,
) -> tuple[int, ...]:
    if layers is None or not 1 <= layers <= count:
        raise UsageError(f"layers={layers}: the model has {count} blocks; choose a number from 1 to {count}")
    if iterative is None:
        if stats is None:
            raise UsageError("prune_depth_ needs stats=collect(model, batches), or keep=(0, 1, ...)")
        if len(stats.cosines) != count:
            raise UsageError(f"the statistics are of {len(stats.cosines)} blocks, the model has {count}")
        return lowest_blocks(stats, layers, protect)
    whole = list(decoder_layers(model))
    kept = list(range(count))
    safe = {index % count for index in protect}
    base: Any = model.model
    try:
        while len(kept) > layers:
            places = [place for place, index in enumerate(kept) if index in safe]
            chosen = lowest_blocks(iterative(model), len(kept) - 1, places)
            kept = [kept[place] for place in chosen]
            base.layers = nn.ModuleList(whole[i] for i in kept)  # measured without a cache: indices may have gaps
    finally:
        base.layers = nn.ModuleList(whole)
    return tuple(kept)


def _checked(keep: Sequence[int], count: int) -> tuple[int, ...]:
    kept = tuple(keep)
    if not kept:
        raise UsageError("keep is empty: at least one block must stay")
    if list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < count:
        raise UsageError(f"keep={list(kept)}: ascending indices from 0 to {count - 1}, each once, are allowed")
    return kept
