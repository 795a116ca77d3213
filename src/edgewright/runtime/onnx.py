"""ONNX Runtime as a program: arrays in, arrays out, on the CPU.

A file from outside meets the runtime first in a child process (`child_check`), where its protobuf is parsed, the places
of its external data are looked at and one run is tried; only then is it opened here. No custom operator libraries are
loaded and nothing is reported to anyone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgewright.errors import EdgewrightError, FormatError, MissingPackage, Unsupported, UsageError, in_one_line
from edgewright.runtime.child_check import first_run_in_child
from edgewright.runtime.program_inputs import TensorSpec, checked_inputs, stand_in_inputs

if TYPE_CHECKING:
    import numpy as np

INSTALL = "pip install 'edgewright[onnx]'"
MAX_FILE = (2 << 30) - 1  # protobuf's own limit; larger models keep their tensors in a second file
MAX_DEPTH = 16  # of graphs inside graphs (If, Loop)
CHECK_LENGTH = 8  # free axes other than the first, in the run that only asks whether the file runs

# The runtime's names of the types that NumPy has too.
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(uint16)": "uint16",
    "tensor(int32)": "int32",
    "tensor(uint32)": "uint32",
    "tensor(int64)": "int64",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}


class OnnxProgram:
    """An .onnx file in ONNX Runtime. `inputs` and `outputs` as in `Program`; a context manager.

    Raises FormatError (truncated, foreign or hostile file), Unsupported (types that are no tensors), MissingPackage.
    """

    def __init__(self, path: str | Path, threads: int | None = None, *, check: bool = True) -> None:
        self.path = Path(path)
        _check_size(self.path)
        onnxruntime = _import("onnxruntime")
        if check:
            first_run_in_child("edgewright.runtime.onnx", "first_run", self.path)
        self._session: Any = _session(onnxruntime, self.path, threads)
        self.inputs = _specs(self._session.get_inputs(), self.path)
        self.outputs = _specs(self._session.get_outputs(), self.path)

    def run(self, arrays: Sequence[np.ndarray] | Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs in order. Raises UsageError for inputs that do not fit, EdgewrightError where a run stops."""
        if self._session is None:
            raise UsageError(f"the program of {self.path} is closed; open it again with open_program(path)")
        checked = checked_inputs(self.inputs, arrays, self.path)
        feed = {spec.name: array for spec, array in zip(self.inputs, checked, strict=True)}
        try:
            results = self._session.run(None, feed)
        except Exception as error:  # the runtime's exceptions share no base class of their own
            raise EdgewrightError(f"ONNX Runtime stopped in {self.path.name}: {in_one_line(error)}") from error
        return list(results)

    def close(self) -> None:
        """Free the session; harmless when called again."""
        self._session = None

    def __enter__(self) -> OnnxProgram:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def first_run(path: str) -> dict[str, Any]:
    """What the child does with a foreign file: parse it, look at its external data, load it, run it once.

    Returns the error of the run, if any, under "stopped": made-up inputs need not suit every model, and an error that
    the runtime reports in good order does no harm. Raises FormatError for what no inputs could mend.
    """
    check_model_file(Path(path))
    session = _session(_import("onnxruntime"), Path(path), 1)
    specs = _specs(session.get_inputs(), Path(path))
    _specs(session.get_outputs(), Path(path))
    try:
        arrays = stand_in_inputs(specs, length=CHECK_LENGTH, seed=None)
    except UsageError as error:
        raise FormatError(f"{path} cannot be run: {error}") from error
    try:
        session.run(None, {spec.name: array for spec, array in zip(specs, arrays, strict=True)})
    except Exception as error:
        return {"stopped": in_one_line(error)}
    return {"stopped": ""}


def check_model_file(path: Path) -> None:
    """Parse the protobuf and refuse external data outside the file's own folder. Raises FormatError."""
    onnx = _import("onnx")
    _check_size(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, or whatever a broken field provokes
        raise FormatError(f"{path} is not an ONNX model: {in_one_line(error)}") from error
    if not model.opset_import or not model.graph.output:
        raise FormatError(f"{path} is not an ONNX model: it has no {'outputs' if model.opset_import else 'opset'}")
    functions = [(list(function.node), MAX_DEPTH) for function in model.functions]
    _check_tensors(model.graph.initializer, path)
    _check_graphs([(list(model.graph.node), MAX_DEPTH), *functions], path)


def _check_graphs(pending: list[tuple[list[Any], int]], path: Path) -> None:
    while pending:
        nodes, depth = pending.pop()
        if depth == 0:
            raise FormatError(f"{path} nests graphs more than {MAX_DEPTH} deep")
        for node in nodes:
            for attribute in node.attribute:
                _check_tensors([attribute.t, *attribute.tensors], path)
                for graph in (attribute.g, *attribute.graphs):
                    if graph.node or graph.initializer:
                        _check_tensors(graph.initializer, path)
                        pending.append((list(graph.node), depth - 1))


def _check_tensors(tensors: Sequence[Any], path: Path) -> None:
    """External data may only lie beside the file: no absolute path, no way up, no link out of the folder."""
    folder = path.resolve().parent
    for tensor in tensors:
        if any(size < 0 for size in tensor.dims):
            raise FormatError(f"{path} has a tensor {tensor.name[:80]!r} of negative size")
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            place = Path(entry.value)
            target = (folder / place).resolve()
            if place.is_absolute() or ".." in place.parts or folder not in target.parents:
                raise FormatError(f"{path} keeps {tensor.name[:80]!r} outside its own folder, in {entry.value[:120]!r}")
            if not target.is_file():
                raise FormatError(f"{path} needs the file {entry.value[:120]!r} beside it, which is not there")


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    if not 0 < size <= MAX_FILE:
        raise FormatError(f"{path} is not an ONNX model: {size} bytes, a model has 1 to {MAX_FILE}")


def _session(onnxruntime: Any, path: Path, threads: int | None) -> Any:
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # only what is fatal: every error is raised, and said once
    options.intra_op_num_threads = threads if threads is not None else len(_cores())
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise FormatError(f"ONNX Runtime cannot load {path}: {in_one_line(error)}") from error


def _cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def _specs(values: Sequence[Any], path: Path) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        if value.type not in DTYPES:
            raise Unsupported(
                f"{path.name} has {value.name[:80]!r} of type {value.type}; only plain tensors are run here"
            )
        shape = tuple(size if isinstance(size, int) and size >= 0 else None for size in value.shape)
        specs.append(TensorSpec(value.name, shape, DTYPES[value.type]))
    return tuple(specs)


def _import(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(f"ONNX files need the package {name}: {INSTALL}") from error
