"""Which class of transformers holds which edge decoder: configurations in both directions.

| family | target | what it needs |
|---|---|---|
| MobileLLM | llama | nothing special |
| Flash (skipped attention) | llama | zero output matrices in the skipped layers |
| Pro (windows) | qwen2 | zero biases; qwen3 where heads are normalised |
| R1 (normalised heads) | qwen3, llama4_text | ones as norm weights; pairs of rows |
| MobileMoE | glm4_moe | one group of experts, normalised weights |
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from edgewright.io.transformers_names import config_of
from edgewright.models.decoder.config import EdgeDecoderConfig

FAMILIES = ("llama", "qwen2", "qwen3", "llama4_text", "glm4_moe", "granite_swa")
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def native_config(config: EdgeDecoderConfig, target: str, refusal: type[Exception]) -> PreTrainedConfig:
    """The configuration of the target class; `refusal` with the reason when it cannot hold the model."""
    kind = nearest(config) if target == "auto" else target
    if reason := why_not(config, kind):
        raise refusal(f"{kind} cannot hold this model: {reason}")
    settings = {name: getattr(config, name) for name in SHARED_FIELDS}
    settings["rope_parameters"] = dict(config.rope_parameters or {})
    if kind == "llama4_text":
        settings |= {
            "intermediate_size_mlp": config.intermediate_size,
            "moe_layers": [],
            "use_qk_norm": config.qk_norm == "l2",
            "no_rope_layers": [1] * config.num_hidden_layers,  # type: ignore[operator]
            "attention_chunk_size": config.max_position_embeddings,  # must be set, even where all layers see all
            "layer_types": ["full_attention"] * config.num_hidden_layers,  # type: ignore[operator]
            "attn_temperature_tuning": False,
        }
    if kind in ("qwen2", "qwen3", "granite_swa"):
        settings |= {"layer_types": list(config.layer_types)}
        if "sliding_attention" in config.layer_types:
            settings |= {"sliding_window": config.sliding_window, "use_sliding_window": True}
    if kind == "granite_swa":
        settings |= {"attention_multiplier": config.head_dim**-0.5}  # type: ignore[operator]
    if kind == "glm4_moe":
        settings |= _glm_experts(config)
    return config_of(kind, **settings)  # type: ignore[no-any-return]


def nearest(config: EdgeDecoderConfig) -> str:
    """The target of "auto"."""
    assert isinstance(config.ffn_types, list) and isinstance(config.mixers, list)
    if "moe" in config.ffn_types:
        return "glm4_moe"
    if config.qk_norm != "none":
        return "qwen3"
    return "qwen2" if config.qkv_bias or "sliding_attention" in config.mixers else "llama"


def why_not(config: EdgeDecoderConfig, kind: str) -> str:
    """The reason why a class cannot hold the model, empty when it can."""
    assert isinstance(config.ffn_types, list) and isinstance(config.mixers, list)
    for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
        if not isinstance(getattr(config, name), int) and len(set(getattr(config, name))) > 1:
            return f"{name} differs from layer to layer"
    if "longhorn" in config.mixers:
        return "it has Longhorn layers"
    wanted = "moe" if kind == "glm4_moe" else "mlp"
    if other := [name for name in config.ffn_types if name != wanted]:
        return f"it has {other[0]!r} feed-forwards, and {wanted!r} ones are needed"
    normalised = {"qwen3": ("rms", "l2"), "glm4_moe": ("rms", "l2", "none"), "llama4_text": ("l2", "none")}
    if config.qk_norm not in normalised.get(kind, ("none",)):
        return f"its queries and keys have qk_norm={config.qk_norm!r}"
    windows = ("qwen2", "qwen3", "granite_swa")
    if "sliding_attention" in config.mixers and kind not in windows:
        return f"it has sliding windows, which {', '.join(windows)} have"
    if config.qkv_bias and kind not in ("qwen2", "glm4_moe"):
        return "its projections have biases"
    together = (config.head_dim or 0) * config.of_layer("num_attention_heads", 0)
    if kind in ("qwen2", "granite_swa") and together != config.hidden_size:
        return f"its heads are not {config.hidden_size} wide together"
    return _why_no_experts(config) if kind == "glm4_moe" else ""


def _why_no_experts(config: EdgeDecoderConfig) -> str:
    moe = config.moe or {}
    if moe.get("score", "sigmoid") != "sigmoid" or not moe.get("norm_topk", True):
        return "its router is not a normalised sigmoid"
    if moe.get("capacity_factor") is not None:
        return "its experts drop what exceeds their capacity; set capacity_factor to None"
    if moe.get("shared_size", 0) % moe["expert_size"] or moe.get("shared_size", 0) == 0:
        return "its shared expert is no multiple of a routed one"
    return ""


def _glm_experts(config: EdgeDecoderConfig) -> dict[str, Any]:
    moe = config.moe or {}
    rope = dict(config.rope_parameters or {}) | {"partial_rotary_factor": 1.0}
    return {
        "moe_intermediate_size": moe["expert_size"],
        "n_routed_experts": moe["num_experts"],
        "num_experts_per_tok": moe["top_k"],
        "n_shared_experts": moe["shared_size"] // moe["expert_size"],
        "routed_scaling_factor": float(moe.get("route_scale", 1.0)),
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_mtp_layers": 0,
        "use_qk_norm": config.qk_norm != "none",
        "attention_bias": config.qkv_bias,
        "partial_rotary_factor": 1.0,
        "rope_parameters": rope,
    }


def edge_settings(native: PreTrainedConfig, refusal: type[Exception]) -> dict[str, Any]:
    """Settings of the edge decoder that computes what the native class does; `refusal` names what it cannot."""
    kind = native.model_type
    if kind not in FAMILIES:
        raise refusal(f"{kind} models are not known to the edge decoder; {', '.join(FAMILIES)} are")
    if reason := _foreign(native, kind):
        raise refusal(f"this {kind} model has {reason}, which the edge decoder has not")
    settings = {name: getattr(native, name, None) for name in SHARED_FIELDS}
    rope = dict(native.rope_parameters or {})
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise refusal(f"this {kind} model has a partial rotary embedding, which the edge decoder has not")
    settings["rope_parameters"] = rope
    if settings["head_dim"] is None:
        settings["head_dim"] = native.hidden_size // native.num_attention_heads
    if kind in ("qwen2", "qwen3", "granite_swa") and "sliding_attention" in native.layer_types:
        settings |= {"mixers": list(native.layer_types), "sliding_window": native.sliding_window}
    if kind == "qwen2":
        settings["qkv_bias"] = True
    if kind == "qwen3":
        settings["qk_norm"] = "rms"
    if kind == "llama4_text":
        settings |= {
            "intermediate_size": native.intermediate_size_mlp,
            "qk_norm": "l2" if native.use_qk_norm else "none",
            "rope_interleaved": True,
        }
    if kind == "glm4_moe":
        size = native.moe_intermediate_size
        settings |= {
            "ffn_types": "moe",
            "qk_norm": "rms" if native.use_qk_norm else "none",
            "qkv_bias": native.attention_bias,
            "moe": {
                "num_experts": native.n_routed_experts,
                "top_k": native.num_experts_per_tok,
                "expert_size": size,
                "shared_size": size * native.n_shared_experts,
                "route_scale": native.routed_scaling_factor,
            },
        }
    return settings


def _foreign(native: Any, kind: str) -> str:
    """What of a native model the edge decoder does not have, empty when it has all."""
    if kind != "glm4_moe" and (getattr(native, "attention_bias", False) or getattr(native, "mlp_bias", False)):
        return "biases in its projections"
    if kind == "llama4_text":
        if native.moe_layers:
            return "experts of Llama 4's kind"
        if not all(native.no_rope_layers[: native.num_hidden_layers]):
            return "layers without positions"
        if "chunked_attention" in native.layer_types and native.attention_chunk_size < native.max_position_embeddings:
            return "attention in chunks"
    if kind == "granite_swa":
        factors = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
        width = native.hidden_size // native.num_attention_heads
        if any(getattr(native, name) != 1 for name in factors) or abs(native.attention_multiplier - width**-0.5) > 1e-9:
            return "multipliers"
        if len(set(native.layer_rope_theta)) > 1 or native.layer_rope_theta[0] != native.rope_parameters["rope_theta"]:
            return "positions that differ by layer"
    if kind == "glm4_moe":
        if native.first_k_dense_replace or native.num_mtp_layers:
            return "dense first layers or extra prediction layers"
        if native.n_group != 1 or not native.norm_topk_prob:
            return "grouped experts or a router that is not normalised"
    return ""
