"""The edge decoder: equal to Llama and Qwen where they say the same, shared blocks, caches, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache

import edgewright
from edgewright.errors import FormatError, UsageError
from edgewright.io.transformers_names import cache_of, checkpoint_activations, with_cache
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, new_decoder
from tests.toy_llama import make_byte_tokenizer, make_tiny_llama

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config(**changes: Any) -> EdgeDecoderConfig:
    return EdgeDecoderConfig(**{**SHAPE, "num_hidden_layers": 2, **changes})


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def unrolled(model: EdgeDecoderForCausalLM) -> EdgeDecoderForCausalLM:
    """The same model with every executed layer stored for itself."""
    c = model.config
    assert c.share_map is not None
    wide = new_decoder(config(num_hidden_layers=c.num_hidden_layers, mixers=c.mixers, sliding_window=c.sliding_window))
    state = {k: v for k, v in model.state_dict().items() if ".layers." not in k}
    for layer, block in enumerate(c.share_map):
        part = model.model.layers[block].state_dict()
        state |= {f"model.layers.{layer}.{name}": value for name, value in part.items()}
    wide.load_state_dict(state)
    return wide


def test_it_is_llama() -> None:
    llama = make_tiny_llama()
    c = llama.config
    model = new_decoder(
        EdgeDecoderConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters=dict(c.rope_parameters),
            tie_word_embeddings=c.tie_word_embeddings,
        )
    )
    assert model.load_state_dict(llama.state_dict(), strict=True)
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, llama(input_ids=ids).logits)
        labels = tokens(seed=1)
        torch.testing.assert_close(model(ids, labels=labels).loss, llama(ids, labels=labels).loss)


def test_it_is_qwen3_with_normalised_heads() -> None:
    theirs = Qwen3Config(**SHAPE, num_hidden_layers=2, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        qwen = Qwen3ForCausalLM(theirs).eval()
        for layer in qwen.model.layers:
            torch.nn.init.uniform_(layer.self_attn.q_norm.weight, 0.5, 1.5)
    model = new_decoder(config(qk_norm="rms", rope_parameters=dict(theirs.rope_parameters)))
    model.load_state_dict(qwen.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, qwen(tokens()).logits)


def test_norm_without_weights_is_norm_with_ones() -> None:
    """It comes before the rotation here and after it in Llama 4: a rotation keeps the length of a head."""
    plain, weighted = new_decoder(config(qk_norm="l2")), new_decoder(config(qk_norm="rms"))
    weighted.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens()).logits, weighted(tokens()).logits)


def test_interleaved_rows_are_permuted_halves() -> None:
    halves = new_decoder(config())
    pairs = new_decoder(config(rope_interleaved=True))
    state = halves.state_dict()
    for name in list(state):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = state[name].unflatten(0, (-1, 2, 8))  # [heads, half, h / 2, d]
            state[name] = rows.transpose(1, 2).flatten(0, 2)
    pairs.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(halves(tokens()).logits, pairs(tokens()).logits)


def test_a_block_that_runs_twice_is_two_equal_blocks() -> None:
    shared = new_decoder(config(num_hidden_layers=None, share_map=[0, 0, 1, 1]))
    wide = unrolled(shared)
    ids = tokens()
    ours, theirs = shared(ids, labels=ids), wide(ids, labels=ids)
    assert torch.equal(ours.logits, theirs.logits)
    ours.loss.backward()
    theirs.loss.backward()
    for block in range(2):
        for name, weight in shared.model.layers[block].named_parameters():
            copies = [wide.model.layers[layer].get_parameter(name).grad for layer in (2 * block, 2 * block + 1)]
            torch.testing.assert_close(weight.grad, copies[0] + copies[1])  # type: ignore[operator]


MIXTURES = {
    "plain": {},
    "shared": {"num_hidden_layers": None, "share_map": [0, 0, 1, 1]},
    "windows": {"mixers": ["sliding_attention", "full_attention"], "sliding_window": 5},
    "skipping": {"mixers": ["full_attention", "skip_attention", "full_attention"], "num_hidden_layers": 3},
    "uneven": {"intermediate_size": [96, 32], "num_attention_heads": [4, 2], "num_key_value_heads": [2, 1]},
    "attention only": {"ffn_types": "none"},
    "untied": {"tie_word_embeddings": False, "qkv_bias": True, "qk_norm": "l2", "rope_interleaved": True},
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_generation_is_the_same_with_a_cache(name: str, tmp_path: Path) -> None:
    model = new_decoder(config(**MIXTURES[name])).eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0  # the second prompt is shorter
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(), use_cache=False, **options)
    assert torch.equal(model.generate(tokens(), **options), expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(tokens(), **options), expected)
    kept, made = ({**m.config.to_dict(), "_name_or_path": ""} for m in (again, model))
    assert kept == made


def test_a_window_forgets_and_keeps_its_cache_small() -> None:
    model = new_decoder(config(mixers="sliding_attention", sliding_window=4, num_hidden_layers=1)).eval()
    ids = tokens(1, 12)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 256
    with torch.no_grad():
        a, b = model(ids, use_cache=True), model(other)
    assert not torch.equal(a.logits[:, :4], b.logits[:, :4])
    torch.testing.assert_close(a.logits[:, 4:], b.logits[:, 4:])
    assert cache_of(a).layers[0].keys.shape[-2] < 4 + 1


def test_a_skipped_layer_keeps_nothing() -> None:
    model = new_decoder(config(mixers=["full_attention", "skip_attention"]))
    cache = cache_of(model(tokens(), use_cache=True))
    assert cache.layers[0].keys.shape[-2] == 12 and cache.layers[1].keys is None
    assert not any("layers.1.self_attn" in name or "layers.1.input_layernorm" in name for name in model.state_dict())


def test_checkpointing_changes_no_gradient() -> None:
    model = new_decoder(config(share_map=[0, 0, 1], num_hidden_layers=3)).train()
    model(tokens(), labels=tokens()).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    checkpoint_activations(model)
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_the_seed_decides_the_weights() -> None:
    state = torch.get_rng_state()
    one, same, other = new_decoder(config(), 1), new_decoder(config(), 1), new_decoder(config(), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight is one.model.embed_tokens.weight
    assert float(one.model.layers[0].mlp.up_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_the_published_125m_has_its_parameters() -> None:
    with torch.device("meta"):
        model = EdgeDecoderForCausalLM(EdgeDecoderConfig(num_hidden_layers=30, num_key_value_heads=3))
    names = {name: p.numel() for name, p in model.named_parameters() if name != "lm_head.weight"}
    assert sum(names.values()) == 124_635_456


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"share_map": [0, 2]}, r"share_map=\[0, 2\] must name every stored block from 0 to 2"),
        ({"share_map": [0, 2**31]}, "must name every stored block from 0 to"),
        ({"share_map": [0, -1]}, "share_map"),
        ({"share_map": [0]}, "share_map has 1 entries for num_hidden_layers=2"),
        ({"share_map": [0, 0], "intermediate_size": [96, 32]}, "runs block 0 as layers 0 and 1, which differ"),
        ({"mixers": ["full_attention"]}, "mixers has 1 entries for num_hidden_layers=2"),
        ({"mixers": "mamba"}, "mixers='mamba'; it must be one of full_attention"),
        ({"mixers": "sliding_attention"}, "sliding_window is not set"),
        ({"ffn_types": "glu"}, "ffn_types='glu'"),
        ({"ffn_types": "moe"}, "moe is not set"),
        ({"intermediate_size": [96]}, "intermediate_size has 1 entries"),
        ({"hidden_size": 63}, "hidden_size=63 is not a multiple"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"qk_norm": "l1"}, "qk_norm='l1'"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
    ],
)
def test_what_cannot_be_built_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)


def test_ids_and_lengths_are_checked() -> None:
    model = new_decoder(config(max_position_embeddings=16)).eval()
    for bad in (-1, 256):
        with pytest.raises(UsageError, match=f"input_ids hold {bad}; the vocabulary is 0 to 255"):
            model(torch.tensor([[1, bad]]))
    with pytest.raises(UsageError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.warns(UserWarning, match="20 tokens are more than the model was made for"):
        model(tokens(1, 20))
    cache = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(UsageError, match="12 tokens do not fit into a cache of 8"):
        model(tokens(1, 12), **with_cache(cache))


def save_with_tokenizer(model: EdgeDecoderForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)


def test_load_knows_the_house_s_own_class(tmp_path: Path) -> None:
    """In a fresh interpreter, where nothing has imported the decoder yet."""
    model = new_decoder(config(share_map=[0, 0]))
    save_with_tokenizer(model, tmp_path)
    code = f"import edgewright; m, _ = edgewright.load({str(tmp_path)!r}); print(type(m).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "EdgeDecoderForCausalLM\n", done.stderr[-500:]


def test_a_missing_head_is_the_table(tmp_path: Path) -> None:
    model = new_decoder(config())
    save_with_tokenizer(model, tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    with pytest.warns(UserWarning, match="no lm_head.weight: its head is taken to be the embedding table"):
        loaded, _ = edgewright.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    save_with_tokenizer(new_decoder(config(tie_word_embeddings=False)), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(FormatError, match="'lm_head.weight' and 'model.embed_tokens.weight' differ"):
        edgewright.load(tmp_path)
