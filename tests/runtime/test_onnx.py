"""The ONNX Runtime program: inputs are checked by name, broken and hostile files give typed errors and kill nothing."""

from __future__ import annotations

import importlib
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgewright.errors import EdgewrightError, FormatError, MissingPackage, Unsupported, UsageError
from edgewright.runtime import child_check
from edgewright.runtime.child_check import first_run_in_child
from edgewright.runtime.onnx import OnnxProgram, check_model_file, first_run
from edgewright.runtime.program import open_program
from edgewright.runtime.program_inputs import TensorSpec, checked_inputs, stand_in_inputs

onnx = importlib.import_module("onnx")

TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def model_proto(nodes=None, extra=(), inputs=None, outputs=None):
    """x [any, 3] -> x @ WEIGHT + 1, or other nodes."""
    nodes = nodes or [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "one"], ["y"])]
    tensors = [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.float32(1), "one"), *extra]
    graph = helper.make_graph(
        nodes,
        "toy",
        inputs or [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        outputs or [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def write(path, proto):
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def toy(tmp_path):
    return write(tmp_path / "toy.onnx", model_proto())


def test_a_program_runs_by_position_and_by_name(toy):
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    with open_program(toy, threads=1) as program:
        assert program.path == toy and program.inputs == (TensorSpec("x", (None, 3), "float32"),)
        assert [spec.name for spec in program.outputs] == ["y"]
        for given in ([x], {"x": x}):
            assert np.allclose(program.run(given)[0], x @ WEIGHT + 1, rtol=1e-6)
    with pytest.raises(UsageError, match="is closed"):
        program.run([x])
    program.close()


def test_inputs_that_do_not_fit_are_named(toy):
    good = np.zeros((2, 3), np.float32)
    with open_program(toy, check=False) as program:
        for given, words in (
            ([good, good], "takes 1 inputs"),
            ({"z": good}, "takes the inputs x, got z"),
            ([good.astype(np.float64)], r"takes x float32 \[any, 3\], got float64 \[2, 3\]"),
            ([np.zeros((2, 4), np.float32)], r"got float32 \[2, 4\]"),
            ([np.zeros(3, np.float32)], r"got float32 \[3\]"),
        ):
            with pytest.raises(UsageError, match=words):
                program.run(given)


def test_an_error_in_a_run_is_typed(tmp_path):
    nodes = [helper.make_node("Gather", ["w", "i"], ["y"])]
    ids = [helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])]
    path = write(tmp_path / "gather.onnx", model_proto(nodes, inputs=ids))
    with open_program(path) as program:
        assert program.run([np.array([2])])[0].tolist() == [WEIGHT[2].tolist()]
        with pytest.raises(EdgewrightError, match="stopped in gather.onnx"):
            program.run([np.array([77])])


def test_stand_in_inputs_fit_what_they_stand_for():
    specs = (
        TensorSpec("image", (None, 3, None, 8), "float16"),
        TensorSpec("ids", (None, None), "int64"),
        TensorSpec("flag", (), "bool"),
    )
    image, ids, flag = stand_in_inputs(specs, batch=2, length=5)
    assert image.shape == (2, 3, 5, 8) and image.dtype == np.float16 and ids.tolist() == [[1] * 5] * 2 and flag
    assert np.array_equal(image, stand_in_inputs(specs, batch=2, length=5)[0])
    assert not stand_in_inputs(specs, seed=None)[0].any()
    assert len(checked_inputs(specs, [image, ids, flag], Path("x.onnx"))) == 3
    with pytest.raises(UsageError, match="at most"):
        stand_in_inputs([TensorSpec("huge", (1 << 20, 1 << 20), "float32")])


# ---- foreign files


def test_what_is_no_program_is_said(tmp_path, toy, monkeypatch):
    with pytest.raises(UsageError, match="there is no file"):
        open_program(tmp_path / "none.onnx")
    with pytest.raises(Unsupported, match="supported: .onnx, .pte"):
        open_program(tmp_path / "model.tflite")
    with pytest.raises(UsageError, match="threads must be"):
        open_program(toy, threads=0)
    for content, words in ((b"", "0 bytes"), (b"not a model at all", "is not an ONNX model"), (b"\x08", "is not an")):
        path = tmp_path / "bad.onnx"
        path.write_bytes(content)
        with pytest.raises(FormatError, match=words):
            open_program(path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackage, match=r"edgewright\[onnx\]"):
        open_program(toy)


@pytest.mark.parametrize("place", ["../secret.bin", "/etc/hostname", "link.bin"])
def test_external_data_stays_in_its_folder(place, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    os.symlink(tmp_path / "secret.bin", folder / "link.bin")
    tensor = TensorProto(name="w2", dims=[3, 4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=place)
    proto = model_proto([helper.make_node("MatMul", ["x", "w2"], ["y"])], [tensor])
    with pytest.raises(FormatError, match="outside its own folder"):
        open_program(write(folder / "m.onnx", proto))


def test_unknown_operators_and_other_libraries_are_refused(tmp_path):
    node = helper.make_node("Mystery", ["x"], ["y"], domain="some.vendor")
    proto = model_proto([node])
    proto.opset_import.append(helper.make_opsetid("some.vendor", 1))
    with pytest.raises(FormatError, match="cannot load"):
        open_program(write(tmp_path / "m.onnx", proto))


def test_a_memory_bomb_dies_in_its_child(tmp_path):
    size = numpy_helper.from_array(np.array([1 << 20, 1 << 21], np.int64), "size")
    nodes = [helper.make_node("ConstantOfShape", ["size"], ["z"]), helper.make_node("Add", ["x", "z"], ["y"])]
    path = write(tmp_path / "bomb.onnx", model_proto(nodes, [size]))
    try:
        open_program(path).close()  # a runtime that refuses the memory in good order is as good
    except EdgewrightError:
        pass


def test_an_endless_model_is_stopped(tmp_path, monkeypatch):
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["v", "v"], ["v2"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v2", TensorProto.FLOAT, None),
        ],
    )
    extra = [numpy_helper.from_array(np.array(1 << 62), "count"), numpy_helper.from_array(np.array(True), "go")]
    nodes = [helper.make_node("Loop", ["count", "go", "x"], ["y"], body=body)]
    path = write(tmp_path / "loop.onnx", model_proto(nodes, extra))
    start = time.perf_counter()
    with pytest.raises(FormatError, match="within 4 s"):
        first_run_in_child("edgewright.runtime.onnx", "first_run", path, timeout=4)
    assert time.perf_counter() - start < 30


def test_damaged_files_raise_typed_errors_only(tmp_path, toy):
    """Truncations and bit flips: parsed and looked at here, run only in the child where parsing lets them pass."""
    data, rng = toy.read_bytes(), random.Random(0)
    damaged = [data[:cut] for cut in range(0, len(data), 7)]
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(changed))
    path, survivors = tmp_path / "damaged.onnx", []
    for content in damaged:
        path.write_bytes(content)
        try:
            check_model_file(path)
        except FormatError:
            continue
        survivors.append(content)
    assert len(survivors) < len(damaged)
    folder = tmp_path / "survivors"
    folder.mkdir()
    for i, content in enumerate(survivors):
        (folder / f"{i}.onnx").write_bytes(content)
    # one child for all of them would end at the first crash; a few children tell as much in less time
    for i in rng.sample(range(len(survivors)), 6):
        try:
            open_program(folder / f"{i}.onnx", threads=1).close()
        except EdgewrightError:
            pass


def test_the_check_runs_in_the_child_and_once(toy, monkeypatch):
    open_program(toy).close()
    monkeypatch.setattr(child_check.subprocess, "Popen", None)  # a second start would raise
    open_program(toy).close()
    assert first_run(str(toy)) == {"stopped": ""}
    os.utime(toy, ns=(1, 1))
    with pytest.raises(TypeError):
        OnnxProgram(toy)
