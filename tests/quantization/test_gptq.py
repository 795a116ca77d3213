"""Second-order calibration: an oracle in float64, its effect on outputs, its memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from edgewright.errors import Unsupported, UsageError
from edgewright.quantization import gptq
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.quantization.fake_quantize import Quantizer
from edgewright.quantization.gptq import gptq_, inverse_factor, repair, transformer_blocks
from edgewright.quantization.grids import GRIDS
from edgewright.quantization.scales import grouped, mse_alpha


def slow_repair(weight, step, hessian, damping, encode):
    """Optimal brain quantisation with full downdates of the inverse Hessian, float64, one row at a time."""
    diagonal = np.diag(hessian)
    order = np.argsort(-diagonal, kind="stable")
    damped = hessian[np.ix_(order, order)] + np.eye(len(order)) * damping * diagonal.mean()
    result = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        values = weight[row][order].astype(np.float64).copy()
        inverse = np.linalg.inv(damped)
        for column in range(len(order)):
            level = encode(values[column] / step[row, order[column]]) * step[row, order[column]]
            result[row, order[column]] = level
            scaled = (values[column] - level) / inverse[column, column]
            values -= scaled * inverse[column]
            inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result


@pytest.mark.parametrize("name", ["int4", "seq2", "ternary", "binary"])
def test_repair_equals_the_slow_algorithm(name):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator)
    mixing = torch.randn(32, 32, generator=generator)
    inputs = torch.randn(200, 32, generator=generator) @ mixing
    hessian = inputs.t() @ inputs
    quantizer = Quantizer(GRIDS[name])
    alpha = mse_alpha(grouped(weight, 2), GRIDS[name])
    latent = repair(weight, alpha, quantizer, *inverse_factor(hessian, 0.01))
    scale = quantizer.scale(alpha).repeat_interleave(16, dim=1).numpy()

    def encode(u):
        code = GRIDS[name].encode_(torch.tensor([u], dtype=torch.float64))
        return float(code + GRIDS[name].offset)

    slow = slow_repair(weight.numpy(), scale, hessian.double().numpy(), 0.01, encode)
    same = np.isclose(quantizer.values(latent, alpha).numpy(), slow, rtol=1e-6)
    # A float32 value that lies on a rounding boundary may fall to the other side; the rest must agree.
    assert same.mean() > 0.97


def test_calibration_repairs_outputs_and_codes_survive_conversion(tiny_llama):
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (8, 32), generator=generator)
    probe = torch.randint(0, 256, (4, 32), generator=generator)
    with torch.no_grad():
        reference = tiny_llama(probe).logits
    config = QuantConfig.weights("seq2", 32, scale="mse")
    plain = quantize_(copy.deepcopy(tiny_llama), config)
    repaired = copy.deepcopy(tiny_llama)
    seen = []
    errors = gptq_(repaired, config, blocks, on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)] and len(errors) == 14
    assert all(error.repaired < error.rounded for error in errors)
    with torch.no_grad():
        after = repaired(probe).logits
        assert (after - reference).square().mean() < (plain(probe).logits - reference).square().mean()
        assert torch.equal(convert_(repaired)(probe).logits, after)


def test_same_result_twice_and_learned_scales_can_go_on_training(tiny_llama):
    blocks = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(2))
    models = [copy.deepcopy(tiny_llama) for _ in range(2)]
    for model in models:
        gptq_(model, QuantConfig.weights("int3", 32, scale="learned"), blocks)
    for (name, first), second in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    models[0](blocks, labels=blocks).loss.backward()
    scale = models[0].model.layers[0].mlp.up_proj.quantizer.weight_scale
    assert scale.grad is not None and scale.grad.abs().sum() > 0


def test_encoders_are_calibrated_too():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ).eval()
    blocks = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(3))
    errors = gptq_(model, QuantConfig((Rule("encoder.layer.*", WeightConfig("int4", 32)),)), blocks)
    assert len(errors) == 12 and all(error.repaired <= error.rounded * 1.05 for error in errors)


def test_refusals(tiny_llama):
    with pytest.raises(UsageError, match="samples, length"):
        gptq_(tiny_llama, QuantConfig.weights("int4"), torch.zeros(0, 8, dtype=torch.int64))
    with pytest.raises(Unsupported, match="no list of blocks"):
        gptq_(nn.Sequential(nn.Linear(32, 4)), QuantConfig.weights("int4"), torch.zeros(1, 8, dtype=torch.int64))


LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "Llama": {},
    "Gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 16},
    "Gemma3": {"sliding_window": 4, "query_pre_attn_scalar": 16, "layer_types": LAYERS},
    "Olmo3": {"sliding_window": 4, "layer_types": LAYERS},
    "GptOss": {"sliding_window": 4, "layer_types": LAYERS, "num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "Bert": {},
    "shared": {},
}


def family(name):
    import transformers

    from edgewright.models.decoder.config import EdgeDecoderConfig
    from edgewright.models.decoder.model import new_decoder

    sizes = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    if name == "shared":
        return new_decoder(EdgeDecoderConfig(**sizes | {"num_hidden_layers": None, "share_map": [0, 1, 0, 2]})).eval()
    kind = "Model" if name == "Bert" else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(
            **sizes | FAMILIES[name]
        )
        return getattr(transformers, f"{name}{kind}")(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_each_block_sees_what_the_model_s_own_forward_gives_it(name, monkeypatch):
    """Only the last block is quantised: up to there the hidden states must be those of the original model."""
    model = family(name)
    blocks = torch.randint(3, 256, (5, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(gptq, "TOKENS_AT_ONCE", 24)  # slices of two samples
    layers = transformer_blocks(model)
    seen = {}

    def watch(number):
        return lambda module, inputs, output: seen.setdefault(number, []).append(
            output[0] if isinstance(output, tuple) else output
        )

    watched = [
        next(m for n, m in layer.named_modules() if n.endswith(("self_attn", "attention.self"))) for layer in layers
    ]
    handles = [module.register_forward_hook(watch(number)) for number, module in enumerate(watched)]
    model(blocks)
    expected = {number: torch.cat(parts) for number, parts in seen.items()}
    seen.clear()
    if name in ("Gemma2", "Gemma3", "Olmo3", "GptOss"):
        a, b = (vars(layers[i].self_attn).get("sliding_window") for i in (0, 1))
        assert a != b or name == "Gemma2"  # both kinds of layers are there
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and f".{len(layers) - 1}." in f".{n}"]
    errors = gptq_(model, QuantConfig((Rule(last[-1], WeightConfig("int8", 16)),), skip=()), blocks)
    assert len(errors) == 1 and errors[0].rounded < 1e-3
    for number, rows in expected.items():
        found = torch.cat(seen[number])[len(rows) // len(blocks) :]  # without the first pass, of one sample
        torch.testing.assert_close(found, rows, rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert not any("forward" in vars(layer) for layer in layers)


def test_models_whose_blocks_pass_on_more_are_refused():
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, T5Config, T5EncoderModel

    config = Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, hidden_size_per_layer_input=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=32,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0] * 2, laurel_rank=4,
    )  # fmt: skip
    blocks = torch.randint(3, 64, (2, 8))
    with pytest.raises(Unsupported, match=r"block 0 of Gemma3nForCausalLM takes \[4, 1, 8, 32\]"):
        gptq_(Gemma3nForCausalLM(config), QuantConfig((Rule("*mlp*", WeightConfig("int8")),)), blocks)
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2))
    with pytest.raises(Unsupported, match="gives more than hidden states to the next one"):
        gptq_(t5, QuantConfig((Rule("*", WeightConfig("int8")),), skip=("*shared", "*bias", "*embed*")), blocks)
