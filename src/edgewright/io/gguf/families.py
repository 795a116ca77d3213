"""How a decoder family lies in a GGUF file: one table for the writer (`export.gguf`) and the reader (`io.gguf_model`).

| model_type of transformers | architecture | rows of q and k | beside Llama's tensors |
|---|---|---|---|
| llama | llama | pairs | biases, where there are any |
| qwen2 | qwen2 | halves | biases |
| qwen3 | qwen3 | halves | norms of heads |
| granite_swa | granite_swa | pairs | attention sinks; window and its pattern |
| glm4_moe | glm4moe | halves | router, its bias, experts, a shared expert |
| edgewright_decoder | deci | pairs | nothing where a layer has no attention; heads and widths by layer |

The last is the decoder of this package where no class of transformers saves what its shape saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, Unsupported

Metadata = dict[str, tuple[str, Any]]
Header = Callable[[str, type, Any], Any]  # (key without the architecture, type, default) -> checked value
SIGMOID = 2  # llama.cpp's number for the router's function

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
# Ours: the settings behind ROPE_FACTORS as JSON, where they are Llama 3's. llama.cpp does not read it.
ROPE_SETTINGS = "edgewright.rope-parameters"
# Keys that every family has: key -> (type in GGUF, field of the configuration).
COMMON_FIELDS = {
    "block_count": ("u32", "num_hidden_layers"),
    "context_length": ("u32", "max_position_embeddings"),
    "embedding_length": ("u32", "hidden_size"),
    "feed_forward_length": ("u32", "intermediate_size"),
    "attention.head_count": ("u32", "num_attention_heads"),
    "attention.head_count_kv": ("u32", "num_key_value_heads"),
    "attention.layer_norm_rms_epsilon": ("f32", "rms_norm_eps"),
}


@dataclass(frozen=True)
class TensorPart:
    """A tensor inside a block. path: of its module; attribute: of the parameter; half: 0 or 1 where the file keeps the
    first or the second half of the rows [E, rows, columns] of every matrix under this name.
    """

    path: str
    attribute: str = "weight"
    half: int | None = None

    def select(self, stack: Tensor) -> Tensor:
        """The part of a stack [E, rows, columns] that is meant."""
        if self.half is None:
            return stack
        rows = stack.shape[1] // 2
        return stack[:, self.half * rows : (self.half + 1) * rows]


@dataclass(frozen=True)
class Family:
    """How a family is written and read.

    permuted: query and key rows lie in pair order. parts: tensor name -> what it holds; names without a suffix stand
    for .weight and, where there is one, .bias. fields: key of the header -> (type in GGUF, field of the configuration),
    both ways. write: further keys of a configuration; read: further settings of a header.
    """

    model_type: str
    architecture: str
    class_name: str
    permuted: bool = False
    parts: dict[str, str | TensorPart] = field(default_factory=lambda: dict(LAYER_NAMES))
    fields: dict[str, tuple[str, str]] = field(default_factory=dict)
    write: Callable[[Any], Metadata] = lambda config: {}
    read: Callable[[Header, set[str]], dict[str, Any]] = lambda header, tensors: {}


@dataclass(frozen=True)
class PlacedTensor:
    """A parameter of a model and its place in the file. heads: how many heads' rows are in pair order, 0 for none."""

    name: str
    path: str
    module: nn.Module
    heads: int
    part: TensorPart
    whole: bool = False  # the family names this very parameter, whatever holds it

    @property
    def parameter(self) -> str:
        return f"{self.path}.{self.part.attribute}"


def placed(model: Any, family: Family, tied: bool) -> Iterator[PlacedTensor]:
    """The parameters of a model in file order; tied: the head is the embedding's table and has no tensor of its own."""
    for name, parameter in TOP_NAMES.items():
        path, attribute = parameter.rsplit(".", 1)
        if name != "output.weight" or not tied:
            yield PlacedTensor(name, path, model.get_submodule(path), 0, TensorPart(path, attribute))
    for index, layer in enumerate(model.model.layers):
        for name, given in family.parts.items():
            part = TensorPart(given) if isinstance(given, str) else given
            try:
                module: Any = layer.get_submodule(part.path)
            except AttributeError:
                continue
            full, place = f"model.layers.{index}.{part.path}", f"blk.{index}.{name}"
            if "." in name:  # one parameter by its full name
                yield PlacedTensor(place, full, module, 0, part, whole=True)
                continue
            permuted = name in ("attn_q", "attn_k") and family.permuted
            heads = int(module.out_features) // head_width(model.config) if permuted else 0
            for attribute in ("weight", "bias"):
                if attribute == "weight" or getattr(module, attribute, None) is not None:
                    yield PlacedTensor(f"{place}.{attribute}", full, module, heads, TensorPart(part.path, attribute))


