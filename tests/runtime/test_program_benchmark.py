"""Benchmarks of programs: they take turns, every promised figure is there, languages and programs share a report."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from edgewright.errors import UsageError
from edgewright.runtime import program_benchmark
from edgewright.runtime.benchmark import FILE_METRICS, benchmark_files, report_columns
from edgewright.runtime.program_benchmark import PROGRAM_METRICS, time_programs

onnx = importlib.import_module("onnx")

TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper


def write(path, width):
    """tokens [batch, length] -> float rows times a matrix [1, width]."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["x", "axis"], ["wide"]),
        helper.make_node("MatMul", ["wide", "w"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(np.ones((1, width), np.float32), "w")]
    tensors.append(numpy_helper.from_array(np.array([-1]), "axis"))
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def pair(tmp_path):
    return [write(tmp_path / "a.onnx", 4), write(tmp_path / "b.onnx", 4096)]


def test_every_program_gets_every_metric(pair):
    report = benchmark_files(pair, repeats=3, threads=1, batch=2, length=16)
    for path in pair:
        assert all(report.value(metric, path.name) > 0 for metric in PROGRAM_METRICS)
        assert report.value("file_size", path.name) == path.stat().st_size / 1e6
        row = report.row("latency", path.name)
        assert row.n == 3 and row.unit == "ms"
        # both are medians of the same three samples
        assert report.value("inferences", path.name) == pytest.approx(2e3 / row.value)
    assert report.subjects == ["a.onnx", "b.onnx"] and report_columns(report) == list(PROGRAM_METRICS)
    assert report.settings["batch"] == 2 and "prompt_tokens" not in report.settings
    assert any("interquartile" in note for note in report.notes)


def test_programs_take_turns(pair, monkeypatch):
    monkeypatch.setattr(program_benchmark, "SAMPLE_SECONDS", 0.0)
    order: list[str] = []
    files = {path.name: path for path in pair}
    timings = time_programs(files, 1, 8, repeats=2, threads=1, tick=order.append)
    assert order == ["a.onnx", "b.onnx"] * 3 and all(timing.n == 2 for timing in timings.values())


def test_a_language_model_beside_a_program(toy_file, pair):
    report = benchmark_files([toy_file, pair[0]], prompt_tokens=8, decode_tokens=4, repeats=2, threads=1)
    assert all(report.value(metric, toy_file.name) > 0 for metric in FILE_METRICS)
    assert report.value("latency", "a.onnx") > 0
    assert report_columns(report)[-2:] == ["peak_memory", "roofline"] and "latency" in report_columns(report)


def test_bad_arguments(pair):
    with pytest.raises(UsageError, match="batch and a length"):
        benchmark_files(pair, batch=0)
    with pytest.raises(UsageError, match="there is no file"):
        benchmark_files([pair[0], pair[0].with_name("none.onnx")])
