"""Image classifiers as files: ours and ONNX Runtime's own int8, their answers and their latency."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import MissingPackage
from edgewright.io.atomic import atomic_file

ONNX_TOLERANCE = 0.25  # of an int8 network's proof: a code next door in each of many layers adds up
SMALL_BATCH = 16


def write_onnx(model: nn.Module, path: Path, example: Tensor, integers: bool) -> int:
    """Export through `export_onnx`, which runs and compares the file; returns its bytes."""
    from edgewright.export.onnx import export_onnx

    export_onnx(model, path, example_inputs=example, tolerance=ONNX_TOLERANCE if integers else None)
    return path.stat().st_size


def onnx_logits(path: Path, images: Tensor, threads: int | None = None) -> Tensor:
    """Logits [N, classes] of a file of ours in ONNX Runtime."""
    from edgewright.runtime.onnx import OnnxProgram

    with OnnxProgram(path, threads, check=False) as program:
        return torch.cat([torch.from_numpy(program.run([part.numpy()])[0]) for part in images.split(SMALL_BATCH)])


def latencies(files: Mapping[str, Path], image: Tensor, repeats: int, threads: int = 1) -> dict[str, Any]:
    """Milliseconds for one image [1, 3, H, W], the files in turn: subject -> Measurement."""
    from edgewright.measure.timing import alternate
    from edgewright.runtime.onnx import OnnxProgram

    array = image.numpy()
    programs = {name: OnnxProgram(path, threads, check=False) for name, path in files.items()}

    def case(program: OnnxProgram) -> Callable[[], Any]:
        return lambda: program.run([array])

    found = alternate({name: case(program) for name, program in programs.items()}, repeats=repeats, warmup=3)
    for program in programs.values():
        program.close()
    return {name: measurement.map(lambda s: 1e3 * s, "ms") for name, measurement in found.items()}


def runtime_quantize(float_file: Path, path: Path, images: Tensor, seven_bits: bool) -> int:
    """ONNX Runtime's own static quantisation of a float .onnx file, per channel, QDQ; returns the bytes.

    seven_bits: its `reduce_range`, which its documentation advises for x86 without VNNI. Raises MissingPackage.
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingPackage("this baseline needs ONNX Runtime: pip install 'edgewright[onnx]'") from error

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(images.split(SMALL_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch.numpy()}

    with atomic_file(path) as temporary, tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(temporary),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=seven_bits,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return path.stat().st_size