def head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def pair_order(rows: int, heads: int) -> Tensor:
    """Row order of query and key matrices in llama files: the halves of each head interleaved (a0 b0 a1 b1 ...)."""
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def llama3_divisors(rope: dict[str, Any], width: int) -> np.ndarray[Any, Any]:
    """Llama 3 scaling as llama.cpp wants it: float32 [width / 2], a divisor for each rotary frequency."""
    turns = rope["original_max_position_embeddings"] / (
        2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float64) / width)
    )
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32)


def _bias_settings(header: Header, tensors: set[str]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in tensors}


def _llama_settings(header: Header, tensors: set[str]) -> dict[str, Any]:
    return {**_bias_settings(header, tensors), "mlp_bias": "blk.0.ffn_gate.bias" in tensors}


def _qwen3_keys(config: Any) -> Metadata:
    if getattr(config, "attention_bias", False):
        raise Unsupported("qwen3 with attention_bias cannot be written as GGUF: llama.cpp gives its output no bias")
    return {}


def _granite_keys(config: Any) -> Metadata:
    thetas = set(getattr(config, "layer_rope_theta", None) or [])
    if thetas - {config.rope_parameters["rope_theta"]}:
        raise Unsupported("rotary bases that differ by layer (layer_rope_theta) cannot be written as GGUF here")
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    return {"attention.sliding_window_pattern": ("[bool]", windows)}


def _granite_settings(header: Header, tensors: set[str]) -> dict[str, Any]:
    layers = header("block_count", int, None)
    pattern = header("attention.sliding_window_pattern", list, None)
    if len(pattern) != layers or not all(isinstance(one, bool) for one in pattern):
        raise FormatError(f"its sliding_window_pattern has no truth value for each of {layers} layers")
    settings = _llama_settings(header, tensors)
    width = header("attention.key_length", int, 0) or 1
    scale = header("attention.scale", float, None)
    if np.float32(scale) == np.float32(width**-0.5):  # the value that was meant, before it became a float32
        settings["attention_multiplier"] = width**-0.5
    kinds = ["sliding_attention" if one else "full_attention" for one in pattern]
    theta = header("rope.freq_base", float, 10000.0)
    return settings | {"layer_types": kinds, "layer_rope_theta": [theta] * layers}


def _glm_keys(config: Any) -> Metadata:
    if config.first_k_dense_replace or getattr(config, "num_mtp_layers", 0) or config.n_group != 1:
        raise Unsupported("dense first layers, prediction layers and groups of experts cannot be written as GGUF here")
    return {
        "expert_gating_func": ("u32", SIGMOID),
        "leading_dense_block_count": ("u32", 0),
        "nextn_predict_layers": ("u32", 0),
    }


def _glm_settings(header: Header, tensors: set[str]) -> dict[str, Any]:
    for key, allowed in (
        ("expert_gating_func", (SIGMOID,)),
        ("leading_dense_block_count", (0,)),
        ("nextn_predict_layers", (0,)),
        ("expert_group_count", (0, 1)),
    ):
        value = header(key, int, allowed[0])
        if value not in allowed:
            raise Unsupported(f"{key} = {value} is not read for glm4moe, only {allowed[0]}")
    settings = _bias_settings(header, tensors)
    return settings | {
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_mtp_layers": 0,
        "partial_rotary_factor": 1.0,
    }


