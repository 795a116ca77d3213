"""Quantised key-value caches: training, cached generation and stored codes must agree, and nothing may look ahead."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from edgewright.errors import CheckFailed, Unsupported, UsageError
from edgewright.io.transformers_names import cache_of, with_cache
from edgewright.quantization import kv_cache
from edgewright.quantization.api import quantize_
from edgewright.quantization.config import KVConfig, QuantConfig
from edgewright.quantization.kv_cache import (
    attach_kv_quantization,
    attached_kv_config,
    detach_kv_quantization,
    hadamard,
    row_quantizer,
)
from edgewright.systems.llm_qat.quant_cache import QuantCache

# tiny_llama: 2 layers, 2 key heads of 16.
CONFIGS = [
    KVConfig(4),
    KVConfig(4, "head"),
    KVConfig(8, 8),
    KVConfig(4, "token", "post_rope"),
    KVConfig(4, "head", "post_rope"),
    KVConfig(3, 8, "post_rope", scale_dtype="bfloat16"),
]
POST = [config for config in CONFIGS if config.when == "post_rope"]
# One-token steps and whole sequences run other matmul shapes: float32 rounding over two layers, logits of order one.
STEPWISE = {"rtol": 0, "atol": 3e-5}


def tokens(length: int = 20, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 256, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def stepwise(model, ids, cache=None):
    """Logits [B, T, V] of a generation that is forced along `ids`, one token a step."""
    logits = []
    for place in range(ids.shape[1]):
        output = model(ids[:, place : place + 1], **with_cache(cache), use_cache=True)
        cache = cache_of(output)
        logits.append(output.logits)
    return torch.cat(logits, 1)


def family(name: str, head_dim: int = 16):
    """Tiny models of the other families; Mistral with a window shorter than the text, Qwen3 with normalised keys."""
    import transformers

    settings = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
    }
    if name == "Mistral":
        settings["sliding_window"] = 7
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
    return model.eval()


@torch.no_grad()
def test_sixteen_bits_change_no_bit(tiny_llama):
    expected = tiny_llama(tokens()).logits
    for when in ("pre_rope", "post_rope"):
        model = attach_kv_quantization(copy.deepcopy(tiny_llama), KVConfig(16, when=when))
        assert torch.equal(model(tokens()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_cached_generation_equals_the_full_forward(tiny_llama, config):
    plain = tiny_llama(tokens()).logits
    model = attach_kv_quantization(tiny_llama, config)
    full = model(tokens(), use_cache=False).logits
    assert torch.equal(model(tokens(), use_cache=True).logits, full)
    torch.testing.assert_close(stepwise(model, tokens()), full, **STEPWISE)
    assert (full - plain).abs().max() > 1e-3  # it does quantise


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_output_depends_on_later_tokens(tiny_llama, config):
    model = attach_kv_quantization(tiny_llama, config)
    ids, place = tokens(), 11
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % 256
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place:], after[:, place:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("config", [KVConfig(4), KVConfig(4, "head", "post_rope")], ids=["pre", "post"])
def test_other_families(name, config):
    plain = family(name)
    model = attach_kv_quantization(copy.deepcopy(plain), config)
    full = model(tokens(), use_cache=False).logits
    assert not torch.equal(full, plain(tokens()).logits)
    torch.testing.assert_close(stepwise(model, tokens()), full, **STEPWISE)
    if config.when == "post_rope":
        torch.testing.assert_close(stepwise(plain, tokens(), QuantCache(plain.config, config)), full, **STEPWISE)


def quantised(quantizer):
    return lambda module, inputs, output: quantizer.values(output.flatten(2)).to(output).reshape(output.shape)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_known_attention_sees_quantised_keys_and_values(name, monkeypatch):
    """Against quantising inside the attention function, where no cache and no argument name takes part."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionMaskInterface.register("slow", sdpa_mask)
    calls, ids = [], tokens(9, 1)
    update = kv_cache._QuantizingCache.update
    monkeypatch.setattr(kv_cache._QuantizingCache, "update", lambda *a, **k: calls.append(1) or update(*a, **k))
    for config in (KVConfig(4, "head", "post_rope"), KVConfig.llama_cpp(8), KVConfig.llama_cpp(4), KVConfig(4)):
        plain = family(name, head_dim=32).double()  # so that no code hangs on the order of a sum
        quantizers = [row_quantizer(config, name.lower(), 2, 32, values=values) for values in (False, True)]

        def slow(module, q, k, v, *args, by=quantizers, when=config.when, **options):
            rows = [heads.transpose(1, 2).flatten(2) for heads in (k, v)]
            if when == "post_rope":
                rows[0] = by[0].values(rows[0])
            rows[1] = by[1].values(rows[1])
            k, v = (row.to(q.dtype).unflatten(-1, (-1, 32)).transpose(1, 2) for row in rows)
            return sdpa_attention_forward(module, q, k, v, *args, **options)

        AttentionInterface.register("slow", slow)
        expected = copy.deepcopy(plain)
        expected.set_attn_implementation("slow")
        if config.when == "pre_rope":
            for layer in expected.model.layers:
                source = layer.self_attn.k_norm if name == "Qwen3" else layer.self_attn.k_proj
                source.register_forward_hook(quantised(quantizers[0]))
        model = attach_kv_quantization(copy.deepcopy(plain), config)
        calls.clear()
        full = model(ids, use_cache=False).logits
        assert len(calls) == 2  # layers
        assert torch.equal(full, expected(ids, use_cache=False).logits)
        assert (full - plain(ids).logits).abs().max() > 1e-4
        torch.testing.assert_close(stepwise(model, ids), full, rtol=0, atol=1e-9)
        assert len(calls) == 2 + 2 * ids.shape[1]


