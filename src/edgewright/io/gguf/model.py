"""A GGUF file as an ordinary transformers model: configuration, weights and tokenizer, ready to train or to save.

The header's claims are compared with the tensors that are there before memory is taken, so a file cannot ask for more
than its own tensors take. Which tensor goes where is in `io.gguf_families`, the table that the writer uses too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edgewright.errors import EdgewrightError, FormatError, Unsupported, in_one_line
from edgewright.io.end_tokens import gguf_end_tokens
from edgewright.io.gguf.families import (
    BY_ARCHITECTURE,
    ROPE_FACTORS,
    ROPE_SETTINGS,
    Family,
    PlacedTensor,
    llama3_divisors,
    placed,
)
from edgewright.io.gguf.reader import GGUFFile
from edgewright.io.gguf.tokenizer import gguf_tokenizer
from edgewright.io.gguf.types import Array
from edgewright.io.quantized_folder import recompute_buffers
from edgewright.io.transformers_names import config_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

MOST_LAYERS = 1024  # as in `runtime.gguf_sizes`
PLUGINS = "edgewright_models"
# Keys that change the arithmetic in a way that only the families with these fields have.
REFUSED_KEYS = ("expert_count", "attention.sliding_window", "attention.scale", "logit_scale")
# What Llama 3 was published with, for files that hold the divisors alone.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def load_gguf(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model (evaluation mode) and tokenizer of a GGUF file.

    Raises FormatError for a broken file, Unsupported for an architecture, tokenizer or tensor type not known here.
    """
    file = GGUFFile(path)
    config = gguf_config(file)
    tokenizer = gguf_tokenizer(file)
    if len(tokenizer) > config.vocab_size:
        raise FormatError(f"{file.path} has {len(tokenizer)} tokens, but embeddings for {config.vocab_size}")
    return gguf_weights(file, config, dtype, device), tokenizer


