"""Edge decoders as native classes and back: the same logits, the same weights, a reason where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgewright.errors import Unsupported, UsageError
from edgewright.io.transformers_names import has_model_type
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.from_native import from_native
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, new_decoder
from edgewright.models.decoder.native import (
    NotRepresentable,
    halves_to_pairs,
    pairs_to_halves,
    share_blocks,
    to_native,
    unroll,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = {"num_experts": 8, "top_k": 2, "expert_size": 32, "shared_size": 64}


def decoder(**changes: Any) -> EdgeDecoderForCausalLM:
    """Random, its norms and biases away from one and zero, which would hide a mix-up."""
    model = new_decoder(EdgeDecoderConfig(**{**SHAPE, **changes})).eval()
    disturb(model)
    return model


def disturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


WINDOW = {"mixers": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 7}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "MobileLLM": ({}, "auto", "llama"),
    "shared": ({"share_map": [0, 0, 1]}, "auto", "llama"),
    "Flash": ({"mixers": ["full_attention", "skip_attention", "full_attention"]}, "auto", "llama"),
    "pairs": ({"rope_interleaved": True}, "auto", "llama"),
    "wide heads": ({"head_dim": 32}, "auto", "llama"),
    "R1 as Qwen3": ({"qk_norm": "l2", "rope_interleaved": True}, "auto", "qwen3"),
    "R1 as Llama 4": ({"qk_norm": "l2", "rope_interleaved": True}, "llama4_text", "llama4_text"),
    "halves as Llama 4": ({"qk_norm": "l2"}, "llama4_text", "llama4_text"),
    "weighted pairs": ({"qk_norm": "rms", "rope_interleaved": True}, "auto", "qwen3"),
    "Pro": (
        {"mixers": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 7},
        "auto",
        "qwen2",
    ),
    "Pro as Granite": (WINDOW, "granite_swa", "granite_swa"),
    "biases": ({"qkv_bias": True, "rope_interleaved": True}, "auto", "qwen2"),
    "windows and norms": ({**WINDOW, "qk_norm": "rms"}, "auto", "qwen3"),
    "untied": ({"tie_word_embeddings": False}, "auto", "llama"),
    "MobileMoE": ({"ffn_types": "moe", "moe": MOE, "qk_norm": "l2", "rope_interleaved": True}, "auto", "glm4_moe"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_native_class_gives_the_same_logits(case: str) -> None:
    settings, target, kind = CASES[case]
    model = decoder(**settings)
    if not has_model_type(kind):
        with pytest.raises(Unsupported, match=f"{kind} models need a newer transformers than 5"):
            to_native(model, target)
        return
    native = to_native(model, target)
    assert native.config.model_type == kind and type(native).__module__.startswith("transformers")
    torch.testing.assert_close(logits(native), logits(model), rtol=1e-5, atol=2e-5)  # other orders of summation
    again = from_native(native)
    torch.testing.assert_close(logits(again), logits(native), rtol=1e-5, atol=2e-5)
    back = to_native(again, kind)
    assert back.state_dict().keys() == native.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in native.state_dict().items())


NATIVE = ["llama", "qwen2", "qwen3", "llama4_text", "granite_swa", "glm4_moe"]


@pytest.mark.parametrize("kind", filter(has_model_type, NATIVE))
def test_a_native_model_becomes_an_edge_decoder(kind: str) -> None:
    extra = {
        "llama4_text": {"intermediate_size_mlp": 96, "moe_layers": [], "no_rope_layers": [1, 1, 1], "head_dim": 16},
        "granite_swa": {"attention_multiplier": 0.25, "sliding_window": 5},
        "glm4_moe": {
            "first_k_dense_replace": 0, "num_mtp_layers": 0, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "partial_rotary_factor": 1.0, "use_qk_norm": True,
        },
    }.get(kind, {})  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        native = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **extra)).eval()
    disturb(native)
    if kind == "granite_swa":
        for layer in native.model.layers:
            torch.nn.init.constant_(layer.self_attn.sinks, -1e30)
    edge = from_native(native)
    torch.testing.assert_close(logits(edge), logits(native), rtol=1e-5, atol=2e-5)
    back = to_native(edge, kind)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in native.state_dict().items())


def test_orders_of_rows_are_inverse() -> None:
    rows = torch.arange(32)
    assert torch.equal(rows[halves_to_pairs(8, 32)][pairs_to_halves(8, 32)], rows)
    assert halves_to_pairs(8, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_halves_compute_what_pairs_compute() -> None:
    from edgewright.models.decoder.native import in_halves

    model = decoder(rope_interleaved=True, qkv_bias=True, share_map=[0, 0, 1])
    halves = in_halves(model)
    assert not halves.config.rope_interleaved and model.config.rope_interleaved and in_halves(halves) is halves
    assert halves.config.share_map == [0, 0, 1]
    torch.testing.assert_close(logits(halves), logits(model), rtol=1e-5, atol=2e-5)


def test_unrolled_and_shared_blocks() -> None:
    model = decoder()
    twice = share_blocks(model, every=2)
    assert twice.config.share_map == [0, 0, 1, 1, 2, 2] and twice.config.num_hidden_layers == 6
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(unroll(twice)), logits(twice))
    assert unroll(twice).config.num_stored_layers == 6
    with pytest.raises(UsageError, match="at least twice"):
        share_blocks(model, every=1)


@pytest.mark.parametrize(
    ("settings", "target", "reason"),
    [
        ({"intermediate_size": [96, 96, 64]}, "auto", "intermediate_size differs from layer to layer"),
        ({"ffn_types": "none"}, "auto", "'none' feed-forwards"),
        ({"qk_norm": "rms"}, "llama", "qk_norm='rms'"),
        ({}, "qwen3", "qk_norm='none'"),
        ({"mixers": "sliding_attention", "sliding_window": 4}, "llama", "sliding windows"),
        ({"qkv_bias": True}, "llama", "biases"),
        ({"qkv_bias": True, "qk_norm": "l2"}, "auto", "biases"),
        ({"head_dim": 32}, "qwen2", "heads are not 64 wide"),
        ({}, "glm4_moe", "'mlp' feed-forwards"),
    ],
)
def test_what_no_class_holds_is_refused_with_the_reason(settings: dict[str, Any], target: str, reason: str) -> None:
    with pytest.raises(NotRepresentable, match=reason):
        to_native(decoder(**settings), target)


def test_foreign_models_are_refused() -> None:
    with pytest.raises(UsageError, match="target='gpt2'"):
        to_native(decoder(), "gpt2")
    gpt = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(NotRepresentable, match="gpt2 models are not known"):
        from_native(gpt)
    biased = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE, attention_bias=True))
    with pytest.raises(NotRepresentable, match="biases in its projections"):
        from_native(biased)


def test_packed_layers_stay_packed() -> None:
    from edgewright.io.packed import PackedLinear
    from edgewright.quantization.api import convert_, quantize_
    from edgewright.quantization.config import QuantConfig, Rule, WeightConfig

    model = decoder(rope_interleaved=True, share_map=[0, 0, 1])
    convert_(quantize_(model, QuantConfig(rules=(Rule("model.layers.*", WeightConfig("int4", 32, scale="mse")),))))
    native = to_native(model)
    assert isinstance(native.model.layers[2].self_attn.q_proj, PackedLinear)
    torch.testing.assert_close(logits(native), logits(model), rtol=1e-5, atol=2e-5)