def test_attention_that_does_not_use_its_cache_is_an_error(tiny_llama):
    attention = tiny_llama.model.layers[1].self_attn
    forward = attention.forward

    def ignoring(hidden_states, position_embeddings=None, attention_mask=None, cache=None, **options):
        return forward(hidden_states, position_embeddings, attention_mask, **options)

    attention.forward = ignoring
    attach_kv_quantization(tiny_llama, KVConfig(4))
    with pytest.raises(CheckFailed, match=r"LlamaAttention of transformers 5\S+ used its cache 0 times"):
        tiny_llama(tokens())
    detach_kv_quantization(tiny_llama)(tokens())
    attention.forward = lambda hidden_states, memory=None: None
    with pytest.raises(Unsupported, match="takes hidden_states, memory; quantised key-value caches need"):
        attach_kv_quantization(tiny_llama, KVConfig(4))
    assert attached_kv_config(tiny_llama) is None


@torch.no_grad()
def test_keys_before_rotation_are_what_the_formula_says(tiny_llama):
    """Oracle: the projections of the first layer replaced by quantised ones, by hand and in float64."""
    attention = tiny_llama.model.layers[0].self_attn
    seen: dict[str, torch.Tensor] = {}
    attention.k_proj.register_forward_hook(lambda module, inputs, output: seen.update(k=output.clone()))
    model = attach_kv_quantization(tiny_llama, KVConfig(4, scale_dtype="float32"))
    attention.k_proj.register_forward_hook(lambda module, inputs, output: seen.update(q=output.clone()))
    model(tokens())
    exact = seen["k"].double()
    peak = exact.abs().amax(-1, keepdim=True)
    expected = (exact * 7 / peak).round() * peak / 7
    torch.testing.assert_close(seen["q"].double(), expected, rtol=1e-6, atol=0)  # float32 against float64


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradient_is_straight_through(config):
    quantizer = row_quantizer(config, "llama", 2, 16, values=False)
    from edgewright.quantization.kv_cache import fake_quantize_rows

    rows = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    upstream = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    fake_quantize_rows(rows, quantizer).backward(upstream)
    assert torch.equal(rows.grad, upstream)