def _deci_keys(config: Any) -> Metadata:
    """Sizes by layer; 0 heads where attention is skipped."""
    layers = range(config.num_hidden_layers)
    if list(config.share_map) != list(layers) or set(config.mixers) - {"full_attention", "skip_attention"}:
        raise Unsupported("shared blocks and mixers other than full attention have no place in GGUF; see for_gguf")
    if set(config.ffn_types) != {"mlp"} or config.qk_norm != "none" or config.qkv_bias or config.rope_interleaved:
        raise Unsupported("only plain feed-forwards and plain heads in halves can be written as GGUF from here")
    attends = [mixer == "full_attention" for mixer in config.mixers]
    heads, groups, widths = (
        [config.of_layer(name, i) for i in layers]
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    )
    return {
        "attention.head_count": ("[u32]", [n * on for n, on in zip(heads, attends, strict=True)]),
        "attention.head_count_kv": ("[u32]", [n * on for n, on in zip(groups, attends, strict=True)]),
        "feed_forward_length": ("[u32]", widths),
    }


def _deci_settings(header: Header, tensors: set[str]) -> dict[str, Any]:
    layers = header("block_count", int, None)
    keys = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    heads, groups, widths = (header(key, list, None) for key in keys)
    for key, values in zip(keys, (heads, groups, widths), strict=True):
        if len(values) != layers or not all(type(one) is int and 0 <= one < 2**31 for one in values):
            raise FormatError(f"{key} does not hold a whole number for each of {layers} layers")
    if [bool(one) for one in heads] != [bool(one) for one in groups] or not any(heads):
        raise Unsupported("a layer with heads but without keys (linear attention of DeciLM) is not read")
    mixers = ["full_attention" if count else "skip_attention" for count in heads]
    first = next(i for i, count in enumerate(heads) if count)
    # a layer without attention has no heads in the file; any valid number makes the same model
    heads, groups = ([one or values[first] for one in values] for values in (heads, groups))
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": widths}
    return {"mixers": mixers} | {key: one[0] if len(set(one)) == 1 else one for key, one in sizes.items()}


_EXPERTS: dict[str, str | TensorPart] = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp.weight": TensorPart("mlp.gate"),
    "exp_probs_b.bias": TensorPart("mlp.gate", "e_score_correction_bias"),
    "ffn_gate_exps.weight": TensorPart("mlp.experts", "gate_up_proj", 0),
    "ffn_up_exps.weight": TensorPart("mlp.experts", "gate_up_proj", 1),
    "ffn_down_exps.weight": TensorPart("mlp.experts", "down_proj"),
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_ATTENTION = {name: path for name, path in LAYER_NAMES.items() if not name.startswith("ffn_")}

_FAMILIES = (
    Family("llama", "llama", "LlamaForCausalLM", permuted=True, read=_llama_settings),
    Family("qwen2", "qwen2", "Qwen2ForCausalLM"),
    Family("qwen3", "qwen3", "Qwen3ForCausalLM", write=_qwen3_keys),
    Family(
        "granite_swa",
        "granite_swa",
        "GraniteSWAForCausalLM",
        permuted=True,
        parts={**LAYER_NAMES, "attn_sinks.weight": TensorPart("self_attn", "sinks")},
        fields={
            "logit_scale": ("f32", "logits_scaling"),
            "residual_scale": ("f32", "residual_multiplier"),
            "embedding_scale": ("f32", "embedding_multiplier"),
            "attention.scale": ("f32", "attention_multiplier"),
            "attention.sliding_window": ("u32", "sliding_window"),
        },
        write=_granite_keys,
        read=_granite_settings,
    ),
    Family(
        "glm4_moe",
        "glm4moe",
        "Glm4MoeForCausalLM",
        parts={**_ATTENTION, **_EXPERTS},
        fields={
            "expert_count": ("u32", "n_routed_experts"),
            "expert_used_count": ("u32", "num_experts_per_tok"),
            "expert_shared_count": ("u32", "n_shared_experts"),
            "expert_feed_forward_length": ("u32", "moe_intermediate_size"),
            "expert_weights_scale": ("f32", "routed_scaling_factor"),
            "expert_weights_norm": ("bool", "norm_topk_prob"),
        },
        write=_glm_keys,
        read=_glm_settings,
    ),
    Family(
        "edgewright_decoder", "deci", "EdgeDecoderForCausalLM", permuted=True, write=_deci_keys, read=_deci_settings
    ),
)
BY_MODEL_TYPE = {family.model_type: family for family in _FAMILIES}
BY_ARCHITECTURE = {family.architecture: family for family in _FAMILIES}
