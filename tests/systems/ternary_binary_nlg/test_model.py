"""TBT on encoder-decoders and on a decoder-only model: who gets which quantiser, heads, sizes, generation, export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.io.packed import PackedEmbedding, PackedLinear
from edgewright.quantization.api import convert_, quantized_modules
from edgewright.quantization.attention import attention_modules
from edgewright.quantization.clipped_activation import ClippedActivation
from edgewright.quantization.elastic import ElasticQuantizer
from edgewright.quantization.stored_size import stored_bytes
from edgewright.systems.ternary_binary_nlg.model import ActivationSet, quantize_encoder_decoder_
from tests.toy_encoder_decoders import FAMILIES, fixed_attention, tiny_batch, tiny_encoder_decoder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits


def is_unsigned(module: object) -> bool:
    return isinstance(module, ElasticQuantizer) and not module.config.signed


def quantized(family: str = "bart", *arguments: Any, tied: bool = True, **settings: Any) -> Any:
    """A tiny model under quantisation, its elastic scales set by one batch."""
    model = quantize_encoder_decoder_(tiny_encoder_decoder(family, tie_word_embeddings=tied), *arguments, **settings)
    logits(model)
    return model


@pytest.mark.parametrize("weight", [None, 16, 32])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_full_width_is_the_untouched_model(family: str, weight: int | None) -> None:
    model = tiny_encoder_decoder(family)
    expected, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert quantize_encoder_decoder_(model, weight=weight, activation=weight) is model
    assert model.config._attn_implementation == "eager" and not quantized_modules(model)
    assert torch.equal(logits(model), expected)
    assert {n: v.tolist() for n, v in model.state_dict().items()} == {n: v.tolist() for n, v in state.items()}


def test_who_gets_which_quantiser() -> None:
    model = quantized("bart", "ternary", "ternary")
    found = dict(quantized_modules(model))
    assert found.keys() >= {"model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"}
    assert (
        len({id(found[name].quantizer) for name in found if "embed" in name or name in ("model.shared", "lm_head")})
        == 1
    )
    for name, module in found.items():
        if "embed_tokens" in name or name in ("model.shared", "lm_head"):
            assert getattr(module, "input_quantizer", None) is None  # ids, and the full-precision input of the head
        elif name.endswith("fc2"):
            assert is_unsigned(module.input_quantizer)
            assert module.input_quantizer.config.floor == "token"
        else:
            assert isinstance(module.input_quantizer, ElasticQuantizer) and module.input_quantizer.config.signed
            assert module.input_quantizer.shift is None
    for _, attention in attention_modules(model):
        parts = attention.attention_quantizers
        assert all(isinstance(part, ElasticQuantizer) for part in (parts.query, parts.key, parts.value))
        assert is_unsigned(parts.probabilities) and parts.probabilities.config.floor == "zero"
    assert type(model.model.encoder.embed_positions).__name__ == "BartLearnedPositionalEmbedding"


def test_a_gate_has_both_signs() -> None:
    if fixed_attention("t5"):
        with pytest.raises(UsageError, match="T5ForConditionalGeneration has a fixed attention function"):
            quantized("t5", "binary", "binary")
        return
    plain, gated = quantized("t5", "binary", "binary"), quantized("t5-gated", "binary", "binary")
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert is_unsigned(plain.get_submodule(name).input_quantizer)
    assert gated.get_submodule(name).input_quantizer.config.signed
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    assert type(plain.get_submodule(bias)) is torch.nn.Embedding


def test_everything_on_the_signed_set_is_the_baseline() -> None:
    model = quantized("bart", "binary", ActivationSet("binary", unsigned=False))
    assert not any(is_unsigned(module) for module in model.modules())
    # the sign of probabilities is one value: every token attends to all others alike
    attention = attention_modules(model)[0][1]
    assert len(attention.attention_quantizers.probabilities(torch.rand(1, 2, 3, 4)).unique()) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["shared", "int8", "fp"])
def test_conversion_keeps_every_bit_and_the_size(family: str, head: Any) -> None:
    model = quantized(family, "ternary", 8, head=head)
    expected, size = logits(model), stored_bytes(model)
    convert_(model)
    assert torch.equal(logits(model), expected)
    assert stored_bytes(model) == size


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_learns(family: str) -> None:
    model = quantized(family, "binary", "ternary")
    model(**tiny_batch()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())


def test_scaled_embeddings_stay_scaled() -> None:
    model = quantized("mbart", "ternary")
    ids = torch.tensor([[5, 9]])
    table = model.lm_head.quantizer.values(model.lm_head.weight).detach()
    assert torch.equal(model.get_input_embeddings()(ids)[0].detach(), table[ids[0]] * 32**0.5)


@pytest.mark.parametrize("activation", [None, 8, "ternary"])
def test_generation_with_and_without_cache_and_alone_or_in_a_batch(activation: Any) -> None:
    model = convert_(quantized("bart", "ternary", activation, tied=False))  # a tied head would repeat one token
    batch = tiny_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "num_beams": 1}
    cached = model.generate(**inputs, **how, use_cache=True)
    assert len(cached.unique()) > 3
    assert torch.equal(cached, model.generate(**inputs, **how, use_cache=False))
    alone = model.generate(input_ids=batch["input_ids"][1:, :5], **how)
    assert torch.equal(alone, cached[1:])


def test_embedding_and_head_say_the_same_codes() -> None:
    model = convert_(quantized("bart", "ternary"))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, PackedEmbedding) and isinstance(head, PackedLinear)
    assert table.codes.data_ptr() == head.codes.data_ptr() and table.step.data_ptr() == head.step.data_ptr()


def test_an_fp_head_multiplies_by_the_latent_table() -> None:
    model = quantized("bart", "ternary", head="fp")
    assert model.lm_head.weight is model.model.shared.weight
    assert type(model.lm_head) is torch.nn.Linear
    convert_(model)
    assert torch.equal(model.lm_head.weight, tiny_encoder_decoder().lm_head.weight)


def arithmetic(head: int) -> int:
    """Bytes of a ternary tiny BART: tables of 64 x 32 and 66 x 32 positions, four attention and two fc pairs more."""
    ternary = (64 * 32) // 4 + 2 * 64  # codes at 2 bits, a step of 2 bytes a row
    attention = 4 * ((32 * 32) // 4 + 2 * 32)
    feed_forward = 2 * (64 * 32) // 4 + 2 * (64 + 32)
    layers = 2 * (attention + feed_forward) + 2 * (2 * attention + feed_forward)
    positions = 2 * (66 * 32) * 4
    biases = 6 * 4 * 32 + 4 * (64 + 32)
    norms = 2 * 32 * (2 + 2 * 2 + 2 * 3)
    return ternary + head + layers + positions + 4 * (biases + norms)


@pytest.mark.parametrize(("head", "head_bytes"), [("shared", 0), ("int8", 64 * 32 + 2 * 64), ("fp", 4 * 64 * 32)])
def test_the_size_is_the_arithmetic_of_its_parts_and_counts_the_head(head: Any, head_bytes: int) -> None:
    size = stored_bytes(quantize_encoder_decoder_(tiny_encoder_decoder(), "ternary", head=head))
    assert size["head"] == head_bytes
    assert size["total"] == sum(value for part, value in size.items() if part != "total") == arithmetic(head_bytes)


def test_a_float_model_weighs_its_parameters() -> None:
    model = tiny_encoder_decoder()
    assert stored_bytes(model)["total"] == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_widths_are_cut_in_encoder_decoders_only(tiny_llama: Any) -> None:
    quantize_encoder_decoder_(tiny_llama, "ternary", 8)
    clips = {m.config.clip for m in tiny_llama.modules() if isinstance(m, ClippedActivation)}
    assert clips == {None}
    clips = {m.config.clip for m in quantized("bart", "ternary", 8).modules() if isinstance(m, ClippedActivation)}
    assert clips == {2.5}


def test_a_decoder_only_model_exports(tmp_path: Path) -> None:
    """Ternary rows of 64 and 128 go to Q2_0; the exporter runs the file and compares its answers with the model's."""
    from edgewright.export.gguf.exporter import export_gguf
    from tests.export.export_models import make_tokenizer
    from tests.toy_llama import make_tiny_llama

    tokenizer = make_tokenizer()
    model = convert_(quantize_encoder_decoder_(make_tiny_llama(vocab_size=len(tokenizer)), "ternary"))
    export = export_gguf(model, tokenizer, tmp_path / "tiny.gguf", layout="small", progress=False)
    kinds = {row.written for row in export.table if row.holds.startswith("ternary")}
    assert kinds == {"Q2_0"} and export.checks


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weight": 2}, "weight=2; it must be one of ternary, binary, None"),
        ({"weight": True}, "weight=True; it must be one of"),
        ({"activation": 2}, "activation levels=2; it must be a whole number from 3 to 8; or say 'binary' or 'ternary'"),
        ({"activation": 1}, "activation levels=1"),
        ({"activation": True}, "activation levels=True"),
        ({"head": "tied"}, "head='tied'; it must be one of shared, int8, fp"),
    ],
)
def test_ambiguous_widths_are_refused(settings: dict[str, Any], sentence: str) -> None:
    model = tiny_encoder_decoder()
    with pytest.raises(UsageError, match=sentence):
        quantize_encoder_decoder_(model, **settings)
    assert not quantized_modules(model)


def test_a_model_is_quantised_once() -> None:
    for settings in ({"weight": "ternary"}, {"weight": None, "activation": 8}):
        model = quantize_encoder_decoder_(tiny_encoder_decoder(), **settings)
        with pytest.raises(UsageError, match="under quantisation already"):
            quantize_encoder_decoder_(model)


def test_zero_rows_of_a_binary_model_are_flagged() -> None:
    model = tiny_encoder_decoder()
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.weight[3] = 0
    with pytest.warns(UserWarning, match=r"model.encoder.layers.0.fc1: 1 rows are zero"):
        quantize_encoder_decoder_(copy.deepcopy(model), "binary")
