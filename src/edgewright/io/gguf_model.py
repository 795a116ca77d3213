"""A GGUF file as an ordinary transformers model: configuration, weights and tokenizer, ready to train or to save.

The header's claims are compared with the tensors that are there before a model is built, so a file cannot ask for
more memory than its own tensors take. Llama files store the rows of the query and key projections in the order that
rotates neighbouring pairs; transformers rotates halves, so the rows are put back (`unpermute`).
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edgewright.errors import FormatError, Unsupported
from edgewright.io.gguf import GGUFFile
from edgewright.io.gguf_tokenizer import gguf_tokenizer
from edgewright.io.gguf_types import Array

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """One decoder family. permuted: query and key rows lie in pair order. qkv_bias, head_norms: always present."""

    permuted: bool = False
    qkv_bias: bool = False
    head_norms: bool = False


# general.architecture, which is also the transformers model type.
FAMILIES = {"llama": Family(permuted=True), "qwen2": Family(qkv_bias=True), "qwen3": Family(head_norms=True)}

# GGUF block tensor -> module inside a transformers decoder layer.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
# Keys that change the arithmetic in a way the three families above do not have in transformers.
REFUSED_KEYS = ("expert_count", "attention.sliding_window", "attention.scale", "logit_scale")


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
    from transformers import AutoConfig

    family, prefix = _family(file)
    for key in REFUSED_KEYS:
        if file.metadata.get(f"{prefix}.{key}"):
            raise Unsupported(f"{file.path} sets {prefix}.{key}, which edgewright does not read")
    layers = _integer(file, "block_count", most=len(file.tensors))
    width = _integer(file, "embedding_length")
    heads = _integer(file, "attention.head_count")
    head_width = _integer(file, "attention.key_length", default=max(1, width // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := _integer(file, key, default=head_width)) != head_width:
            raise Unsupported(f"{file.path} has {prefix}.{key} = {other}, but heads of {head_width}")
    key_heads = _integer(file, "attention.head_count_kv", default=heads)
    if heads % key_heads or head_width % 2:
        raise FormatError(
            f"{file.path} has {heads} heads of width {head_width} with head_count_kv = {key_heads}; "
            "the width must be even and head_count_kv divide the heads"
        )
    special = {role: file.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "eot", "padding")}
    ends = list(dict.fromkeys(i for i in (special["eos"], special["eot"]) if i is not None))
    settings: dict[str, Any] = {
        "vocab_size": _shape(file, "token_embd.weight")[0],
        "hidden_size": width,
        "intermediate_size": _integer(file, "feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_width,
        "max_position_embeddings": _integer(file, "context_length"),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, head_width),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": special["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": special["padding"],
    }
    if not family.qkv_bias:
        settings["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
    config = AutoConfig.for_model(prefix, **settings)
    config.architectures = [f"{prefix.capitalize()}ForCausalLM"]
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
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = config or gguf_config(file)
    names = tensor_names(file, config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    permuted = _family(file)[0].permuted

    def read(name: str) -> Tensor:
        values = file.dequantize(name)
        part = name.split(".")[-2]
        if permuted and part in heads:
            values = unpermute(values, heads[part])
        return torch.from_numpy(np.ascontiguousarray(values)).to(device=device, dtype=dtype)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        state = dict(zip(names.values(), pool.map(read, names), strict=True))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config.dtype = dtype
    with torch.device("meta"):  # no memory and no random initialisation for weights that are replaced at once
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    # The rotary frequencies are the only values that are computed instead of stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model.eval()


def tensor_names(file: GGUFFile, config: PreTrainedConfig) -> dict[str, str]:
    """GGUF tensor name -> transformers parameter name, after checking that all are there with the right shape.

    Raises FormatError for a missing or misshapen tensor, Unsupported for one that the model has no place for.
    """
    names: dict[str, str] = {}
    for name, shape in _expected_shapes(file, config):
        if _shape(file, name) != shape:
            raise FormatError(f"{file.path} has tensor {name!r} of shape {_shape(file, name)} instead of {shape}")
        if name in TOP_NAMES:
            names[name] = TOP_NAMES[name]
        else:
            _, layer, part, suffix = name.split(".")
            names[name] = f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"
    for name in file.tensors:
        if name not in names and name != ROPE_FACTORS:
            raise Unsupported(
                f"{file.path} has the tensor {name!r}, which a {config.model_type} model has no place for"
            )
    return names


def unpermute(values: Array, heads: int) -> Array:
    """Rows [heads * width, ...] from pair order (a0 b0 a1 b1 ...) to half order (a0 a1 ... b0 b1 ...) in each head."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _expected_shapes(file: GGUFFile, config: PreTrainedConfig) -> list[tuple[str, tuple[int, ...]]]:
    family, _ = _family(file)
    width, inner, head_width = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head_width, config.num_key_value_heads * head_width
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (width,),
        "attn_q.weight": (queries, width),
        "attn_k.weight": (keys, width),
        "attn_v.weight": (keys, width),
        "attn_output.weight": (width, queries),
        "ffn_norm.weight": (width,),
        "ffn_gate.weight": (inner, width),
        "ffn_up.weight": (inner, width),
        "ffn_down.weight": (width, inner),
    }
    if family.head_norms:
        layer |= {"attn_q_norm.weight": (head_width,), "attn_k_norm.weight": (head_width,)}
    output_bias = getattr(config, "attention_bias", False)
    if family.qkv_bias or output_bias:
        layer |= {"attn_q.bias": (queries,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
    if output_bias:
        layer |= {"attn_output.bias": (width,)}
    expected = [("token_embd.weight", (config.vocab_size, width)), ("output_norm.weight", (width,))]
    if not config.tie_word_embeddings:
        expected.append(("output.weight", (config.vocab_size, width)))
    for index in range(config.num_hidden_layers):
        expected += [(f"blk.{index}.{name}", shape) for name, shape in layer.items()]
    return expected


def _family(file: GGUFFile) -> tuple[Family, str]:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise Unsupported(f"{file.path} has the architecture {str(name)[:40]!r}; known ones are {', '.join(FAMILIES)}")
    return FAMILIES[name], name


def _shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise FormatError(f"{file.path} has no tensor {name!r}")
    return file.tensors[name].shape


def _integer(file: GGUFFile, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
    key = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(key, default)
    if isinstance(value, list):
        raise Unsupported(f"{file.path} has a different {key} in each layer, which edgewright does not read")
    if type(value) is not int or not 1 <= value <= most:
        raise FormatError(f"{file.path} has {key} = {str(value)[:40]}, a whole number from 1 to {most} is needed")
    return value


def _number(file: GGUFFile, key: str, default: float | None = None) -> float:
    key = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(key, default)
    if type(value) is not float or not math.isfinite(value) or value <= 0:
        raise FormatError(f"{file.path} has {key} = {str(value)[:40]}, a positive number is needed")
    return float(str(np.float32(value)))  # 1e-05 rather than 9.999999747378752e-06: the same float32, readable in JSON


def _rope(file: GGUFFile, head_width: int) -> dict[str, Any]:
    """transformers' rope_parameters. Only unscaled, linear and Llama 3 scaling are read."""
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
    """Llama 3 files store one divisor for each frequency; find the published settings that give exactly these."""
    if _shape(file, ROPE_FACTORS) != (head_width // 2,):
        raise FormatError(
            f"{file.path} has {ROPE_FACTORS} of shape {_shape(file, ROPE_FACTORS)}, not {head_width // 2}"
        )
    stored = file.dequantize(ROPE_FACTORS).astype(np.float64)
    low, high, original = 1.0, 4.0, 8192
    factor = float(stored.max())
    periods = 2 * np.pi * base ** (np.arange(head_width // 2) / (head_width // 2))
    blend = np.clip((original / periods - low) / (high - low), 0.0, 1.0)
    # rtol: the file's float32 divisors were computed in float32 from a float32 base.
    if not np.allclose(stored, 1 / ((1 - blend) / factor + blend), rtol=1e-4):
        raise Unsupported(f"{file.path} has rotary divisors that are not Llama 3's, which edgewright does not read")
    return {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
