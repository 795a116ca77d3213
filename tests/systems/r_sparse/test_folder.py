"""Folders of sparse models: the same bits come back, other tools see the dense model, nothing hostile passes."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import edgewright
from edgewright.errors import FormatError, UsageError
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.r_sparse.folder import DESCRIPTION, TENSORS, is_rsparse, load_rsparse, save_rsparse
from edgewright.systems.r_sparse.model import apply_rsparse, remove_rsparse, sparse_layers, sparse_logits
from edgewright.systems.r_sparse.plan import LayerPlan, RSparseConfig, calibrate

TOKENS = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(3))
CONFIG = RSparseConfig(0.5, rho=0.8)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(256)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0")


def make(model, tokenizer, folder, plan=None):
    stats = calibrate(model, [TOKENS], CONFIG)
    plan = plan or dict.fromkeys(stats.histograms, LayerPlan(0.5, 0.8)) | {Q: LayerPlan(0.5, 0.0)}
    apply_rsparse(model, CONFIG, stats, plan)
    before = sparse_logits(model)(TOKENS)
    save_rsparse(model, tokenizer, folder, CONFIG, stats, plan)
    assert torch.equal(sparse_logits(model)(TOKENS), before)  # still sparse, and the same
    return before


def test_the_same_bits_come_back(tiny_llama, tokenizer, tmp_path):
    wanted = make(tiny_llama, tokenizer, tmp_path / "out")
    model, _, config = load_rsparse(tmp_path / "out")
    assert config == CONFIG and is_rsparse(tmp_path / "out") and not is_rsparse(tmp_path)
    assert torch.equal(sparse_logits(model)(TOKENS), wanted)
    for name, layer in sparse_layers(tiny_llama).items():
        again = sparse_layers(model)[name]
        assert torch.equal(again.threshold, layer.threshold) and torch.equal(again.scale, layer.scale)
        assert (again.up is None) == (layer.up is None) and again.dense_tokens is None
    assert math.isinf(float(sparse_layers(model)[Q].threshold))
    with torch.no_grad():
        assert torch.equal(model(TOKENS[:1, :1]).logits, tiny_llama(TOKENS[:1, :1]).logits)  # through the rows
    dense, _ = edgewright.load(tmp_path / "out")
    remove_rsparse(tiny_llama)
    with torch.no_grad():
        assert torch.equal(dense(TOKENS).logits, tiny_llama(TOKENS).logits)


def test_quantised_models_too(tiny_llama, tokenizer, tmp_path):
    rule = Rule("*_proj", WeightConfig("int4", granularity=32, scale="mse"))
    packed = edgewright.convert_(edgewright.quantize_(tiny_llama, QuantConfig(rules=(rule,))))
    wanted = make(packed, tokenizer, tmp_path / "out")
    model, _, _ = load_rsparse(tmp_path / "out")
    assert torch.equal(sparse_logits(model)(TOKENS), wanted)


def test_a_dense_model_is_not_written(tiny_llama, tokenizer, tmp_path):
    stats = calibrate(tiny_llama, [TOKENS], CONFIG)
    with pytest.raises(UsageError, match="has no R-Sparse layer"):
        save_rsparse(tiny_llama, tokenizer, tmp_path / "out", CONFIG, stats)
    with pytest.raises(UsageError, match="edgewright sparsify MODEL --output FOLDER"):
        load_rsparse(tmp_path)
    assert not list(tmp_path.iterdir())


def change(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("format",), 2, "no format 1"),
        (("layers",), {}, "every layer needs"),
        (("layers",), {"model.embed_tokens": {"rank": 0, "threshold": 1.0}}, "no linear layer 'model.embed_tokens'"),
        (("layers", "model.nowhere"), {"rank": 0, "threshold": 1.0}, "no linear layer 'model.nowhere'"),
        (("layers", Q, "rank"), -1, "every layer needs"),
        (("layers", Q, "rank"), 2**40, "every layer needs"),
        (("layers", Q, "rank"), 3, "does not fit"),
        (("layers", Q, "threshold"), "high", "every layer needs"),
        (("layers", Q), {"rank": 0}, "every layer needs"),
        (("config",), [], "needs a configuration"),
        (("config", "targets"), "(a+)+" * 100, "at most 200 characters"),
        (("config", "sparsity"), 3, "RSparseConfig"),
        (("config", "sparsity"), "half", "RSparseConfig"),
        (("config", "extra"), 3, "RSparseConfig"),
        (("config", "dense_prefill"), 3, "dense_prefill of RSparseConfig"),
        (("model",), "0" * 64, "not those that rsparse.json was made for"),
    ],
)
def test_a_description_that_lies(tiny_llama, tokenizer, tmp_path, path, value, complaint):
    make(tiny_llama, tokenizer, tmp_path / "out")
    file = tmp_path / "out" / DESCRIPTION
    data = json.loads(file.read_text())
    change(data, path, value)
    file.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=complaint):
        load_rsparse(tmp_path / "out")


def test_files_that_are_broken(tiny_llama, tokenizer, tmp_path):
    folder = tmp_path / "out"
    make(tiny_llama, tokenizer, folder)
    tensors, text = load_file(folder / TENSORS), (folder / DESCRIPTION).read_text()

    def refused(complaint):
        with pytest.raises(FormatError, match=complaint):
            load_rsparse(folder)

    for bad in ("[1", "[" * 100_000, "3"):
        (folder / DESCRIPTION).write_text(bad)
        refused("is not JSON|object is needed|no format 1")
    (folder / DESCRIPTION).write_text(text)
    holed = copy.deepcopy(tensors)
    holed[f"{Q}.scale"][0] = math.nan
    save_file(holed, folder / TENSORS)
    refused("finite floats")
    save_file({**tensors, f"{Q}.scale": torch.ones(64, dtype=torch.int32)}, folder / TENSORS)
    refused("finite floats")
    save_file({name: t for name, t in tensors.items() if name != f"{Q}.up"}, folder / TENSORS)
    refused("does not fit the layers")
    (folder / TENSORS).write_bytes(b"\xff" * 64)
    refused("not a usable safetensors file")
