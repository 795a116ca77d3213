"""Folders of quantised models: the same bits back, an ordinary checkpoint on request, nothing half-written."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import edgewright
from edgewright.errors import OutputError, Unsupported, UsageError
from edgewright.export.huggingface import save_dequantized, save_quantized
from edgewright.io.packed import PackedEmbedding, PackedLinear
from tests.export.export_models import make_llama, make_qwen, make_tokenizer, pack_layers, random_packed

GRIDS = ("binary", "ternary", "seq2", "int2", "int3", "int4", "int8")
IDS = torch.arange(3, 35).reshape(2, 16)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("grid", GRIDS)
def test_the_same_bits_come_back(grid, tokenizer, tmp_path):
    model = pack_layers(make_llama(), grid, group=64, table="int8")
    save_quantized(model, tokenizer, tmp_path / "q")
    loaded, same = edgewright.load(tmp_path / "q")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) and after[name].dtype == value.dtype, name
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.codes.data_ptr() == loaded.model.embed_tokens.codes.data_ptr()
    assert same("The mill, 1873")["input_ids"] == tokenizer("The mill, 1873")["input_ids"]
    assert not loaded.training


def test_codes_are_packed(tokenizer, tmp_path):
    sizes = {}
    for grid in ("binary", "seq2", "int4", "int8"):
        save_quantized(pack_layers(make_llama(), grid), tokenizer, tmp_path / grid)
        sizes[grid] = (tmp_path / grid / "model.safetensors").stat().st_size
    weights = 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 512 * 256)
    # what differs between two widths is their codes and nothing else, up to the digits of offsets in the header
    assert abs(sizes["int8"] - sizes["int4"] - weights / 2) < 300
    assert abs(sizes["int4"] - sizes["seq2"] - weights / 4) < 300
    assert abs(sizes["seq2"] - sizes["binary"] - weights / 8) < 300


def test_float_embedding_untied_head_and_bias(tokenizer, tmp_path):
    for model in (
        pack_layers(make_llama(), "int4"),
        pack_layers(make_llama(tie_word_embeddings=False), "int4"),
        pack_layers(make_qwen(2), "ternary"),
        pack_layers(make_llama(attention_bias=True), "int3"),
    ):
        save_quantized(model, tokenizer, tmp_path / "q")
        loaded, _ = edgewright.load(tmp_path / "q")
        assert torch.equal(logits(loaded), logits(model))
        tied = model.config.tie_word_embeddings
        assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied


def test_a_quantised_head_beside_a_float_table(tokenizer, tmp_path):
    model = pack_layers(make_llama(tie_word_embeddings=False), "int4")
    model.lm_head = PackedLinear(random_packed("int8", 272, 256))
    for save in (save_quantized, save_dequantized):
        save(model, tokenizer, tmp_path / "q")
        loaded, _ = edgewright.load(tmp_path / "q")
        assert torch.equal(logits(loaded), logits(model))


def test_tied_head_quantised_apart_from_its_table(tokenizer, tmp_path):
    model = pack_layers(make_llama(), "int4")
    model.model.embed_tokens = PackedEmbedding(random_packed("int8", 272, 256, seed=1))
    model.lm_head = PackedLinear(random_packed("int4", 272, 256, seed=2))
    for save in (save_quantized, save_dequantized):
        save(model, tokenizer, tmp_path / "q")
        loaded, _ = edgewright.load(tmp_path / "q")
        assert torch.equal(logits(loaded), logits(model))


def test_steps_that_bf16_cannot_hold_stay_exact(tokenizer, tmp_path):
    model = pack_layers(make_llama(), "int4")
    model.model.layers[0].mlp.up_proj.step.mul_(1.001)
    model.model.layers[1].mlp.up_proj.step.copy_(torch.full((512, 1), 0.1).half().float())
    save_quantized(model, tokenizer, tmp_path / "q")
    loaded, _ = edgewright.load(tmp_path / "q")
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.up_proj.step"
        assert torch.equal(loaded.get_buffer(name), model.get_buffer(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_checkpoints_are_ordinary(dtype, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = pack_layers(make_llama().to(dtype), "seq2", table="int8")
    model.model.embed_tokens.dtype = dtype
    # `.to` rounds the rotary frequencies as well, which no loader does
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    save_dequantized(model, tokenizer, tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert "edgewright_quantization" not in config and config["architectures"] == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "d").eval()
    assert loaded.dtype == dtype and type(loaded.lm_head) is nn.Linear
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "d")("the")["input_ids"] == tokenizer("the")["input_ids"]


def test_saving_changes_nothing(tokenizer, tmp_path):
    model = pack_layers(make_llama(), "int4", table="int8")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = model.config.to_dict()
    save_quantized(model, tokenizer, tmp_path / "q")
    save_dequantized(model, tokenizer, tmp_path / "d")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == settings


def test_an_older_folder_is_replaced(tokenizer, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "config.json").write_bytes(b"old")
    save_quantized(pack_layers(make_llama(), "int4"), tokenizer, tmp_path / "q")
    assert (tmp_path / "q" / "config.json").read_bytes() != b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    (tmp_path / "q" / "letter.txt").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"holds 'letter\.txt', which would be lost"):
        save_quantized(pack_layers(make_llama(), "int4"), tokenizer, tmp_path / "q")
    assert (tmp_path / "q" / "letter.txt").read_bytes() == b"mine"


def test_what_cannot_be_saved(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="no packed layer"):
        save_quantized(make_llama(), tokenizer, tmp_path / "q")
    model = pack_layers(make_llama(), "int4")
    model.model.layers[0].mlp.up_proj = layer = nn.Linear(256, 512)
    layer.quantizer = object()  # what a layer under fake quantisation looks like
    with pytest.raises(Unsupported, match="layers.0.mlp.up_proj"):
        save_quantized(model, tokenizer, tmp_path / "q")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        save_quantized(pack_layers(make_llama(), "int4"), tokenizer, tmp_path / "file" / "q")


def test_a_converted_model_of_the_quantisation_room(tokenizer, tmp_path):
    from edgewright import QuantConfig, convert_, quantize_

    model = make_llama()
    quantize_(model, QuantConfig.weights("int4", 32, scale="absmax"))
    with pytest.raises(Unsupported, match="QuantLinear"):
        save_quantized(model, tokenizer, tmp_path / "q")
    convert_(model)
    save_quantized(model, tokenizer, tmp_path / "q")
    loaded, _ = edgewright.load(tmp_path / "q")
    assert torch.equal(logits(loaded), logits(model))
