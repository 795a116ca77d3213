"""The distance of a written file from the float model that it began as."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed
from edgewright.evaluation.language import model_logits
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.gguf.exporter import export_gguf
from edgewright.export.onnx.exporter import export_onnx
from edgewright.export.original import comparison, language_distance, output_distance
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig
from tests.export.export_models import make_tokenizer, pack_layers
from tests.toy_llama import make_tiny_llama


def model(seed: int = 0) -> Any:
    return make_tiny_llama(seed, vocab_size=262, initializer_range=0.3)  # so that its answers hang on the text


def test_divergence_and_bound_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs, ours = torch.randn(40, 9, generator=generator), torch.randn(40, 9, generator=generator)
    with pytest.warns(UserWarning, match="m.gguf is further from the original float model"):
        found = language_distance(lambda ids: theirs[None], range(40), ours, "m.gguf")
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (theirs, ours))
    blind = torch.distributions.Categorical(probs=p.probs.mean(0))
    divergence = torch.distributions.kl_divergence
    assert found["kl"] == pytest.approx(float(divergence(p, q).mean()), rel=1e-3)
    assert found["kl_without_context"] == pytest.approx(float(divergence(p, blind).mean()), rel=1e-3)
    assert found["top1_agreement"] == float((theirs.argmax(1) == ours.argmax(1)).double().mean().round(decimals=4))
    with pytest.raises(CheckFailed, match="No weight was quantised"):
        comparison(lambda ids: theirs[None], "m.gguf", plain=True)(list(range(40)), ours)
    assert output_distance([theirs], [theirs + theirs.std()], "m")["relative_error"] == pytest.approx(1, abs=0.01)


def test_a_file_that_equals_a_broken_model_is_told_apart(tmp_path: Path) -> None:
    original = model()
    packed = pack_layers(copy.deepcopy(original), "int4", 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = export_gguf(packed, make_tokenizer(), tmp_path / "m.gguf", progress=False, original=original).checks
    assert 0 < good["original"]["kl"] < good["original"]["kl_without_context"]
    with torch.no_grad():
        packed.model.embed_tokens.weight.neg_()  # what lost its meaning before the export
    with pytest.warns(UserWarning, match="m.gguf is further from the original float model"):
        bad = export_gguf(
            packed, make_tokenizer(), tmp_path / "m.gguf", progress=False, original=model_logits(original)
        ).checks
    assert bad["top1_agreement"] > 0.9 and "warning" in bad["original"]
    plain = export_gguf(original, make_tokenizer(), tmp_path / "f.gguf", progress=False, embedding="F16").checks
    assert plain["original"]["kl"] < 1e-3  # its own original


def test_a_language_program_knows_its_original(tmp_path: Path) -> None:
    original = model()
    packed = pack_layers(copy.deepcopy(original), "int4", 32)
    checks = export_executorch(packed, None, tmp_path / "m.pte", context=64, original=original).checks
    assert 0 < checks["original"]["kl"] < checks["original"]["kl_without_context"]


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_programs_of_any_outputs_know_it_too(tmp_path: Path) -> None:
    original, x = Net().eval(), torch.randn(4, 32)
    packed = convert_(quantize_(copy.deepcopy(original), QuantConfig.weights("int8")))
    program = export_executorch(packed, None, tmp_path / "m.pte", example_inputs=[x], original=original)
    graph = export_onnx(packed, tmp_path / "m.onnx", example_inputs=x, original=original)
    for checks in (program.checks, graph.checks):
        assert 0 < checks["original"]["relative_error"] < 0.05 and "warning" not in checks["original"]
    with pytest.warns(UserWarning, match="m.onnx is further from the original model"):
        export_onnx(packed, tmp_path / "m.onnx", example_inputs=x, original=Net().eval())
