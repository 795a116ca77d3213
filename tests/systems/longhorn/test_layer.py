"""The Longhorn layer in the edge decoder: caches, padding, packed documents, int8 states, snapshots, presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from edgewright.errors import Unsupported, UsageError
from edgewright.io.transformers_names import cache_name, cache_of, with_cache
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, new_decoder
from edgewright.models.decoder.state_cache import HAS_STATES, StateCache, pack_state, restore, snapshot, unpack_state
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.longhorn.export import NO_GGUF, export_longhorn
from edgewright.systems.longhorn.layer import Longhorn, LonghornConfig, longhorn_config, longhorn_step
from edgewright.training.optimizer import parameter_groups

MIXTURES: dict[str, list[str]] = {
    "pure": ["longhorn"] * 2,
    "with attention": ["longhorn", "full_attention", "longhorn"],
    "with a window": ["sliding_attention", "longhorn"],
    "with a skip": ["longhorn", "skip_attention"],
}


def config(mixers: list[str], **longhorn: Any) -> EdgeDecoderConfig:
    return EdgeDecoderConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        mixers=mixers,
        ffn_types="none",
        sliding_window=5,
        longhorn=longhorn or None,
    )


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def layer(seed: int = 0, width: int = 16, **fields: Any) -> Longhorn:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Longhorn(width, LonghornConfig(**fields))


def inputs(batch: int, length: int, width: int = 16) -> torch.Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(3))


def single_cache() -> StateCache:
    return StateCache(config(["longhorn"]))


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("fields", [{}, {"mode": "exact"}], ids=["diagonal", "exact"])
def test_generation_is_the_same_with_a_cache(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = new_decoder(config(MIXTURES[name], **fields)).eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0  # the second prompt is shorter
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(), use_cache=False, **options)
    assert torch.equal(model.generate(tokens(), **options), expected)
    assert torch.equal(
        model.generate(tokens(), cache_implementation="static", disable_compile=True, **options), expected
    )
    options[cache_name()] = DynamicCache(config=model.config)
    assert torch.equal(model.generate(tokens(), **options), expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    options[cache_name()] = None
    assert torch.equal(again.generate(tokens(), **options), expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_beams_take_their_states_along(name: str) -> None:
    model = new_decoder(config(MIXTURES[name])).eval()
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(), use_cache=False, **options)
    assert torch.equal(model.generate(tokens(), **options), expected)


def test_a_text_in_pieces_is_the_text() -> None:
    mixer, h = layer(), inputs(2, 17)
    whole = mixer(h)
    cache = single_cache()
    pieces, start = [], 0
    for length in (1, 2, 5, 1, 7, 1):
        pieces.append(mixer(h[:, start : start + length], None, cache, 0))
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("length", [1, 3, 12])
def test_a_padded_row_is_the_row(length: int) -> None:
    """Pads leave state and window as they are: the same numbers as without them, also in what follows."""
    mixer, h = layer(), inputs(2, length + 4)
    mask = torch.ones(2, length + 4)
    mask[:, :4] = 0
    padded, alone = single_cache(), single_cache()
    torch.testing.assert_close(mixer(h, mask, padded, 0)[:, 4:], mixer(h[:, 4:], None, alone, 0))
    more = torch.cat([mask, torch.ones(2, 1)], 1)
    torch.testing.assert_close(mixer(h[:, :1], more, padded, 0), mixer(h[:, :1], None, alone, 0))


def test_packed_documents_do_not_see_each_other() -> None:
    mixer, h = layer(), inputs(1, 20)
    reset = torch.zeros(1, 20).bool()
    reset[:, [0, 2, 9, 10]] = True
    packed = mixer(h, reset=reset)
    alone = [mixer(part) for part in h.split([2, 7, 1, 10], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    cache = single_cache()
    mixer(h[:, :1], None, cache, 0)
    torch.testing.assert_close(mixer(h, None, cache, 0, reset), packed)  # a cache from before is forgotten too


def test_reset_reaches_the_layers_of_a_model() -> None:
    model = new_decoder(config(["longhorn"] * 2)).eval()
    ids = tokens(1, 12)
    reset = torch.zeros(1, 12).bool()
    reset[:, 7] = True
    torch.testing.assert_close(model(ids, reset=reset).logits[:, 7:], model(ids[:, 7:]).logits)


@pytest.mark.parametrize("name", ["with attention", "with a window", "attention alone"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_the_documents_in_a_hybrid(name: str, attention: str) -> None:
    model = new_decoder(config(MIXTURES.get(name, ["full_attention"] * 2))).eval()
    model.set_attn_implementation(attention)
    places: list[torch.Tensor] = []
    model.model.rotary_emb.register_forward_pre_hook(lambda _, args: places.append(args[1]))
    ids, sizes = tokens(2, 18), ([7, 1, 10], [3, 12, 3])
    reset = torch.zeros(2, 18).bool()
    for row, parts in enumerate(sizes):
        reset[row, torch.tensor([0, *parts[:-1]]).cumsum(0)] = True
    with torch.no_grad():
        output = model(ids, reset=reset, use_cache=True)
        packed = output.logits
        assert cache_of(output) is None
        assert places[0].tolist() == [[i for part in parts for i in range(part)] for parts in sizes]
        for row, parts in enumerate(sizes):
            alone = [model(part[None]).logits[0] for part in ids[row].split(parts)]
            torch.testing.assert_close(packed[row], torch.cat(alone))
        with pytest.raises(UsageError, match="give no cache with it"):
            model(ids, reset=reset, **with_cache(StateCache(model.config)))
        with pytest.raises(UsageError, match=r"reset is torch.bool \[1, 18\]; give bool \[2, 18\]"):
            model(ids, reset=reset[:1])


def test_convolution_and_gate_are_mamba_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """With both recurrences made to hand on their input, the layers are the same function."""
    mixer, h = layer(), inputs(2, 9)
    theirs = MambaMixer(
        MambaConfig(hidden_size=16, state_size=16, conv_kernel=4, expand=2, time_step_rank=1, num_hidden_layers=1), 0
    ).eval()
    state = theirs.state_dict()
    state.update({k: v for k, v in mixer.state_dict().items() if k.split(".")[0] in ("in_proj", "conv1d", "out_proj")})
    state["x_proj.weight"].zero_()  # B and C are 0, so the scan gives 0 and D times its input remains
    state["D"].fill_(1)
    theirs.load_state_dict(state)
    monkeypatch.setattr("edgewright.systems.longhorn.layer.longhorn_scan", lambda x, *a, **k: (x, x))
    torch.testing.assert_close(mixer(h), theirs(h))


def test_the_published_parameter_counts() -> None:
    mixer = Longhorn(768)
    norm = 768
    assert sum(p.numel() for p in mixer.parameters()) + norm == 3_747_072
    with torch.device("meta"):
        model = EdgeDecoderForCausalLM(longhorn_config("120M"))
    assert sum(p.numel() for name, p in model.named_parameters() if name != "lm_head.weight") == 128_533_248
    assert model.config.vocab_size == 50264 and longhorn_config("350M").num_hidden_layers == 48
    with pytest.raises(UsageError, match="Longhorn model='7B'; it must be one of 120M, 350M, 1.3B"):
        longhorn_config("7B")


def test_weights_begin_as_published() -> None:
    model = new_decoder(config(["longhorn"] * 4))
    mixer = model.model.layers[0].longhorn
    assert not mixer.beta_proj.bias.any() and torch.equal(mixer.D, torch.ones(64))
    assert float(mixer.conv1d.bias.detach().abs().max()) == pytest.approx(0.5, rel=0.1)
    for linear, fan_in, divisor in ((mixer.in_proj, 32, 1), (mixer.x_proj, 64, 1), (mixer.out_proj, 64, 4**0.5)):
        bound = fan_in**-0.5 / divisor  # Kaiming-uniform with a = sqrt(5)
        assert float(linear.weight.detach().abs().max()) == pytest.approx(bound, rel=0.02)
    assert float(model.model.embed_tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_weight_decay_leaves_d_and_biases_alone() -> None:
    model = new_decoder(config(["longhorn"]))
    free = {id(p) for group in parameter_groups(model, 0.1) if not group["weight_decay"] for p in group["params"]}
    names = {name.rsplit("longhorn.")[-1] for name, p in model.named_parameters() if id(p) in free}
    assert names >= {"D", "beta_proj.bias", "conv1d.bias"} and not any(n.endswith("proj.weight") for n in names)


def test_every_weight_learns() -> None:
    model = new_decoder(config(["longhorn"] * 2)).train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_a_snapshot_goes_back() -> None:
    for mixers in (["longhorn"] * 2, ["longhorn", "full_attention"], ["sliding_attention", "longhorn"]):
        model = new_decoder(config(mixers)).eval()
        cache = StateCache(model.config)
        with torch.no_grad():
            model(tokens(), **with_cache(cache))
            kept = snapshot(cache)
            expected = model(tokens(seed=1), **with_cache(cache)).logits
            for _ in range(2):
                restore(cache, kept)
                assert cache.get_seq_length() == 12
                assert torch.equal(model(tokens(seed=1), **with_cache(cache)).logits, expected)
    with pytest.raises(UsageError, match="the snapshot has 2 layers and the cache 1"):
        restore(single_cache(), kept)


def test_memory_does_not_grow() -> None:
    model = new_decoder(config(["longhorn"] * 2)).eval()
    cache = StateCache(model.config)
    sizes = []
    with torch.no_grad():
        for length in (3, 60, 1):
            model(tokens(1, length), **with_cache(cache))
            sizes.append(snapshot(cache).bytes)
    d, m, w = 64, 16, 4
    assert sizes == [2 * 4 * d * (m + w)] * 3


def test_an_int8_state_is_a_quarter_and_stays_near() -> None:
    """4000 tokens, rounded after each: the error does not grow with the length, decays forget it."""
    generator = torch.Generator().manual_seed(0)
    d, m, T = 8, 16, 4000
    x, k, q = (torch.randn(T, 1, n, generator=generator) for n in (d, m, m))
    beta = torch.rand(T, 1, d, generator=generator)
    exact = rounded = torch.zeros(1, d, m)
    errors, sizes = [], []
    for t in range(T):
        y, exact = longhorn_step(x[t], k[t], q[t], beta[t], None, exact)
        y8, rounded = longhorn_step(x[t], k[t], q[t], beta[t], None, rounded)
        rounded = unpack_state(pack_state(rounded, "int8"))  # type: ignore[assignment]
        errors.append(float((y8 - y).square().mean()))
        sizes.append(float(y.square().mean()))
    first, last = sum(errors[100:1000]) / sum(sizes[100:1000]), sum(errors[-900:]) / sum(sizes[-900:])
    assert 0 < last < 2 * first and last**0.5 < 0.02
    packed = pack_state(exact, "int8")
    assert packed.dtype == torch.int8 and packed.shape == (1, d, m + 4)
    again = pack_state(unpack_state(packed), "int8")  # type: ignore[arg-type]
    assert torch.equal(again[..., :m], packed[..., :m])  # rounding twice is rounding once
    assert not unpack_state(pack_state(torch.zeros(1, 2, 3), "int8")).any()  # type: ignore[union-attr]


def test_int8_states_generate_and_follow_beams() -> None:
    model = new_decoder(config(["longhorn"] * 2, state_dtype="int8")).eval()
    plain = new_decoder(config(["longhorn"] * 2)).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        caches = [StateCache(model.config) for _ in range(2)]
        for ids in (tokens(), tokens(2, 1)):
            ours, theirs = (m(ids, **with_cache(c)).logits for m, c in zip((model, plain), caches, strict=True))
        error = (ours - theirs).norm() / theirs.norm()
    assert 0 < float(error) < 0.02
    assert model.generate(tokens(), max_new_tokens=4, num_beams=2, pad_token_id=0).shape == (2, 16)


def test_projections_are_quantised_by_name() -> None:
    model = new_decoder(config(["longhorn"] * 2)).eval()
    rules = tuple(Rule(f"*longhorn.{name}", WeightConfig("int8")) for name in ("in_proj", "x_proj", "out_proj"))
    with torch.no_grad():
        expected = model(tokens()).logits
        quantize_(model, QuantConfig(rules=rules))
        convert_(model)
        found = model(tokens()).logits
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.03


def test_a_mixed_shared_block_keeps_states_apart() -> None:
    shared = EdgeDecoderConfig(
        vocab_size=96, hidden_size=32, num_attention_heads=4, mixers="longhorn", ffn_types="none", share_map=[0, 0, 1]
    )
    model = new_decoder(shared).eval()
    expected = model.generate(tokens(), use_cache=False, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(tokens(), max_new_tokens=6, do_sample=False, pad_token_id=0), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_state": 0}, "d_state=0; it must be a whole number from 1 up"),
        ({"dt_rank": "wide"}, "dt_rank='wide'; it must be a whole number from 1 up; or 'auto'"),
        ({"mode": "fast"}, "mode='fast'; it must be one of diagonal, exact"),
        ({"state_dtype": "int4"}, "state_dtype='int4'; it must be one of float32, int8"),
        ({"fixed_beta": -1.0}, "fixed_beta=-1.0; it must be a number at least 0, or None"),
    ],
)
def test_what_cannot_be_built_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LonghornConfig(**fields)


def test_bad_calls_are_one_sentence(tmp_path: Path) -> None:
    mixer, h = layer(), inputs(2, 6)
    interior = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for mask, message in (
        (interior, "padding behind a real token; .* set tokenizer.padding_side = 'left'"),
        (torch.ones(2, 5), r"takes \[2, 6 or more\]"),
        (torch.ones(2, 1, 6, 6), r"the attention mask is \(2, 1, 6, 6\)"),
    ):
        with pytest.raises(UsageError, match=message):
            mixer(h, mask)
    cache = single_cache()
    mixer(h, None, cache, 0)
    with pytest.raises(UsageError, match="the cache holds 2 sequences and the input 1"):
        mixer(h[:1], None, cache, 0)
    with pytest.raises(UsageError, match="the cache is on cpu and the input on meta"):
        mixer(h.to("meta"), None, cache, 0)
    cache.get_recurrent_state(0).fill_(float("nan"))
    with pytest.raises(UsageError, match="the cache holds NaN or infinity"):
        mixer(h, None, cache, 0)
    model = new_decoder(config(["longhorn"]))
    used = DynamicCache(config=model.config)
    if HAS_STATES:
        model(tokens(), **with_cache(used))
        with pytest.raises(UsageError, match="go on from a StateCache"):
            model.generate(tokens(), **with_cache(used), max_new_tokens=1)
    else:
        with pytest.raises(UsageError, match="keeps no states; make a StateCache"):
            model(tokens(), **with_cache(used))
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(tokens(1), assistant_model=model, max_new_tokens=2)
    with pytest.raises(Unsupported, match=NO_GGUF[:60].replace("(", r"\(")):
        export_longhorn(model, tmp_path, to="gguf")
    with pytest.raises(UsageError, match="to='tflite'; it must be one of executorch, onnx"):
        export_longhorn(model, tmp_path, to="tflite")
    with pytest.raises(Unsupported, match="mixes full_attention, longhorn"):
        export_longhorn(new_decoder(config(["longhorn", "full_attention"])), tmp_path)
    with pytest.raises(Unsupported, match="states of exported files are float32"):
        export_longhorn(new_decoder(config(["longhorn"], state_dtype="int8")), tmp_path)
