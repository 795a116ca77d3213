"""Every form of the edge decoder as a GGUF file: llama.cpp gives PyTorch's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgewright.errors import Unsupported
from edgewright.export.gguf.exporter import export_gguf
from edgewright.io.gguf.model import load_gguf
from edgewright.io.gguf.reader import GGUFFile
from edgewright.io.transformers_names import has_model_type
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, new_decoder
from edgewright.runtime.llamacpp import LlamaCppEngine
from tests.export.export_models import make_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "eos_token_id": 2,
}
WINDOW = {"mixers": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "shared": ({"share_map": [0, 0, 1]}, "llama"),
    "R1": ({"qk_norm": "l2", "rope_interleaved": True}, "qwen3"),
    "Pro": (WINDOW, "granite_swa"),
    "Flash": ({"mixers": ["full_attention", "skip_attention", "full_attention"]}, "deci"),
    "uneven": (
        {"intermediate_size": [192, 64, 128], "num_attention_heads": [4, 2, 4], "num_key_value_heads": [2, 1, 4]},
        "deci",
    ),
    "uneven pairs": ({"intermediate_size": [192, 64, 128], "rope_interleaved": True}, "deci"),
    "biases": ({"qkv_bias": True}, "qwen2"),
    "MobileMoE": (
        {
            "ffn_types": "moe",
            "moe": {"num_experts": 8, "top_k": 2, "expert_size": 64, "shared_size": 128},
            "qk_norm": "l2",
            "rope_interleaved": True,
        },
        "glm4moe",
    ),
}


def decoder(**changes: Any) -> EdgeDecoderForCausalLM:
    model = new_decoder(EdgeDecoderConfig(**{**SHAPE, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_decoder_computes(case: str, tmp_path: Path) -> None:
    settings, architecture = CASES[case]
    model, tokenizer = decoder(**settings), make_tokenizer()
    path = tmp_path / "model.gguf"
    if not has_model_type(architecture) and architecture == "granite_swa":
        with pytest.raises(Unsupported, match="granite_swa models need a newer transformers than 5"):
            export_gguf(model, tokenizer, path, progress=False)
        return
    done = export_gguf(model, tokenizer, path, float_type="F32", embedding="F32", progress=False)
    file = GGUFFile(path)
    assert file.metadata["general.architecture"] == architecture
    assert done.checks["top1_agreement"] > 0.95
    ids = torch.randint(3, 272, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    with LlamaCppEngine(path, threads=1, context=128) as engine:
        got = torch.from_numpy(engine.logits(ids[0].tolist()))
    assert float((got - expected).norm() / expected.norm()) < 2e-3  # keys and values are fp16 there
    again, _ = load_gguf(path)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits[0], expected, rtol=1e-4, atol=1e-5)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 64,
}
BACK: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "other rope factors": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.5}}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "granite": (
        "granite_swa",
        {
            "logits_scaling": 3.0,
            "residual_multiplier": 0.3,
            "embedding_multiplier": 5.0,
            "attention_multiplier": 0.11,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "attention_bias": True,
        },
    ),
    "glm": (
        "glm4_moe",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 0,
            "num_mtp_layers": 0,
            "use_qk_norm": True,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    ),
}


@pytest.mark.parametrize("case", [case for case, (kind, _) in BACK.items() if has_model_type(kind)])
def test_what_is_written_is_read_back_as_the_model_that_it_was(case: str, tmp_path: Path) -> None:
    kind, settings = BACK[case]
    given = {**SHAPE, "head_dim": 32, "tie_word_embeddings": True, **settings}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if parameter.ndim == 1 and "inv_freq" not in name:  # biases, norms, sinks, the router's bias
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.generation_config.eos_token_id = [2, 1]
    path = tmp_path / "model.gguf"
    export_gguf(model, make_tokenizer(), path, float_type="F32", embedding="F32", verify=False, progress=False)
    again, _ = load_gguf(path)
    ids = torch.randint(3, 272, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = model(input_ids=ids).logits[0], again(input_ids=ids).logits[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # scales become float32 in the header
    with LlamaCppEngine(path, threads=1, context=128) as engine:
        theirs = torch.from_numpy(engine.logits(ids[0].tolist()))
    assert float((theirs - expected).norm() / expected.norm()) < 2e-3
    assert type(again) is type(model) and again.generation_config.eos_token_id == [2, 1]


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("qwen3", {"attention_bias": True}, "qwen3 with attention_bias"),
    ]
    + [("granite_swa", {"layer_rope_theta": [1e4, 1e6, 1e4]}, "layer_rope_theta")] * has_model_type("granite_swa"),
)
def test_what_the_file_would_lose_is_refused(kind: str, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **{**SHAPE, **settings})
    with pytest.raises(Unsupported, match=words):
        export_gguf(AutoModelForCausalLM.from_config(config), make_tokenizer(), tmp_path / "m.gguf", progress=False)


def test_a_tied_table_is_written_once(tmp_path: Path) -> None:
    model = decoder(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    kinds: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"qk_norm": "l2"}, "granite_swa": WINDOW}
    for name, changes in {kind: changes for kind, changes in kinds.items() if has_model_type(kind)}.items():
        export_gguf(
            decoder(tie_word_embeddings=True, **changes),
            make_tokenizer(),
            tmp_path / f"{name}.gguf",
            verify=False,
            progress=False,
        )
        assert "output.weight" not in GGUFFile(tmp_path / f"{name}.gguf").tensors


def test_skipped_attention_is_not_stored(tmp_path: Path) -> None:
    model = decoder(mixers=["full_attention", "skip_attention", "full_attention"])
    export_gguf(model, make_tokenizer(), tmp_path / "flash.gguf", verify=False, progress=False)
    file = GGUFFile(tmp_path / "flash.gguf")
    assert not any(name.startswith("blk.1.attn") for name in file.tensors)
    assert file.metadata["deci.attention.head_count"] == [4, 0, 4]


def test_shared_blocks_are_unrolled_and_say_so_by_their_size(tmp_path: Path) -> None:
    shared = export_gguf(
        decoder(share_map=[0, 0, 1]), make_tokenizer(), tmp_path / "a.gguf", verify=False, progress=False
    )
    plain = export_gguf(decoder(), make_tokenizer(), tmp_path / "b.gguf", verify=False, progress=False)
    assert shared.bytes == plain.bytes


def test_packed_decoders_keep_their_codes(tmp_path: Path) -> None:
    from edgewright.quantization.api import convert_, quantize_
    from edgewright.quantization.config import QuantConfig, Rule, WeightConfig

    model = decoder(share_map=[0, 0, 1], mixers=["full_attention", "full_attention", "skip_attention"], qk_norm="none")
    convert_(quantize_(model, QuantConfig(rules=(Rule("model.layers.*", WeightConfig("int4", 32, scale="mse")),))))
    done = export_gguf(model, make_tokenizer(), tmp_path / "q.gguf", embedding="F16", progress=False)
    written = {row.tensor: row.written for row in done.table}
    assert written["blk.0.attn_q.weight"] == "Q4_0" and written["blk.2.ffn_down.weight"] == "Q4_0"
    assert done.checks["tensors_equal"]["llama.cpp"] > 10


def test_packed_experts_keep_their_codes(tmp_path: Path) -> None:
    from edgewright.quantization.api import convert_, quantize_
    from edgewright.quantization.config import QuantConfig, Rule, WeightConfig

    model = decoder(**CASES["MobileMoE"][0])
    four = WeightConfig("int4", 32, scale="mse")
    rules = tuple(Rule(f"model.layers.*.{part}", four) for part in ("experts.*", "shared_experts.*", "self_attn.*"))
    convert_(quantize_(model, QuantConfig(rules=rules)))
    done = export_gguf(model, make_tokenizer(), tmp_path / "q.gguf", embedding="F16", progress=False)
    written = {row.tensor: (row.written, row.shape) for row in done.table}
    assert written["blk.0.ffn_gate_exps.weight"] == ("Q4_0", (8, 64, 128))
    assert written["blk.0.ffn_down_exps.weight"] == ("Q4_0", (8, 128, 64))
    assert written["blk.0.ffn_gate_inp.weight"][0] != "Q4_0"
    assert done.checks["top1_agreement"] > 0.8


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ffn_types": "none"}, "'none' feed-forwards"),
        ({**WINDOW, "qk_norm": "rms"}, "qk_norm='rms'"),
        ({"mixers": ["full_attention", "skip_attention", "full_attention"], "qk_norm": "l2"}, "no architecture"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=reason):
        export_gguf(decoder(**settings), make_tokenizer(), tmp_path / "model.gguf", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_sparse_layer_is_refused_by_name(tmp_path: Path) -> None:
    from edgewright.systems.r_sparse.layer import RSparseLinear

    model = decoder()
    layer = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = RSparseLinear(layer, threshold=0.1, scale=torch.ones(layer.in_features))
    with pytest.raises(Unsupported, match=r"layers.1.mlp.up_proj is a RSparseLinear"):
        export_gguf(to_llama(model), make_tokenizer(), tmp_path / "model.gguf", progress=False)


def to_llama(model: EdgeDecoderForCausalLM) -> Any:
    """A Llama around the decoder's own modules, special ones included."""
    from edgewright.models.decoder.native import to_native

    native = to_native(decoder())
    for layer, block in enumerate(model.model.layers):
        native.model.layers[layer].mlp.up_proj = block.mlp.up_proj
    return native
