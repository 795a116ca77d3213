"""Packed binary encoders on disk: words, scales and thresholds in safetensors, beside the model's own config.json.

config.json is the model's plus the key "edgewright_bit": {"format": 1, "config": the BitConfig}. A reader builds the
encoder that config.json describes, applies the BitConfig, packs it, and fills in the stored tensors; every name, shape
and type must be the one that this gives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from edgewright.errors import FormatError, UsageError, in_one_line
from edgewright.io.atomic import atomic_directory
from edgewright.io.config_bounds import check_numbers, check_size
from edgewright.io.json_file import read_json
from edgewright.io.safetensors_header import SafetensorsEntry, check_safetensors
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.io.typed import from_json
from edgewright.systems.bit.linear import BinaryEmbedding, BinaryLinear, pack_binary_
from edgewright.systems.bit.model import FAMILIES, BitConfig, binarize_encoder_, elastic_quantizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEY = "edgewright_bit"
FORMAT = 1
WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_LAYERS = 1000
PACKED = 64  # weights in one stored word at most


def save_binary(
    model: nn.Module, config: BitConfig, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Write a packed model as a folder: config.json, model.safetensors.

    Args:
        model: that went through `binarize_encoder_(model, config)` and `pack_binary_`.
        config: what it was binarised by.
        folder: that does not exist, or is empty.
        tokenizer: written beside the model.

    Returns:
        The folder.

    Raises:
        UsageError: the model has no packed layer.
        OutputError: the folder cannot be written.
    """
    if not any(isinstance(module, BinaryLinear | BinaryEmbedding) for module in model.modules()):
        raise UsageError("the model has no packed binary layer; call pack_binary_(model) before save_binary")
    settings: Any = model.config
    description = {"architectures": [type(model).__name__], KEY: {"format": FORMAT, "config": config.to_dict()}}
    with atomic_directory(folder) as temporary:
        save_tensors(temporary / WEIGHTS, model.state_dict(), {"format": "pt"})
        text = json.dumps(json.loads(settings.to_json_string(use_diff=False)) | description, indent=1)
        (temporary / "config.json").write_text(text + "\n", "utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return Path(folder)


def load_binary(folder: str | Path, path: str = "auto") -> PreTrainedModel:
    """Load the packed model that `save_binary` wrote, in eval mode.

    Args:
        folder: of the model.
        path: how layers with binary inputs multiply, see `kernels.popcount.binary_linear`.

    Returns:
        The packed model.

    Raises:
        UsageError: the folder cannot be read.
        FormatError: its files contradict each other.
    """
    folder = Path(folder)
    settings, config = _description(folder)
    entries = check_safetensors(folder / WEIGHTS)
    check_numbers(folder / "config.json", settings, entries)
    model = _skeleton(folder, settings, entries)
    try:
        binarize_encoder_(model, config)
        for _, quantizer in elastic_quantizers(model):
            quantizer.calibrate(torch.ones(1))  # a stand-in: the stored scales replace it
        pack_binary_(model, path)
    except UsageError as error:
        raise FormatError(f"{folder}: its settings do not fit its model: {error}") from error
    expected = model.state_dict()
    stored = load_tensors(folder / WEIGHTS)
    for name in sorted({*expected, *stored}):
        should, there = (
            "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            for tensor in (expected.get(name), stored.get(name))
        )
        if should != there:
            raise FormatError(f"{folder}: {name[:80]} should be {should}, there is {there}")
        if stored[name].is_floating_point() and not torch.isfinite(stored[name]).all():
            raise FormatError(f"{folder}: {name} holds NaN or infinity")
    model.load_state_dict(stored)
    return model.eval()


def _description(folder: Path) -> tuple[dict[str, Any], BitConfig]:
    """(settings of the model, BitConfig) from config.json, checked."""
    path = folder / "config.json"
    settings = read_json(path, MAX_CONFIG_BYTES)
    found = settings.pop(KEY, None) if isinstance(settings, dict) else None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("config"), dict):
        raise FormatError(f"{path} has no {KEY!r} of format {FORMAT}; save_binary writes such folders")
    return settings, from_json(BitConfig, found["config"], path)


def _skeleton(folder: Path, settings: dict[str, Any], entries: dict[str, SafetensorsEntry]) -> Any:
    """The float model that config.json describes, with weights that do not matter."""
    names = settings.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    factory = getattr(transformers, name, None)
    if settings.get("model_type") not in tuple(FAMILIES) or not (
        isinstance(factory, type) and issubclass(factory, transformers.PreTrainedModel)
    ):
        raise FormatError(f"{folder} describes {name[:60]!r}, which is none of the encoders {', '.join(FAMILIES)}")
    layers = settings.get("num_hidden_layers", settings.get("n_layers"))
    if not isinstance(layers, int) or not 0 < layers <= min(MAX_LAYERS, len(entries)):
        raise FormatError(f"{folder} claims {layers!r} layers, but its weights are {len(entries)} tensors")
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "dtype", "torch_dtype")}
    try:
        model_config = AutoConfig.for_model(**kept)
        with torch.device("meta"):
            planned = factory(model_config)
    except Exception as error:  # a configuration from outside makes model classes raise whatever they like
        reason = in_one_line(error)
        raise FormatError(f"{folder}: its config.json does not describe a {name}: {reason}") from error
    check_size(folder / "config.json", planned, entries, packed=PACKED)
    return factory(model_config)