def test_training_reaches_the_projections(tiny_llama):
    model = attach_kv_quantization(tiny_llama, KVConfig(4))
    model(tokens(), use_cache=False).logits.square().mean().backward()
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.weight.grad.abs().sum() > 0 and attention.v_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_detach_copy_and_repeat(tiny_llama):
    expected = tiny_llama(tokens()).logits
    model = attach_kv_quantization(copy.deepcopy(tiny_llama), KVConfig(4))
    quantised = model(tokens()).logits
    copied = copy.deepcopy(model)
    assert attached_kv_config(copied) == KVConfig(4) and torch.equal(copied(tokens()).logits, quantised)
    detach_kv_quantization(model)
    assert torch.equal(model(tokens()).logits, expected)
    assert attached_kv_config(model) is None and not any(module._forward_hooks for module in model.modules())
    assert torch.equal(copied(tokens()).logits, quantised)  # the copy keeps its own hooks
    with pytest.raises(UsageError, match="detach_kv_quantization"):
        attach_kv_quantization(copied, KVConfig(8))
    with pytest.raises(UsageError, match="not quantised"):
        detach_kv_quantization(model)


@torch.no_grad()
def test_keys_stay_quantised_when_their_projection_is_replaced(tiny_llama):
    config = QuantConfig.weights("int8")
    after = attach_kv_quantization(quantize_(copy.deepcopy(tiny_llama), config), KVConfig(4))
    before = quantize_(attach_kv_quantization(copy.deepcopy(tiny_llama), KVConfig(4)), config)
    assert torch.equal(before(tokens()).logits, after(tokens()).logits)
    assert attached_kv_config(detach_kv_quantization(before)) is None


@torch.no_grad()
@pytest.mark.parametrize("config", POST, ids=str)
def test_stored_codes_give_the_fake_quantised_logits(tiny_llama, config):
    model = attach_kv_quantization(copy.deepcopy(tiny_llama), config)
    full = model(tokens()).logits
    assert torch.equal(tiny_llama(tokens(), **with_cache(QuantCache(tiny_llama.config, config))).logits, full)
    again = model(tokens(), **with_cache(QuantCache(tiny_llama.config, config))).logits
    assert torch.equal(again, full)  # quantised once, not twice
    torch.testing.assert_close(stepwise(tiny_llama, tokens(), QuantCache(tiny_llama.config, config)), full, **STEPWISE)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    stored = tiny_llama.generate(tokens(), **with_cache(QuantCache(tiny_llama.config, config)), **settings)
    assert torch.equal(stored, model.generate(tokens(), **settings))
    with pytest.raises(UsageError, match="one KVConfig"):
        model(tokens(), **with_cache(QuantCache(tiny_llama.config, KVConfig(8, when="post_rope"))))


@torch.no_grad()
def test_codes_of_a_token_never_change(tiny_llama):
    cache = QuantCache(tiny_llama.config, KVConfig(4, "head", "post_rope"))
    tiny_llama(tokens()[:, :9], **with_cache(cache))
    first = [(store.codes.clone(), store.scales.clone()) for store in cache.layers[1].stores]
    tiny_llama(tokens()[:, 9:], **with_cache(cache))
    for (codes, scales), store in zip(first, cache.layers[1].stores, strict=True):
        assert torch.equal(store.codes[:, :9], codes) and torch.equal(store.scales[:, :9], scales)


@torch.no_grad()
def test_cache_bytes_are_those_of_codes_and_scales(tiny_llama):
    heads, head_dim, layers = 2, 16, 2
    for config, bits in ((KVConfig(4, 16, "post_rope"), 4 + 16 / 16), (KVConfig(8, 8, "post_rope"), 8 + 16 / 8)):
        cache = QuantCache(tiny_llama.config, config)
        tiny_llama(tokens(), **with_cache(cache))
        assert cache.bytes_per_token() == 2 * layers * heads * head_dim * bits / 8
    with pytest.raises(UsageError, match="empty"):
        QuantCache(tiny_llama.config, config).bytes_per_token()


