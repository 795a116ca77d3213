"""Folders of models with a cut output layer: an ordinary checkpoint of the base model, the kept rows beside it.

    config.json, model.safetensors   the decoder without its head, float or quantised, as `edgewright.load` reads it
    pruned_head.json                 class of the whole model, kept token ids, vocabulary, expand, grid
    pruned_head.safetensors          "weight", or "codes" and "step"; "bias" where there is one
The cut head has no place in the class from transformers, so the folder does not pretend to be a causal model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.export.huggingface import save_quantized
from edgewright.io.atomic import atomic_directory
from edgewright.io.json_file import read_object
from edgewright.io.models import load
from edgewright.io.packed import CODE_RANGES, PackedEmbedding, PackedLinear, PackedTensor
from edgewright.io.quantized_folder import CODE_BITS
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.pruning.unembedding import PrunedHead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DESCRIPTION, ROWS = "pruned_head.json", "pruned_head.safetensors"


def save_checkpoint(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write an ordinary checkpoint, whole or not at all: packed layers keep their codes, floats are as transformers
    saves them. `edgewright.load` reads both. Raises OutputError.
    """
    if any(isinstance(module, PackedLinear | PackedEmbedding) for module in model.modules()):
        return save_quantized(model, tokenizer, folder)
    with atomic_directory(folder) as temporary:
        _save_float(model, tokenizer, temporary)
    return Path(folder)


def save_cut(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write a model that went through `prune_unembedding_`, whole or not at all; `load_cut` gives the same bits.

    Quantised inputs of layers are not part of the folder. Raises UsageError for an uncut model, OutputError.
    """
    head: Any = getattr(model, "lm_head", None)
    if not isinstance(head, PrunedHead):
        raise UsageError("the model's head is whole; call prune_unembedding_(model, ids) first, or save_pretrained")
    rows: Any = head.rows
    grid = rows.grid if isinstance(rows, PackedLinear) else None
    tensors = {"codes": rows.codes, "step": rows.step} if grid else {"weight": rows.weight.detach()}
    if rows.bias is not None:
        tensors["bias"] = rows.bias.detach()
    description = {
        "class": type(model).__name__,
        "kept_ids": head.kept_ids.tolist(),
        "vocabulary": head.vocabulary,
        "expand": head.expand,
        "grid": grid,
    }
    base: Any = model.model
    folder = Path(folder)
    with atomic_directory(folder) as temporary:
        save_checkpoint(base, tokenizer, temporary)
        save_tensors(temporary / ROWS, tensors)
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return folder


def is_cut(folder: str | Path) -> bool:
    """Whether a folder holds a model with a cut head."""
    return (Path(folder) / DESCRIPTION).is_file()


def load_cut(folder: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer that `save_cut` wrote. Raises FormatError for a folder that contradicts itself."""
    import transformers

    folder = Path(folder)
    description = _description(folder)
    factory = getattr(transformers, description["class"], None)
    if not (isinstance(factory, type) and issubclass(factory, transformers.PreTrainedModel)):
        raise FormatError(f"{folder} names the model class {description['class'][:60]!r}, not one of transformers")
    head = _head(folder, description)
    base, tokenizer = load(folder)
    config: Any = base.config
    if head.vocabulary != config.vocab_size:
        raise FormatError(f"{folder}: the cut head is for {head.vocabulary} tokens, the model has {config.vocab_size}")
    width = head.rows.in_features
    if width != config.hidden_size:
        raise FormatError(f"{folder}: the cut head reads {width} features, the model gives {config.hidden_size}")
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model: Any = factory(config)
    if not isinstance(getattr(model, "model", None), type(base)):
        raise FormatError(f"{folder}: a {description['class']} does not hold a {type(base).__name__}")
    model.model, model.lm_head = base, head
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        raise FormatError(f"{folder}: a {description['class']} has more than a decoder and a head")
    return model.eval(), tokenizer


def _save_float(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one file, written in a moment
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def _head(folder: Path, description: dict[str, Any]) -> PrunedHead:
    tensors = load_tensors(folder / ROWS)
    kept = torch.tensor(description["kept_ids"])
    bias, grid = tensors.get("bias"), description["grid"]
    rows: Any
    try:
        if grid is not None:
            rows = PackedLinear(PackedTensor(tensors["codes"], tensors["step"], grid), bias)
        else:
            rows = _linear(tensors["weight"], bias)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:  # no such tensor, or of another kind
        raise FormatError(f"{folder / ROWS} lacks the rows of the cut head: {error}") from error
    if rows.out_features != len(kept):
        raise FormatError(f"{folder}: {rows.out_features} rows for {len(kept)} kept tokens")
    return PrunedHead(rows, kept, description["vocabulary"], expand=description["expand"])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer  # type: ignore[no-any-return]


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    data = read_object(path, hint="save_cut(model, tokenizer, folder) writes it")
    kept, vocabulary = data.get("kept_ids"), data.get("vocabulary")
    fits = (
        isinstance(kept, list)
        and type(vocabulary) is int
        and kept == sorted(set(token for token in kept if type(token) is int and 0 <= token < vocabulary))
        and kept
        and isinstance(data.get("class"), str)
        and isinstance(data.get("expand"), bool)
        and "grid" in data
        and (data["grid"] is None or (isinstance(data["grid"], str) and data["grid"] in CODE_RANGES))
    )
    if not fits:
        raise FormatError(f"{path} must have class, ascending kept_ids below vocabulary, expand, and a known grid")
    return data


def shipped_bytes(model: nn.Module) -> int:
    """Bytes as stored on a device: codes at their width, steps and floats at 16 bits, shared tables once."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedEmbedding) and module.codes.data_ptr() not in seen:
            seen.add(module.codes.data_ptr())
            total += module.codes.numel() * CODE_BITS[module.grid] // 8 + 2 * module.step.numel()
    return total + 2 * sum(parameter.numel() for parameter in model.parameters())
