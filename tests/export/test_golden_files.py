"""Every exporter writes the same bytes as before: a file of each kind against the golden file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgewright import QuantConfig, WeightConfig, convert_, quantize_
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.gguf.exporter import export_gguf
from edgewright.export.onnx.exporter import export_onnx
from edgewright.quantization.config import Rule
from tests import golden
from tests.export.executorch.executorch_models import TinyNet, byte_tokenizer, packed_llama
from tests.export.export_models import make_llama, make_tokenizer, pack_layers
from tests.export.onnx.onnx_models import images, mlp, small_cnn

GGUF_FORMS = {  # name -> (grid, group, grid of the table) of the packed layers, options of the exporter
    "float16": (None, {}),
    "float32": (None, {"float_type": "F32", "embedding": "F32"}),
    "4 bits": (("int4", 32, "int8"), {}),
    "3 bits": (("int3", 32, None), {}),
    "2 bits": (("seq2", 64, None), {}),
    "ternary": (("ternary", 256, None), {}),
    "ternary, small": (("ternary", 256, None), {"layout": "small"}),
    "1 bit": (("binary", 128, None), {}),
    "8 bits, portable": (("int8", 32, None), {"layout": "portable"}),
}


def write_gguf(path: Path, form: str) -> None:
    packed, options = GGUF_FORMS[form]
    model = make_llama() if packed is None else pack_layers(make_llama(), *packed)
    export_gguf(model, make_tokenizer(), path, verify=False, strict=False, progress=False, **options)


def write_pte_network(path: Path) -> None:
    export_executorch(TinyNet().eval(), None, path, example_inputs=[torch.ones(2, 1, 8, 8)], verify=False)


def write_pte_language(path: Path) -> None:
    export_executorch(packed_llama(), byte_tokenizer(), path, context=96, verify=False)


def write_onnx_float(path: Path) -> None:
    export_onnx(small_cnn(), path, example_inputs=images(1))


def write_onnx_packed(path: Path) -> None:
    model = mlp()
    quantize_(model, QuantConfig((Rule("*", WeightConfig("int4", granularity=24)),), skip=()))
    export_onnx(convert_(model), path, example_inputs=torch.ones(2, 48))


KINDS: dict[str, Callable[[Path], None]] = {
    **{f"gguf, {form}.gguf": lambda path, form=form: write_gguf(path, form) for form in GGUF_FORMS},  # type: ignore[misc]
    "network.pte": write_pte_network,
    "language model.pte": write_pte_language,
    "float.onnx": write_onnx_float,
    "packed.onnx": write_onnx_packed,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_the_golden_file(kind: str, tmp_path: Path, request: Any) -> None:
    path = tmp_path / f"model{Path(kind).suffix}"
    KINDS[kind](path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    golden.compare(
        f"export: {kind}", {"rows": [], "files": {kind: digest}}, request.config.getoption("--update-golden")
    )
