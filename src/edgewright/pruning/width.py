"""Width pruning of MLPs: keep the neurons with the largest mean norm, the same number in every block.

Source: Llama Guard 3-1B-INT4 (arXiv 2411.17713), after Minitron (arXiv 2407.14679). The neurons stay in their order, so
that keeping all of them is the identity, and the configuration stays one number (`intermediate_size`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.pruning.importance import Importance, MLPNames, check_prunable, decoder_layers


@torch.no_grad()
def prune_mlp_(
    model: nn.Module,
    width: int,
    stats: Importance | Sequence[Tensor],
    *,
    multiple: int = 1,
    names: MLPNames | None = None,
) -> tuple[Tensor, ...]:
    """Cut every MLP in place to its most important neurons.

    Args:
        model: a decoder of transformers.
        width: neurons that stay in each.
        stats: measured by `pruning.importance.collect`, or one score [F] a block.
        multiple: the quantisation group that the width must divide into.
        names: what the linear layers of an MLP are called; default: those of Llama.

    Returns:
        Indices of the neurons that stayed, ascending, int64 [width] a block.

    Raises:
        UsageError: a width that does not fit.
        Unsupported: MLPs that are not plain linear layers.
    """
    names = names or MLPNames()
    check_prunable(model, names)
    layers = decoder_layers(model)
    scores = stats.neurons if isinstance(stats, Importance) else tuple(stats)
    if len(scores) != len(layers):
        raise UsageError(f"the statistics are of {len(scores)} blocks, the model has {len(layers)}; measure it again")
    _check(layers, scores, width, multiple, names)
    kept = tuple(_top(score, width) for score in scores)
    for layer, index in zip(layers, kept, strict=True):
        for name in names.inputs:
            _slice_(layer.get_submodule(name), index, 0)
        _slice_(layer.get_submodule(names.down), index, 1)
        mlp: Any = layer.get_submodule(names.down.rpartition(".")[0])
        if hasattr(mlp, "intermediate_size"):
            mlp.intermediate_size = width
    config: Any = model.config
    config.intermediate_size = width
    return kept


def _check(layers: nn.ModuleList, scores: Sequence[Tensor], width: int, multiple: int, names: MLPNames) -> None:
    if multiple < 1 or width % multiple:
        raise UsageError(
            f"width={width} is not a multiple of {multiple}, the quantisation group; "
            f"use {max(width // max(multiple, 1), 1) * max(multiple, 1)}"
        )
    for index, (layer, score) in enumerate(zip(layers, scores, strict=True)):
        for name in (*names.inputs, names.down):
            if type(layer.get_submodule(name)) is not nn.Linear:
                raise Unsupported(
                    f"layer {name} of block {index} is a {type(layer.get_submodule(name)).__name__}; prune the float "
                    "model first, quantise it afterwards"
                )
        down: Any = layer.get_submodule(names.down)
        if not 1 <= width <= down.in_features:
            raise UsageError(f"width={width}: block {index} has {down.in_features} neurons; choose 1 to that many")
        if len(score) != down.in_features:
            raise UsageError(f"block {index} has {down.in_features} neurons, its statistics {len(score)}")


def _top(score: Tensor, width: int) -> Tensor:
    """Indices of the `width` largest, ascending; of equals the earlier stays."""
    return torch.sort(score, descending=True, stable=True).indices[:width].sort().values


def _slice_(module: nn.Module, index: Tensor, dim: int) -> None:
    """Keep some rows (dim 0) or columns (dim 1) of a linear layer."""
    assert isinstance(module, nn.Linear)
    index = index.to(module.weight.device)
    module.weight = nn.Parameter(module.weight.index_select(dim, index), requires_grad=module.weight.requires_grad)
    if dim == 1:
        module.in_features = len(index)
        return
    module.out_features = len(index)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias[index].clone(), requires_grad=module.bias.requires_grad)
