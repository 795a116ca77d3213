"""The kinds of layer that systems bring to the decoder, by name: the one table in which the core names systems.

A module of the table is imported when a configuration asks for its kind, so that the decoder depends on no system.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from edgewright.errors import UsageError
from edgewright.io.typed import from_json

if TYPE_CHECKING:
    from edgewright.models.decoder.config import EdgeDecoderConfig

# kind of layer, which is also the field of EdgeDecoderConfig with its settings -> module, class of settings, of layer
LAYERS = {
    "longhorn": ("edgewright.systems.longhorn.layer", "LonghornConfig", "Longhorn"),
    "moe": ("edgewright.systems.mobilemoe.layer", "MoEConfig", "SparseMoE"),
    "stem": ("edgewright.systems.stem.layer", "StemConfig", "StemFeedForward"),
}
# kind of layer -> module and function (loss, model, optimizer) -> loss, where training needs more than the loss
OBJECTIVES = {"moe": ("edgewright.systems.mobilemoe.training", "balanced_loss")}
# first word of a shape's name -> module and function (name, layer_sharing, **changes) -> EdgeDecoderConfig
PRESETS = {
    "moe": ("edgewright.systems.mobilemoe.design", "mobilemoe_config"),
    "": ("edgewright.systems.mobilellm.presets", "mobilellm_config"),
}


def new_layer(kind: str, config: EdgeDecoderConfig, *sizes: int) -> nn.Module:
    """A layer of that kind.

    Args:
        kind: one of LAYERS.
        config: of the decoder; its field of that name has the settings of the layer.
        sizes: what the class takes before its settings, such as the hidden size.

    Raises:
        UsageError: the settings have a field that the kind does not know, or a value of a wrong type.
    """
    module, settings, layer = LAYERS[kind]
    source = import_module(module)
    return getattr(source, layer)(*sizes, _settings(getattr(source, settings), kind, config))


def objective(config: EdgeDecoderConfig, loss: Any, model: nn.Module, optimizer: Any) -> Any:
    """The loss function to train a decoder of that configuration with: `loss`, or one that a kind of layer needs."""
    assert isinstance(config.ffn_types, list)
    for kind, (module, function) in OBJECTIVES.items():
        if kind in config.ffn_types:
            loss = getattr(import_module(module), function)(loss, model, optimizer)
    return loss


def preset(name: str, layer_sharing: bool = False, **changes: Any) -> EdgeDecoderConfig:
    """The configuration of a published shape, such as "125M", "r1-140M" or "moe-S".

    Args:
        name: of the shape.
        layer_sharing: every stored block runs twice in a row.
        changes: fields of the configuration to set otherwise.

    Raises:
        UsageError: there is no such shape.
    """
    module, function = PRESETS.get(name.partition("-")[0], PRESETS[""])
    return getattr(import_module(module), function)(name, layer_sharing, **changes)


def _settings(kind: type[Any], name: str, config: EdgeDecoderConfig) -> Any:
    given = getattr(config, name) or {}
    if unknown := sorted(given.keys() - {field.name for field in dataclasses.fields(kind)}):
        known = ", ".join(field.name for field in dataclasses.fields(kind))
        raise UsageError(f"{name} has {unknown[0]!r}, which is none of {known}")
    return from_json(kind, given, f"{name} of EdgeDecoderConfig", UsageError)
