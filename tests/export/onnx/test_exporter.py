"""ONNX export: ONNX Runtime answers like PyTorch, what cannot go is named, nothing else changes.

Packed layers are in test_onnx_packed.py, static int8 in test_onnx_static.py.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

import edgewright
from edgewright import QuantConfig, WeightConfig, convert_, quantize_
from edgewright.errors import CheckFailed, MissingPackage, OutputError, Unsupported, UsageError
from edgewright.export.onnx import exporter as onnx_export
from edgewright.export.onnx.exporter import example_inputs_for, export_onnx
from edgewright.quantization.config import Rule
from edgewright.runtime.program import open_program
from tests.export.onnx.onnx_models import images, mlp, small_cnn

TOKENS = 6000


@pytest.fixture(scope="module")
def short_minilm():
    """The first layer of the real MiniLM, and of its table what two exports need not spend most of their time on."""
    model, _ = edgewright.load("minilm-l6")
    model.encoder.layer = model.encoder.layer[:1]
    model.resize_token_embeddings(TOKENS, mean_resizing=False)
    return model


# ---- float models and encoders


def test_a_float_cnn_at_any_batch(tmp_path):
    model, path = small_cnn(), tmp_path / "cnn.onnx"
    result = export_onnx(model, path, example_inputs=images(1), input_names=["image"], output_names=["scores"])
    assert result.max_error < 1e-5 and result.notes[0].endswith("batches of 2, 1, 3")
    with open_program(path) as program:
        assert str(program.inputs[0]) == "image float32 [any, 3, 12, 12]"
        for count in (1, 4):
            assert np.allclose(
                program.run({"image": images(count).numpy()})[0], model(images(count)).detach(), atol=1e-5
            )
    fixed = export_onnx(model, tmp_path / "fixed.onnx", example_inputs=images(1), dynamic_batch=False)
    with open_program(fixed.path, check=False) as program:
        assert program.inputs[0].shape == (1, 3, 12, 12)


def test_the_real_encoder_float_and_packed(short_minilm, tmp_path):
    model, float_path = short_minilm, tmp_path / "float.onnx"
    result = export_onnx(model, float_path, example_inputs=example_inputs_for(model))
    assert result.outputs == ("last_hidden_state", "pooler_output") and result.max_error < 1e-4
    quantize_(model, QuantConfig((Rule("*", WeightConfig("int4")),), skip=()))
    convert_(model)
    path = tmp_path / "int4.onnx"
    packed = export_onnx(model, path)
    assert packed.max_error < 1e-4
    linear = [m for m in model.modules() if hasattr(m, "in_features")]
    tables = [m for m in model.modules() if hasattr(m, "num_embeddings")]
    codes = sum(m.codes.numel() / 2 for m in (*linear, *tables))
    scales = 4 * sum(m.codes.shape[0] * max(m.in_features // 128, 1) for m in linear)
    scales += 4 * sum(m.codes.shape[0] for m in tables)
    rest = sum(4 * p.numel() for name, p in model.named_parameters() if "codes" not in name) + 8 * 512 * 2
    bound = codes + scales + rest
    assert bound * 0.95 < packed.bytes < bound * 1.02 + 65536  # the graph itself
    assert packed.bytes < 0.16 * result.bytes
    with open_program(path, check=False) as program:
        ids = torch.randint(0, TOKENS, (3, 11))
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        found = program.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask)
    # float sums in another order, of values of about 3
    assert np.abs(found[0] - expected.last_hidden_state.numpy()).max() < 1e-4


def test_a_causal_model(tiny_llama, tmp_path):
    tiny_llama.model.layers = tiny_llama.model.layers[:1]  # every layer exports alike
    ids = torch.randint(0, 256, (3, 9))
    result = export_onnx(tiny_llama, tmp_path / "llama.onnx")
    assert result.outputs == ("logits",) and tiny_llama.config.use_cache
    with open_program(result.path, check=False) as program, torch.no_grad():
        assert np.abs(program.run([ids.numpy()])[0] - tiny_llama(ids).logits.numpy()).max() < 1e-5


def test_the_model_is_left_as_it_was(tmp_path):
    model = convert_(quantize_(mlp(), QuantConfig.weights("int4"))).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 48))
    assert model.training and [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = convert_(quantize_(mlp(), QuantConfig.weights("int4")))
    x = torch.randn(2, 48)
    first, second = (export_onnx(model, tmp_path / f"{i}.onnx", example_inputs=x).path.read_bytes() for i in range(2))
    assert first == second
    assert b"/edgewright/" not in first and b"site-packages" not in first  # no stack traces


def test_over_the_limit_of_protobuf_the_tensors_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "EXTERNAL_FROM", 1000)
    x = torch.randn(2, 48)
    result = export_onnx(mlp(), tmp_path / "big.onnx", example_inputs=x)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["big.onnx", "big.onnx.data"]
    assert result.bytes == sum(file.stat().st_size for file in files) and "belongs beside" in result.notes[-1]
    with open_program(result.path) as program:
        assert np.allclose(program.run([x.numpy()])[0], mlp()(x).detach(), atol=1e-5)


# ---- what cannot be exported


class Strange(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_an_operator_without_translation_is_named_with_its_module(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"odd": Strange()})["odd"])
    with pytest.raises(Unsupported, match=r"special_bessel_j0.*module 1 \(Strange\)"):
        export_onnx(model, tmp_path / "x.onnx", example_inputs=torch.randn(2, 4))
    with pytest.raises(Unsupported, match="torch.export cannot follow .* in 1"):
        export_onnx(nn.Sequential(nn.Linear(4, 4), Branch()), tmp_path / "x.onnx", example_inputs=torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_otherwise_gets_no_name(tmp_path):
    model = convert_(quantize_(mlp(), QuantConfig.weights("int4")))
    with pytest.raises(CheckFailed, match="differs from PyTorch's by"):
        export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 48), tolerance=1e-12)
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path, monkeypatch):
    model, x = mlp(), torch.randn(2, 48)
    cases = (
        ({"path": tmp_path / "m.bin"}, UsageError, "ends in .onnx"),
        ({"opset": 12}, UsageError, "one of 21, 22, 23"),
        ({"tolerance": -1.0}, UsageError, "a number above 0"),
        ({"storage": "tiny"}, UsageError, "nibbles"),
        ({"example_inputs": None}, UsageError, "no example inputs are known for Sequential"),
        ({"example_inputs": "text"}, UsageError, "must be tensors"),
        ({"output_names": ["a", "b"]}, UsageError, "the model has 1 outputs"),
        ({"model": mlp().double()}, Unsupported, "export model.float"),
        ({"model": quantize_(mlp(), QuantConfig.weights("int4"))}, UsageError, "call convert_"),
        ({"path": "/proc/none/m.onnx"}, OutputError, "cannot"),
    )
    for change, kind, words in cases:
        options = {"model": model, "path": tmp_path / "m.onnx", "example_inputs": x, **change}
        with pytest.raises(kind, match=words):
            export_onnx(options.pop("model"), options.pop("path"), **options)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackage, match=r"edgewright\[onnx\]"):
        export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert not list(tmp_path.iterdir())
