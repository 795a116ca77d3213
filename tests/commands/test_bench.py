"""edgewright bench: JSON alone on stdout, the table on screen, the report in its folder."""

from __future__ import annotations

import json

import pytest

from edgewright.cli import main
from tests.toy_gguf import write_toy

QUICK = ["--prompt-tokens", "8", "--decode-tokens", "4", "--repeats", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf")


def test_json_and_folder(toy_file, tmp_path, capfd):
    assert main(["bench", str(toy_file), *QUICK, "--json", "--output", str(tmp_path / "out")]) == 0
    data = json.loads(capfd.readouterr().out)
    assert {"rows", "machine", "versions", "settings"} <= set(data)
    assert data == json.loads((tmp_path / "out" / "report.json").read_text())


def test_table(toy_file, capsys):
    assert main(["bench", str(toy_file), *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "toy.gguf" in shown and "decode" in shown and "roofline" in shown


def test_a_missing_file_is_one_sentence(tmp_path, capsys):
    assert main(["bench", str(tmp_path / "none.gguf")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_programs_and_language_models_share_a_table(toy_file, tmp_path, capsys):
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    program = tmp_path / "relu.onnx"
    program.write_bytes(proto.SerializeToString())
    assert main(["bench", str(program), str(toy_file), *QUICK, "--batch", "2"]) == 0
    shown = capsys.readouterr().out
    assert "relu.onnx" in shown and "toy.gguf" in shown and "latency" in shown and "decode" in shown
    program.write_bytes(b"no model")
    assert main(["bench", str(program), *QUICK]) == 2
    assert "is not an ONNX model" in capsys.readouterr().err
