"""Routed experts of transformers' classes under quantisation: compared with the original model's logits."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from edgewright.errors import Unsupported
from edgewright.export.huggingface import save_dequantized, save_quantized
from edgewright.io.packed import PackedStack
from edgewright.io.quantized_folder import load_quantized
from edgewright.quantization.api import convert_, dequantize_, quantizable_layers, quantize_, quantized_modules
from edgewright.quantization.config import ActivationConfig, QuantConfig, Rule, WeightConfig
from edgewright.quantization.coverage import coverage, summary
from edgewright.quantization.layers import WeightStack
from tests.toy_llama import make_byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
# Experts in one layer only: in a second one a router may choose another for a rounding error.
GROUPS = {"num_hidden_layers": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4},
    "Glm4Moe": {"n_routed_experts": 4, **GROUPS},
    "DeepseekV3": {
        "n_routed_experts": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16, "num_key_value_heads": 2, "head_dim": 8, **GROUPS,
    },
    "GraniteMoe": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "sliding_window": 8},
    "JetMoe": {"num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2},
    "Llama4": {
        "num_local_experts": 4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def make(family: str) -> Any:
    kind = "TextConfig" if family == "Llama4" else "Config"
    config = getattr(transformers, family + kind)(**SIZES | FAMILIES[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def stacks(model: Any) -> list[str]:
    return [name for name, layer in quantizable_layers(model).items() if isinstance(layer, WeightStack)]


def names_of_stacks(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_logits_stay_those_of_the_original(family: str, implementation: str) -> None:
    original = make(family)
    if original._can_set_experts_implementation():
        original.set_experts_implementation(implementation)
    expected, kinds = logits(original), [type(module) for module in original.modules()]
    weights = WeightConfig("int8", 16, scale="absmax")
    model = quantize_(copy.deepcopy(original), QuantConfig(tuple(Rule(name, weights) for name in stacks(original))))
    assert [name for name, _ in quantized_modules(model)] == stacks(original) == names_of_stacks(original)
    fake = logits(model)
    assert 0 < float((fake - expected).norm() / expected.norm()) < 0.03
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(again), fake)
    plain = dequantize_(copy.deepcopy(model))
    assert torch.equal(logits(plain), fake) and [type(module) for module in plain.modules()] == kinds
    assert set(plain.state_dict()) == set(original.state_dict())
    assert torch.equal(logits(convert_(model)), fake)
    assert any(isinstance(module, PackedStack) for module in model.modules())
    assert torch.equal(logits(dequantize_(model)), fake) and set(model.state_dict()) == set(original.state_dict())


def test_groups_run_along_the_inputs_and_gradients_arrive() -> None:
    for family, inputs in (("Mixtral", 64), ("GptOss", 64)):
        model = quantize_(make(family), QuantConfig((Rule("*experts.down_proj", WeightConfig("int4", "row")),)))
        stack = model.model.layers[0].mlp.experts.down_proj
        assert stack.quantizer.weight_scale.shape == (4 * 32, 1)  # one scale an output of each expert
        assert stack.quantizer.pack(stack.weight).codes.shape[1] == inputs
        model(torch.arange(3, 40)[None], use_cache=False).logits.square().mean().backward()
        assert float(stack.weight.grad.abs().sum()) > 0


def test_inputs_of_experts_are_refused_by_name() -> None:
    model = make("Mixtral")
    rule = Rule("*experts*", WeightConfig("int8"), ActivationConfig(8))
    with pytest.raises(Unsupported, match=r"layer model.layers.0.mlp.experts.gate_up_proj is a stack of experts"):
        quantize_(model, QuantConfig((rule,)))
    assert not quantized_modules(model)


def test_coverage_counts_every_weight_once_and_says_why() -> None:
    model = make("Mixtral")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert summary(coverage(model)).startswith(f"quantised 0.0% of {total:,} weights; left as they are: model.layers.*")
    quantize_(model, QuantConfig.weights("int4", 16))
    rows = coverage(model)
    done = {row.name.split(".")[-1] if "experts" in row.name else row.name.split(".")[-2] for row in rows if row.grid}
    assert done == {"q_proj", "k_proj", "v_proj", "o_proj", "weight"}
    assert sum(row.weights for row in rows) == total
    share = sum(row.weights for row in rows if row.grid) / total
    convert_(model)
    assert sum(row.weights for row in coverage(model)) == total
    line = summary(coverage(model))
    assert line.startswith(f"quantised {share:.1%} of {total:,} weights; left as they are: ")
    assert "lm_head.weight" in line and "(no rule selects it)" in line
    assert "model.layers.*.mlp.gate.weight" in line and "of a MixtralTopKRouter" in line


def test_weights_that_no_rule_can_reach_are_a_warning() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
    with pytest.warns(UserWarning, match=r"of the weights stay as they are: transformer.h.\*.mlp.c_fc.weight .*Conv1D"):
        quantize_(model, QuantConfig(rules=(Rule("*", WeightConfig("int8")),), skip=(), tied="together"))
    named = quantize_(make("Mixtral"), QuantConfig.weights("int8"))
    assert len(quantized_modules(named)) == 6


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Glm4Moe"])
def test_a_quantised_folder_brings_stacks_back(family: str, tmp_path: Path) -> None:
    model = convert_(quantize_(make(family), QuantConfig.weights("int4", 16)))
    save_quantized(model, make_byte_tokenizer(), tmp_path / "folder")  # type: ignore[arg-type]
    again, _ = load_quantized(tmp_path / "folder")
    assert torch.equal(logits(again), logits(model))
    save_dequantized(model, make_byte_tokenizer(), tmp_path / "plain")  # type: ignore[arg-type]
    plain, weights = type(model).from_pretrained(tmp_path / "plain"), dequantize_(copy.deepcopy(model)).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    # Weights read from a file lie otherwise in memory, which gives products another order of summation.
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
