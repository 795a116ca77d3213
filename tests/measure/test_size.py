"""Sizes: every byte is counted once and lands in its part."""

from __future__ import annotations

import pytest
import torch

from edgewright.io.gguf.reader import GGUFFile
from edgewright.measure.size import (
    bits_per_weight,
    bytes_by_part,
    bytes_per_decoded_token,
    gguf_parameters,
    parameter_counts,
    part_of,
)
from tests.toy_gguf import HIDDEN, LAYERS, WIDTH, write_toy


def test_tied_weights_count_once(tiny_llama):
    embedding, layers = 256 * 64, 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64)
    counts = parameter_counts(tiny_llama)
    assert counts.total == counts.trainable == embedding + layers + 64
    assert counts.embedding == embedding and counts.without_embedding == layers + 64
    tiny_llama.requires_grad_(False)
    assert parameter_counts(tiny_llama).trainable == 0


def test_parts_of_a_model_add_up(tiny_llama):
    parts = bytes_by_part(tiny_llama)
    assert sum(parts.values()) == 4 * parameter_counts(tiny_llama).total
    assert parts["attention"] == 4 * 2 * (64 * 64 * 2 + 64 * 32 * 2) and parts["mlp"] == 4 * 2 * 3 * 64 * 128
    assert parts["norm"] == 4 * 5 * 64 and parts["embedding"] == 4 * 256 * 64 and not parts["head"] + parts["other"]
    assert sum(bytes_by_part(tiny_llama.half()).values()) == 2 * parameter_counts(tiny_llama).total


def test_meta_models_and_shared_modules():
    layer = torch.nn.Linear(8, 8, bias=False, device="meta")
    assert parameter_counts(torch.nn.Sequential(layer, layer)).total == 64
    assert parameter_counts(torch.nn.Sequential(layer, torch.nn.Linear(8, 8, bias=False, device="meta"))).total == 128


@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_a_file_add_up_to_its_size(tmp_path, tied):
    path = write_toy(tmp_path / "toy.gguf", tied=tied)
    parts = bytes_by_part(path)
    assert sum(parts.values()) == path.stat().st_size and parts["metadata"] > 0 and parts["other"] == 0
    assert parts["head"] == (0 if tied else parts["embedding"])
    assert parts["mlp"] == 4 * LAYERS * 3 * WIDTH * HIDDEN and parts["norm"] == 4 * WIDTH * (2 * LAYERS + 1)
    assert bits_per_weight(path) == 32
    weights = sum(size for part, size in parts.items() if part != "metadata")
    assert gguf_parameters(path) == weights // 4
    rows = parts["embedding"] // (4 * WIDTH)
    expected = weights if tied else weights - parts["embedding"] + parts["embedding"] // rows
    assert bytes_per_decoded_token(GGUFFile(path)) == expected


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("token_embd.weight", "embedding"),
        ("embeddings.word_embeddings.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("output.weight", "head"),
        ("output_norm.weight", "norm"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("encoder.layer.0.attention.output.LayerNorm.bias", "norm"),
        ("blk.3.attn_output.weight", "attention"),
        ("encoder.layer.0.attention.output.dense.weight", "attention"),
        ("model.layers.0.self_attn.q_proj.step", "attention"),
        ("encoder.layer.0.intermediate.dense.weight", "mlp"),
        ("encoder.layer.0.output.dense.weight", "mlp"),
        ("blk.3.ffn_gate_exps.weight", "mlp"),
        ("model.layers.0.mlp.down_proj.codes", "mlp"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_names_of_both_worlds(name, part):
    assert part_of(name) == part
