"""STEM layers: the formula, their gradients, which layers, conversion of a dense model, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from edgewright.errors import Unsupported, UsageError
from edgewright.models.decoder.footprint import footprint
from edgewright.models.decoder.model import new_decoder
from edgewright.models.decoder.native import NotRepresentable, to_native
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.stem.convert import capacity_report, saved_share, stemify, token_means
from edgewright.systems.stem.files import StemDecodeProgram, decode_rows, export_stem
from edgewright.systems.stem.layer import StemConfig, StemFeedForward, check_first, stem_blocks, stem_layers, with_stem
from edgewright.systems.stem.studies import row_cosine
from tests.systems.stem.toys import config, dense, logits, stem, tokens


@pytest.mark.parametrize("replace", ["up", "gate", "add"])
def test_the_formula(replace: str) -> None:
    layer: Any = stem_blocks(stem(replace=replace))[1].double()
    u = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = tokens(2, 5)
    y = layer(u, ids)
    for b in range(2):
        for t in range(5):
            row = layer.table.weight[ids[b, t]]
            if replace == "gate":
                hidden = (layer.up_proj.weight @ u[b, t]) * F.silu(row)
            else:
                up = row if replace == "up" else layer.up_proj.weight @ u[b, t] + row
                hidden = F.silu(layer.gate_proj.weight @ u[b, t]) * up
            torch.testing.assert_close(y[b, t], layer.down_proj.weight @ hidden)


def test_rows_that_are_absent_have_no_gradient() -> None:
    model, ids = stem(), tokens(1, 6)
    model(ids, labels=ids).loss.backward()
    for layer in stem_blocks(model).values():
        gradient: Any = layer.table.weight.grad  # type: ignore[union-attr]
        seen = gradient.abs().sum(1) > 0
        # the last token predicts nothing here
        assert set(seen.nonzero().flatten().tolist()) == set(ids[0, :-1].tolist())


def test_the_row_is_that_of_the_input_token_not_of_the_next() -> None:
    model, ids = stem(), tokens(1, 6)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % 64
    assert torch.equal(logits(model, ids)[:, :-1], logits(model, other)[:, :-1])


def test_added_rows_of_zero_are_the_dense_block() -> None:
    model, ids = dense(), tokens()
    assert torch.equal(logits(stemify(model, [1, 3], stem=StemConfig("add")), ids), logits(model, ids))


def test_initial_values() -> None:
    config_ = with_stem(config(hidden_size=64, intermediate_size=512, vocab_size=512), [1])
    layer: Any = stem_blocks(new_decoder(config_).requires_grad_(False))[1]
    assert float(layer.table.weight.std()) == pytest.approx((2 / 1024) ** 0.5, rel=0.02)
    # a normal distribution cut at 3 standard deviations has 0.9866 of its width
    assert float(layer.gate_proj.weight.std()) == pytest.approx(0.9866 * 64**-0.5, rel=0.02)
    assert float(layer.gate_proj.weight.abs().max()) <= 3 * 64**-0.5
    assert float(layer.down_proj.weight.std()) == pytest.approx(0.9866 * 512**-0.5 / 8**0.5, rel=0.02)
    assert row_cosine(layer.table.weight) < 0.1


@pytest.mark.parametrize("name", ["plain", "shared"])
def test_generation_is_the_same_with_a_cache_and_after_loading(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    changes = {"shared": {"share_map": [0, 1, 1, 2], "num_hidden_layers": None}}.get(name, {})
    model = stem(layers=[1], **changes)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(), use_cache=False, **options)
    assert torch.equal(model.generate(tokens(), **options), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).generate(tokens(), **options), expected)


@pytest.mark.parametrize(
    ("count", "share", "layers"),
    [(6, "1/3", [1, 5]), (8, "1/2", [1, 3, 5, 7]), (5, "all", [1, 2, 3, 4]), (30, 0.01, [1]), (6, [4, 2], [2, 4])],
)
def test_which_layers(count: int, share: Any, layers: list[int]) -> None:
    assert stem_layers(count, share) == layers


def test_shared_blocks_change_together() -> None:
    shared = config(share_map=[0, 1, 1, 2], num_hidden_layers=None)
    assert with_stem(shared, [2]).ffn_types == ["mlp", "stem", "stem", "mlp"]


def without_attention(model: Any) -> Any:
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return model


def test_conversion_is_lossless_where_the_state_depends_on_the_token_alone() -> None:
    model = without_attention(dense())
    ids = tokens(2, 20)
    converted = stemify(model, "1/2", [ids[:1], {"input_ids": ids[1:]}], "calibrated")
    # a mean of equal vectors, added one by one, is that vector up to rounding
    torch.testing.assert_close(logits(converted, ids), logits(model, ids), rtol=3e-5, atol=3e-6)
    mean = stemify(model, "1/2", [ids], "mean")
    assert not torch.allclose(logits(mean, ids), logits(model, ids), atol=1e-3)


def test_calibrated_rows_are_the_means_of_the_dense_up_projection() -> None:
    model, ids = dense(), tokens(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    kept: list[Any] = []
    handle = model.model.layers[2].mlp.up_proj.register_forward_hook(lambda *a: kept.append(a[2].double()))
    with torch.no_grad():
        model(ids, attention_mask=mask)
    handle.remove()
    converted = stemify(model, [2], [{"input_ids": ids, "attention_mask": mask}], "calibrated")
    table: Any = stem_blocks(converted)[2].table.weight  # type: ignore[union-attr]
    real = mask.bool()
    for token in range(64):
        here = (ids == token) & real
        if here.any():
            torch.testing.assert_close(table[token].double(), kept[0][here].mean(0), rtol=1e-5, atol=1e-6)
        else:
            layer = model.model.layers[2]
            u = layer.post_attention_layernorm(model.model.embed_tokens.weight[token])
            torch.testing.assert_close(table[token], layer.mlp.up_proj(u), rtol=1e-5, atol=1e-6)


def test_weighted_rows_are_least_squares_behind_the_gate() -> None:
    """With one token in the text and no prior: the row r that brings SiLU(gate) * r nearest to SiLU(gate) * up."""
    model, kept = dense(), {}
    mlp = model.model.layers[2].mlp
    handles = [
        getattr(mlp, name).register_forward_hook(lambda *a, name=name: kept.__setitem__(name, a[2].detach().double()))
        for name in ("gate_proj", "up_proj")
    ]
    ids = torch.tensor([[7] * 9 + [5]])
    means = token_means(model, [2], [ids])[2]
    for handle in handles:
        handle.remove()
    gate, up = F.silu(kept["gate_proj"][0, :9]), kept["up_proj"][0, :9]
    best = torch.stack([torch.linalg.lstsq(gate[:, [i]], (gate * up)[:, [i]]).solution[0, 0] for i in range(48)])
    seven, unseen = torch.tensor([7]), torch.tensor([5])
    torch.testing.assert_close(means.weighted_means(seven, prior=0.0)[0].double(), best, rtol=1e-4, atol=1e-5)
    far = means.weighted_means(unseen, prior=1e6)[0]  # a token that weighs nothing beside the prior
    torch.testing.assert_close(far, means.weighted_mean(), rtol=1e-4, atol=1e-5)


def test_conversion_leaves_the_dense_model_alone_and_takes_a_native_one(tiny_llama: Any) -> None:
    state = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    ids = tokens(2, 10, vocabulary=256)
    converted = stemify(tiny_llama, [1], [ids], dtype="bf16")
    assert all(torch.equal(value, state[name]) for name, value in tiny_llama.state_dict().items())
    assert stem_blocks(converted)[1].table.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    means, zeros = (stemify(tiny_llama, [1], [ids], init) for init in ("weighted", "zero"))
    dense_logits = logits(tiny_llama, ids)
    assert (logits(means, ids) - dense_logits).norm() < (logits(zeros, ids) - dense_logits).norm()


def test_quantisation_treats_tables_as_embeddings() -> None:
    model, ids = stem(), tokens()
    rule = Rule("*.mlp.table", WeightConfig("int4", granularity=16, scale="absmax"))
    quantize_(model, QuantConfig(rules=(rule,)))
    fake = logits(model, ids)
    convert_(model)
    assert type(stem_blocks(model)[1].table).__name__ == "PackedEmbedding"
    assert torch.equal(logits(model, ids), fake)


def test_costs() -> None:
    model, ids = stem(), tokens(1, 16)
    report = capacity_report(model, ids)
    unique = len(ids.unique())
    assert (report.stored, report.active, report.unique_tokens) == (2 * 64 * 48, 2 * unique * 48, unique)
    assert report.fetched_bytes == 2 * 48 * 4 and report.saved_flops == 2 * 2 * 32 * 48
    assert saved_share(1536, 8960, 4096) == pytest.approx(0.217, abs=5e-4)  # the paper's figures
    assert saved_share(5120, 27648, 4096) == pytest.approx(0.248, abs=5e-4)
    ours, theirs = footprint(model), footprint(config())
    assert theirs.prefill_flops - ours.prefill_flops == report.saved_flops
    assert ours.stored - theirs.stored == 2 * (64 - 32) * 48
    assert theirs.active - ours.active == 2 * (32 - 1) * 48


@pytest.mark.parametrize("rows", ["inputs", "table"])
def test_the_exported_program_decodes_as_the_model(rows: str) -> None:
    model, ids = stem(share_map=[0, 1, 1, 2], num_hidden_layers=None, layers=[1]), tokens(1, 6)
    program = StemDecodeProgram(model, 8, rows)
    keys, values = program.empty()
    expected = logits(model, ids)
    given = [decode_rows(model, int(token)) for token in ids[0]]
    with torch.no_grad():
        for i in range(6):
            fed = [given[i]] if rows == "inputs" else []
            out, keys, values = program(ids[:, i : i + 1], torch.tensor([i]), *fed, keys, values)
            torch.testing.assert_close(out[0], expected[0, i])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StemConfig(replace="down"), "replace='down'; it must be one of up, gate, add"),
        (lambda: StemConfig(init="ones"), "init='ones'"),
        (lambda: stem_layers(6, "2"), "layers='2' of 6"),
        (lambda: stem_layers(6, "x"), "layers='x'"),
        (lambda: stem_layers(6, [6]), r"layers=\[6\]; name one or more of the layers 0 to 5"),
        (lambda: check_first([0], StemConfig()), "layer 0 would be a STEM layer"),
        (lambda: with_stem(config(), [0]), "layer 0 would be a STEM layer"),
        (lambda: config(ffn_types=["stem", "mlp", "mlp", "mlp"], stem={}), r"ffn_types\[0\] is 'stem'"),
        (lambda: with_stem(config(ffn_types="none"), [1]), "layer 1 has the feed-forward 'none'"),
        (lambda: stem_blocks(dense()), "has no STEM layers"),
        (lambda: stemify(dense(), [1]), "init='weighted' needs calib=BATCHES"),
        (lambda: stemify(dense(), [1], [], "calibrated"), "calibration tokens=0; it must be a whole number from 1 up"),
        (lambda: stemify(dense(), [1], init="best"), "init='best'"),
        (lambda: stemify(dense(), [1], init="zero", stem=StemConfig("gate")), "a gate needs context"),
        (lambda: stem()(inputs_embeds=torch.zeros(1, 3, 32)), "give input_ids, not inputs_embeds"),
        (lambda: stem_blocks(stem())[1](torch.zeros(1, 3, 32), None), "give input_ids, not inputs_embeds"),
        (lambda: stem_blocks(stem())[1](torch.zeros(1, 3, 32), tokens(1, 4)), r"\[1, 4\] are not those of"),
        (lambda: stem()(torch.tensor([[64]])), "input_ids hold 64; the vocabulary is 0 to 63"),
        (lambda: export_stem(stem(), "x", to="tflite"), "to='tflite'; it must be one of executorch, onnx"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_no_native_class_and_no_gguf() -> None:
    with pytest.raises(NotRepresentable):
        to_native(stem())
    with pytest.raises(Unsupported, match="GGUF has no architecture with STEM layers"):
        export_stem(stem(), "x.gguf", to="gguf")
    assert isinstance(stem_blocks(stem(layers=[1]))[1], StemFeedForward)