def gguf_config(file: GGUFFile) -> PreTrainedConfig:
    """The transformers configuration that the metadata and tensor shapes describe."""
    family, prefix = _family(file)
    for key in REFUSED_KEYS:
        if key not in family.fields and file.metadata.get(f"{prefix}.{key}"):
            raise Unsupported(f"{file.path} sets {prefix}.{key}, which edgewright does not read")
    layers = _integer(file, "block_count", most=min(len(file.tensors), MOST_LAYERS))
    further = _further(file, family)
    width = _integer(file, "embedding_length")
    heads = further.get("num_attention_heads") or _integer(file, "attention.head_count")
    most_heads = max(heads) if isinstance(heads, list) else heads
    head_width = _integer(file, "attention.key_length", default=max(1, width // most_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := _integer(file, key, default=head_width)) != head_width:
            raise Unsupported(f"{file.path} has {prefix}.{key} = {other}, but heads of {head_width}")
    groups = further.get("num_key_value_heads") or _integer(file, "attention.head_count_kv", default=most_heads)
    if head_width % 2 or (isinstance(heads, int) and isinstance(groups, int) and heads % groups):
        raise FormatError(
            f"{file.path} has {heads} heads of width {head_width} with head_count_kv = {groups}; "
            "the width must be even and head_count_kv divide the heads"
        )
    special = {role: file.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "padding")}
    ends = gguf_end_tokens(file.metadata)
    settings: dict[str, Any] = {
        "vocab_size": _shape(file, "token_embd.weight")[0],
        "hidden_size": width,
        "intermediate_size": further.get("intermediate_size") or _integer(file, "feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_width,
        "max_position_embeddings": _integer(file, "context_length"),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, head_width),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": special["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": special["padding"],
    }
    for plugin in entry_points(group=PLUGINS, name=family.model_type):
        plugin.load()
    try:
        config: PreTrainedConfig = config_of(family.model_type, **(settings | further))
    except Unsupported:
        raise
    except Exception as error:  # transformers' checks of a configuration raise what their authors chose
        raise FormatError(f"{file.path} describes no {family.model_type} model: {in_one_line(error)}") from error
    config.architectures = [family.class_name]
    return config


def gguf_weights(
    file: GGUFFile,
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The causal language model of a checked GGUF file, its weights decoded to `dtype` on `device`.

    Besides the model itself, only the tensors being decoded are in memory.
    """
    from transformers import GenerationConfig

    config = config or gguf_config(file)
    config.dtype = dtype
    model = _empty(file, config)
    parts = _parts(file, model)

    def read(pieces: Sequence[PlacedTensor]) -> Tensor:
        values = [file.dequantize(piece.name) for piece in pieces]
        if pieces[0].heads:
            values = [unpermute(one, pieces[0].heads) for one in values]
        whole = np.ascontiguousarray(values[0] if len(values) == 1 else np.concatenate(values, axis=1))
        return torch.from_numpy(whole).to(device=device, dtype=dtype)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        state = dict(zip(parts, pool.map(read, parts.values()), strict=True))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    recompute_buffers(model, file.path)  # the rotary frequencies are computed instead of stored
    model.to(device)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model.eval()


def unpermute(values: Array, heads: int) -> Array:
    """Rows [heads * width, ...] from pair order (a0 b0 a1 b1 ...) to half order (a0 a1 ... b0 b1 ...) in each head."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _empty(file: GGUFFile, config: PreTrainedConfig) -> Any:
    """The model without memory and without random initialisation: its weights are put in at once."""
    from transformers import AutoModelForCausalLM

    for layer in range(config.num_hidden_layers):  # before a module is made for each of them
        if not any(f"blk.{layer}.{norm}.weight" in file.tensors for norm in ("attn_norm", "ffn_norm")):
            raise FormatError(f"{file.path} has no tensor 'blk.{layer}.attn_norm.weight'")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # sizes that no model has
        raise FormatError(f"{file.path} describes no {config.model_type} model: {in_one_line(error)}") from error


def _parts(file: GGUFFile, model: Any) -> dict[str, list[PlacedTensor]]:
    """Parameter -> the tensors of the file that hold it, after checking that all are there with the right shape.

    Raises FormatError for a missing or misshapen tensor, Unsupported for one that the model has no place for.
    """
    family, _ = _family(file)
    parts: dict[str, list[PlacedTensor]] = {}
    known = {ROPE_FACTORS}
    for one in placed(model, family, model.config.tie_word_embeddings):
        parameter = getattr(one.module, one.part.attribute, None)
        if parameter is None:
            continue
        shape = list(parameter.shape)
        if one.part.half is not None:
            shape[1] //= 2
        if _shape(file, one.name) != tuple(shape):
            raise FormatError(
                f"{file.path} has tensor {one.name!r} of shape {_shape(file, one.name)} instead of {tuple(shape)}"
            )
        parts.setdefault(one.parameter, []).append(one)
        known.add(one.name)
    for name in file.tensors:
        if name not in known:
            raise Unsupported(
                f"{file.path} has the tensor {name!r}, which a {model.config.model_type} model has no place for"
            )
    return parts


def _further(file: GGUFFile, family: Family) -> dict[str, Any]:
    """The settings that only this family has."""

    def header(key: str, kind: type, default: Any) -> Any:
        if kind is int:
            return _integer(file, key, default, least=0)
        if kind is float:
            return _number(file, key, default)
        value = file.metadata.get(f"{family.architecture}.{key}", default)
        if not isinstance(value, kind):
            raise FormatError(f"{file.path} has {key} = {str(value)[:40]}, a {kind.__name__} is needed")
        return value

    kinds = {"u32": int, "f32": float, "bool": bool}
    settings = {field: header(key, kinds[kind], None) for key, (kind, field) in family.fields.items()}
    try:
        return settings | family.read(header, set(file.tensors))
    except EdgewrightError as error:
        raise type(error)(f"{file.path}: {error}") from error


def _family(file: GGUFFile) -> tuple[Family, str]:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in BY_ARCHITECTURE:
        known = ", ".join(BY_ARCHITECTURE)
        raise Unsupported(f"{file.path} has the architecture {str(name)[:40]!r}; known ones are {known}")
    return BY_ARCHITECTURE[name], name


def _shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise FormatError(f"{file.path} has no tensor {name!r}")
    return file.tensors[name].shape


def _integer(file: GGUFFile, key: str, default: int | None = None, most: int = 2**31 - 1, least: int = 1) -> int:
    key = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(key, default)
    if isinstance(value, list):
        raise Unsupported(f"{file.path} has a different {key} in each layer, which edgewright does not read")
    if type(value) is not int or not least <= value <= most:
        raise FormatError(f"{file.path} has {key} = {str(value)[:40]}, a whole number from {least} to {most} is needed")
    return value


def _number(file: GGUFFile, key: str, default: float | None = None) -> float:
    key = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(key, default)
    if type(value) is not float or not math.isfinite(value) or value <= 0:
        raise FormatError(f"{file.path} has {key} = {str(value)[:40]}, a positive number is needed")
    return float(str(np.float32(value)))  # 1e-05 rather than 9.999999747378752e-06: the same float32, readable in JSON


def _rope(file: GGUFFile, head_width: int) -> dict[str, Any]:
    """Transformers' rope_parameters. Only unscaled, linear and Llama 3 scaling are read."""
    base = _number(file, "rope.freq_base", 10000.0)
    prefix = file.metadata["general.architecture"]
    kind = file.metadata.get(f"{prefix}.rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        return _llama3_rope(file, base, head_width)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": base}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": base, "factor": _number(file, "rope.scaling.factor")}
    raise Unsupported(f"{file.path} has rotary scaling {str(kind)[:40]!r}; only none, linear and Llama 3's are read")


def _llama3_rope(file: GGUFFile, base: float, head_width: int) -> dict[str, Any]:
    """Files store one divisor for each frequency; find settings that give exactly these: those that our files say, or
    the published ones.
    """
    if _shape(file, ROPE_FACTORS) != (head_width // 2,):
        raise FormatError(
            f"{file.path} has {ROPE_FACTORS} of shape {_shape(file, ROPE_FACTORS)}, not {head_width // 2}"
        )
    stored = file.dequantize(ROPE_FACTORS).astype(np.float64)
    settings = {**LLAMA3, "factor": float(stored.max()), **_said(file)}
    settings = {"rope_type": "llama3", "rope_theta": base, **settings}
    # rtol: the file's float32 divisors were computed in float32 from a float32 base.
    if not np.allclose(stored, llama3_divisors(settings, head_width), rtol=1e-4):
        raise Unsupported(f"{file.path} has rotary divisors that are not Llama 3's, which edgewright does not read")
    return settings


def _said(file: GGUFFile) -> dict[str, Any]:
    """Llama 3's four numbers as our own files say them; nothing in other files."""
    text = file.metadata.get(ROPE_SETTINGS)
    if text is None:
        return {}
    try:
        told = json.loads(text)
        numbers = {name: told[name] for name in (*LLAMA3, "factor")}
        if not all(type(one) in (int, float) and 0 < one < 1e12 for one in numbers.values()):
            raise ValueError("a positive number is needed")
        if not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
            raise ValueError("low_freq_factor must be below high_freq_factor")
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise FormatError(f"{file.path} has a damaged {ROPE_SETTINGS}: {in_one_line(error)}") from error
    return numbers
