"""What a config.json claims, held against the weights that lie beside it, before anything of that size is made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgewright.errors import FormatError
from edgewright.io.safetensors_header import SafetensorsEntry

FREE_LAYERS = 128  # so many, and so many parts of a layer, cost nothing to describe
FREE_NUMBERS = 64 << 20  # parameters and buffers that may be missing in the files
MOST_LABELS = 1 << 20
MOST_NUMBER = 1 << 40  # above every size in a configuration
_LAYERS = re.compile(r"(^|_)(layers?|blocks|depths?|stages?)$|^n_layers?$")
_COUNT = re.compile(r"^(num_hidden_layers|num_layers|n_layers?|(encoder|decoder)_layers)$")
_PARTS = re.compile(r"(^|_)(experts|levels|codebooks|groups|heads)(_|$)|^n_heads?$")


def check_numbers(path: Path, config: Mapping[str, Any], entries: Mapping[str, SafetensorsEntry]) -> None:
    """Raise FormatError where a configuration names more layers, parts or labels than its weights can have.

    Args:
        path: config.json, for the message.
        config: what it holds; tables within it are looked into.
        entries: tensors of all files of weights. Every layer has one, every expert or head one, or a row in one.
    """
    widest = max((max(entry.shape, default=0) for entry in entries.values()), default=0)
    limits = (
        (_LAYERS, max(len(entries), FREE_LAYERS), "layers"),
        (_PARTS, max(len(entries), widest, FREE_LAYERS), "parts of a layer"),
        (re.compile("^num_labels$"), MOST_LABELS, "labels"),
        (re.compile(""), MOST_NUMBER, "anything"),
    )
    for key, value in _numbers(config, 0, path):
        if value < 0 and _COUNT.search(key):
            raise FormatError(f"{path}: {key} is {value}; a model has 0 layers or more")
        for pattern, limit, what in limits:
            if pattern.search(key) and abs(value) > limit:
                raise FormatError(
                    f"{path}: {key[:60]} is {str(value)[:40]}, and its weights ({len(entries)} tensors, the widest of "
                    f"{widest}) allow at most {limit} {what}"
                )


def check_claim(folder: Path, factory: Any, entries: Mapping[str, SafetensorsEntry]) -> None:
    """Raise FormatError where the model of a folder's configuration is far larger than its files.

    The model is built without memory for its weights; what it takes is counted. Twice the size of the files passes,
    so that a tensor that is missing or of another shape is named by whoever loads them.

    What transformers raises over a configuration passes as it is: the caller stands around its other calls too.

    Args:
        folder: with config.json, which `check_numbers` has passed.
        factory: a class of transformers, or one of its Auto classes.
        entries: tensors of all files of weights.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    build = getattr(factory, "from_config", None) or factory._from_config
    with torch.device("meta"):
        model = build(config)
    check_size(folder / "config.json", model, entries)


def check_size(path: Path, model: nn.Module, entries: Mapping[str, SafetensorsEntry], packed: int = 1) -> None:
    """Raise FormatError where a model, on the meta device, is far larger than the files of its weights.

    packed: values of a weight that one stored number may hold.
    """
    tensors = {id(t): t.numel() for t in (*model.parameters(), *model.buffers())}
    claimed, held = sum(tensors.values()), packed * sum(math.prod(entry.shape) for entry in entries.values())
    if claimed > 2 * held + FREE_NUMBERS:
        raise FormatError(f"{path} describes a {type(model).__name__} of {claimed} numbers, its weights are {held}")


def _numbers(tree: Any, depth: int, path: Path, key: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number with the key that it stands under."""
    if depth > 64:
        raise FormatError(f"{path} is nested more deeply than any configuration")
    if isinstance(tree, bool):
        return
    if isinstance(tree, int):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _numbers(value, depth + 1, path, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _numbers(value, depth + 1, path, key)