@torch.no_grad()
def test_cache_operations_of_generation(tiny_llama):
    cache = QuantCache(tiny_llama.config, KVConfig(4, "head", "post_rope"))
    tiny_llama(tokens(), **with_cache(cache))
    keys = cache.layers[0].stores[0].decode()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].stores[0].decode(), keys.flip(0))
    cache.layers[0].crop(-5)
    assert cache.get_seq_length() == 15
    assert torch.equal(cache.layers[0].stores[0].decode(), keys.flip(0)[:, :15])
    cache.layers[0].batch_select_indices(torch.tensor([0]))
    cache.layers[0].batch_repeat_interleave(3)
    assert cache.layers[0].stores[0].codes.shape[0] == 3
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(UsageError, match="minus the number"):
        cache.layers[0].crop(3)


@torch.no_grad()
def test_real_model_with_three_key_heads_and_llama_cpp_codecs(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The key-value cache of a phone holds many tokens.", return_tensors="pt").input_ids
    plain = model(ids).logits
    for config, ratio in ((KVConfig.llama_cpp(8), 34 / 64), (KVConfig.llama_cpp(4), 18 / 64)):
        cache = QuantCache(model.config, config)
        stored = model(ids, **with_cache(cache)).logits
        fp16 = 2 * 2 * 30 * 3 * 64  # bytes of keys and values, 30 layers of 3 heads of 64
        assert cache.bytes_per_token() == fp16 * ratio
        fake = attach_kv_quantization(copy.deepcopy(model), config)(ids).logits
        assert torch.equal(fake, stored)
        error = torch.nn.functional.kl_div(
            stored.log_softmax(-1), plain.log_softmax(-1), log_target=True, reduction="sum"
        )
        assert 0 < error / ids.shape[1] < (0.01 if config.bits == 8 else 0.5)


def test_hadamard_rotation_is_its_own_inverse():
    matrix = hadamard(64)
    torch.testing.assert_close(matrix @ matrix, torch.eye(64), rtol=0, atol=1e-6)  # float32 sums of 64 terms
    assert row_quantizer(KVConfig.llama_cpp(4), "llama", 2, 128, values=False).rotation == 128
    assert row_quantizer(KVConfig.llama_cpp(4), "llama", 2, 128, values=True).rotation == 64
    assert row_quantizer(KVConfig.llama_cpp(4), "llama", 2, 96, values=True).rotation == 0
    assert row_quantizer(KVConfig.llama_cpp(4, rotate=False), "llama", 2, 64, values=True).rotation == 0


def test_unknown_attention_is_refused_by_name(tiny_llama):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64))
    with pytest.raises(Unsupported, match="GPT2Attention"):
        attach_kv_quantization(model, KVConfig(4))
    with pytest.raises(Unsupported, match="no attention module"):
        attach_kv_quantization(nn.Linear(4, 4), KVConfig(4))
    with pytest.raises(UsageError, match="head_dim=16.*groups of 12"):
        attach_kv_quantization(tiny_llama, KVConfig(4, 12))
    assert attached_kv_config(tiny_llama) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1},
        {"bits": 17},
        {"bits": 4, "granularity": "column"},
        {"bits": 4, "granularity": 0},
        {"bits": 4, "when": "never"},
        {"bits": 4, "codec": "q5_0"},
        {"bits": 8, "codec": "q4_0", "when": "post_rope", "granularity": 32},
        {"bits": 4, "codec": "q4_0", "when": "pre_rope", "granularity": 32},
        {"bits": 4, "codec": "q4_0", "when": "post_rope", "granularity": "head"},
        {"bits": 4, "scale_dtype": "int8"},
    ],
    ids=str,
)
def test_impossible_configurations(settings):
    with pytest.raises(UsageError):
        KVConfig(**settings)


def test_quant_cache_refuses_what_it_cannot_store(tiny_llama):
    with pytest.raises(UsageError, match="post_rope"):
        QuantCache(tiny_llama.config, KVConfig(4))
    with pytest.raises(UsageError, match="QuantCache bits=12; it must be a whole number from 2 to 8"):
        QuantCache(tiny_llama.config, KVConfig(12, when="post_rope"))
