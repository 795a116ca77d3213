"""Which models can be written as GGUF, under which architecture, and what llama.cpp must be told beside Llama's keys.

| model_type of transformers | architecture | rows of q and k | beside Llama's tensors |
|---|---|---|---|
| llama | llama | pairs | |
| qwen2 | qwen2 | halves | biases |
| qwen3 | qwen3 | halves | norms of heads |
| granite_swa | granite_swa | pairs | attention sinks; window and its pattern |
| glm4_moe | glm4moe | halves | router, its bias, experts, a shared expert |
| edgewright_decoder | deci | pairs | nothing where a layer has no attention; heads and widths by layer |

The last is the house's own decoder where no class of transformers saves what its shape saves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from edgewright.errors import Unsupported
from edgewright.io.gguf_model import LAYER_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Metadata = dict[str, tuple[str, Any]]
SIGMOID = 2  # llama.cpp's number for the router's function


@dataclass(frozen=True)
class Part:
    """A tensor inside a block. path: of its module; attribute: of the parameter; select: the piece that is meant."""

    path: str
    attribute: str = "weight"
    select: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Writer:
    """How a family is written. permuted: query and key rows go into pair order. parts: tensor name -> what it holds;
    names without a suffix stand for .weight and, where there is one, .bias. keys: what the header says besides."""

    architecture: str
    permuted: bool = False
    parts: dict[str, str | Part] = field(default_factory=lambda: dict(LAYER_NAMES))
    keys: Callable[[Any], Metadata] = lambda config: {}


def _gate(experts: Tensor) -> Tensor:
    """[E, 2 f, d] -> the first half [E, f, d]."""
    return experts[:, : experts.shape[1] // 2]


def _up(experts: Tensor) -> Tensor:
    return experts[:, experts.shape[1] // 2 :]


def _granite_keys(config: Any) -> Metadata:
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    return {
        "logit_scale": ("f32", config.logits_scaling),
        "residual_scale": ("f32", config.residual_multiplier),
        "embedding_scale": ("f32", config.embedding_multiplier),
        "attention.scale": ("f32", config.attention_multiplier),
        "attention.sliding_window": ("u32", config.sliding_window),
        "attention.sliding_window_pattern": ("[bool]", windows),
    }


def _glm_keys(config: Any) -> Metadata:
    if config.first_k_dense_replace or config.num_mtp_layers or config.n_group != 1:
        raise Unsupported("dense first layers, prediction layers and groups of experts cannot be written as GGUF here")
    return {
        "expert_count": ("u32", config.n_routed_experts),
        "expert_used_count": ("u32", config.num_experts_per_tok),
        "expert_shared_count": ("u32", config.n_shared_experts),
        "expert_feed_forward_length": ("u32", config.moe_intermediate_size),
        "expert_weights_scale": ("f32", config.routed_scaling_factor),
        "expert_weights_norm": ("bool", config.norm_topk_prob),
        "expert_gating_func": ("u32", SIGMOID),
        "leading_dense_block_count": ("u32", 0),
        "nextn_predict_layers": ("u32", 0),
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


_EXPERTS: dict[str, str | Part] = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp.weight": Part("mlp.gate"),
    "exp_probs_b.bias": Part("mlp.gate", "e_score_correction_bias"),
    "ffn_gate_exps.weight": Part("mlp.experts", "gate_up_proj", _gate),
    "ffn_up_exps.weight": Part("mlp.experts", "gate_up_proj", _up),
    "ffn_down_exps.weight": Part("mlp.experts", "down_proj"),
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_ATTENTION = {name: path for name, path in LAYER_NAMES.items() if not name.startswith("ffn_")}

WRITERS = {
    "llama": Writer("llama", permuted=True),
    "qwen2": Writer("qwen2"),
    "qwen3": Writer("qwen3"),
    "granite_swa": Writer(
        "granite_swa",
        permuted=True,
        parts={**LAYER_NAMES, "attn_sinks.weight": Part("self_attn", "sinks")},
        keys=_granite_keys,
    ),
    "glm4_moe": Writer("glm4moe", parts={**_ATTENTION, **_EXPERTS}, keys=_glm_keys),
    "edgewright_decoder": Writer("deci", permuted=True, keys=_deci_keys),
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite_swa": "GraniteSWAForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "edgewright_decoder": "EdgeDecoderForCausalLM",
}


def writer(model: PreTrainedModel) -> Writer:
    """How a model is written. Raises Unsupported naming the class or setting that is not known."""
    config = model.config
    kind = str(getattr(config, "model_type", ""))
    if CLASSES.get(kind) != type(model).__name__:
        raise Unsupported(f"{type(model).__name__} cannot be written as GGUF; {', '.join(CLASSES.values())} can")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise Unsupported(f"hidden_act={config.hidden_act!r} cannot be written as GGUF; llama.cpp computes 'silu' here")
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if kind != "granite_swa" and (windows or getattr(config, "use_sliding_window", False)):
        raise Unsupported(
            f"{kind} with sliding windows cannot be written as GGUF, granite_swa can: an edge decoder "
            "(edgewright.language.native.from_native) chooses it by itself"
        )
    return WRITERS[kind]


def native_form(model: Any) -> PreTrainedModel:
    """The model to write: a model that knows a better form of itself for GGUF (the edge decoder) is asked for it."""
    return model.for_gguf() if hasattr(model, "for_gguf") else model
