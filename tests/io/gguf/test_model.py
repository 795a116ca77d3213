"""GGUF -> transformers: equal to the model written, close to llama.cpp, saved and reloaded bit for bit."""

from __future__ import annotations

import time

import gguf
import numpy as np
import pytest
import torch

from edgewright.errors import FormatError, Unsupported
from edgewright.io.gguf.model import gguf_config, load_gguf, unpermute
from edgewright.io.gguf.reader import GGUFFile

IDS = [1, 40, 262, 77, 5, 100, 261, 90, 33, 12, 200, 7]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_model_equals_the_one_written(tiny, write_gguf, architecture, tied):
    model = tiny(architecture, tie_word_embeddings=tied)
    loaded, _ = load_gguf(write_gguf(model))
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not loaded.training
    ids = torch.tensor([IDS])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_agree_with_llama_cpp(tiny, write_gguf, architecture):
    from edgewright.runtime.llamacpp import LlamaCppEngine

    path = write_gguf(tiny(architecture))
    model, _ = load_gguf(path)
    with torch.no_grad():
        ours = model(torch.tensor([IDS])).logits[0].numpy()
    with LlamaCppEngine(path, context=512, threads=1) as engine:
        theirs = engine.logits(IDS)
    # llama.cpp keeps keys and values in fp16 (relative error 2^-11); a wrong row order or norm gives errors near 1.
    np.testing.assert_allclose(ours, theirs, atol=5e-3 * np.abs(ours).max())


def test_biases_of_llama_models(tiny, write_gguf):
    model = tiny("llama", attention_bias=True)
    loaded, _ = load_gguf(write_gguf(model))
    assert loaded.config.attention_bias
    with torch.no_grad():
        assert torch.equal(loaded(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits)


def test_linear_rotary_scaling(tiny, write_gguf):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny("llama", rope_parameters=rope)
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    loaded, _ = load_gguf(write_gguf(model, extra=extra))
    with torch.no_grad():
        assert torch.equal(loaded(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits)


def test_llama3_rotary_scaling_is_recovered_from_its_divisors(tiny, write_gguf):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=131072)
    plain = 500000.0 ** -(np.arange(8) / 8)
    divisors = (plain / model.model.rotary_emb.inv_freq.double().numpy()).astype(np.float32)
    assert divisors.max() > 31
    loaded, _ = load_gguf(write_gguf(model, tensors={"rope_freqs.weight": divisors}))
    assert loaded.config.rope_parameters == rope
    with torch.no_grad():
        assert torch.equal(loaded(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits)
    divisors[3] *= 1.1
    with pytest.raises(Unsupported, match="rotary divisors"):
        load_gguf(write_gguf(model, name="odd.gguf", tensors={"rope_freqs.weight": divisors}))


def test_unpermute_pairs_to_halves():
    rows = np.array([[10], [11], [12], [13], [20], [21], [22], [23]])
    assert unpermute(rows, 2)[:, 0].tolist() == [10, 12, 11, 13, 20, 22, 21, 23]


def test_dtype_is_applied_to_every_weight(tiny, write_gguf):
    model, _ = load_gguf(write_gguf(tiny()), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_smollm2_weights_are_the_reference_decoders(smollm2, smollm2_path):
    model, _ = smollm2
    state = model.state_dict()
    file = GGUFFile(smollm2_path)
    layer = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names |= {
        f"blk.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight" for i in (0, 29) for ours, theirs in layer.items()
    }
    for name, place in names.items():
        tensor = file.tensors[name]
        rows = file.raw(name).reshape(tensor.shape[0], -1) if len(tensor.shape) == 2 else file.raw(name)
        expected = gguf.dequantize(np.asarray(rows), gguf.GGMLQuantizationType(tensor.type_id))
        ours = state[place].numpy()
        if "attn_q" in name or "attn_k" in name:
            ours = ours.reshape(-1, 2, 32, 576).swapaxes(1, 2).reshape(ours.shape)  # heads of 64, back to pairs
        assert np.array_equal(ours, expected.reshape(ours.shape)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_smollm2_agrees_with_llama_cpp(smollm2, smollm2_path):
    from edgewright.runtime.llamacpp import LlamaCppEngine

    model, tokenizer = smollm2
    text = "The quick brown fox jumps over the lazy dog. Python is a language in which one can write 12345 programs."
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    with LlamaCppEngine(smollm2_path, context=512, threads=2) as engine:
        theirs = torch.from_numpy(engine.logits(ids)).log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    # llama.cpp rounds the activations of each matrix product to 8 bits; two different models differ by 0.1 and more.
    assert kl.mean() < 0.01
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9


def test_smollm2_saves_and_reloads_to_the_same_bits(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.generation_config.eos_token_id == 2 and again.generation_config.pad_token_id == 2
    assert again.config.rope_parameters == model.config.rope_parameters
    tokenizer_again = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn x+12345  # naïve 日本語 😀\r\n<|im_start|>user\nDon't<|im_end|>  "
    ids = tokenizer(text)["input_ids"]
    assert tokenizer_again(text)["input_ids"] == ids
    assert tokenizer_again.decode(ids) == tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "Hello 7"}]
    assert tokenizer_again.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert tokenizer_again.special_tokens_map == tokenizer.special_tokens_map
    with torch.no_grad():
        assert torch.equal(again(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


def test_smollm2_loads_within_five_seconds_of_cpu_time(smollm2, smollm2_path):
    # CPU seconds of all threads, about 1.5, rather than the clock, because other work may share the machine.
    start = time.process_time()
    load_gguf(smollm2_path)
    assert time.process_time() - start <= 5


@pytest.mark.parametrize(
    ("extra", "error", "words"),
    [
        ({"general.architecture": "mamba"}, Unsupported, "architecture 'mamba'"),
        ({"llama.expert_count": 8}, Unsupported, "expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, Unsupported, "rotary scaling 'yarn'"),
        ({"llama.rope.dimension_count": 8}, Unsupported, "rope.dimension_count = 8"),
        ({"llama.block_count": 4_000_000_000}, FormatError, "block_count = 4000000000"),
        ({"llama.block_count": 3}, FormatError, "no tensor 'blk.2.attn_norm.weight'"),
        ({"llama.block_count": 1}, Unsupported, "tensor 'blk.1."),
        ({"llama.feed_forward_length": 128}, FormatError, "ffn_gate.weight.*instead of"),
        ({"llama.attention.head_count": 0}, FormatError, "head_count = 0"),
        ({"llama.attention.head_count_kv": 3}, FormatError, "head_count_kv"),
        ({"llama.context_length": "long"}, FormatError, "context_length = long"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, FormatError, "epsilon = nan"),
        ({"tokenizer.ggml.eos_token_id": 99999}, FormatError, "eos_token_id = 99999"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(tiny, write_gguf, extra, error, words, monkeypatch):
    original = GGUFFile.__init__

    def changed(self, path):
        original(self, path)
        self.metadata.update(extra)

    monkeypatch.setattr(GGUFFile, "__init__", changed)
    with pytest.raises(error, match=words):
        load_gguf(write_gguf(tiny()))


def test_config_matches_smollm2(smollm2_path):
    config = gguf_config(GGUFFile(smollm2_path))
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (30, 576, 3)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert config.rms_norm_eps == 1e-5 and config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
