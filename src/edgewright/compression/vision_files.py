"""Image classifiers as files: ours and ONNX Runtime's own int8, their answers and their latency."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.compression.settings import VISION_MODELS
from edgewright.errors import FormatError, MissingPackage, UsageError
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.onnx.exporter import export_onnx
from edgewright.io.atomic import atomic_file, write_text
from edgewright.io.images import image_crops, normalise
from edgewright.io.json_file import read_object
from edgewright.measure.timing import alternate
from edgewright.models.efficientnet_lite import INPUT_SIZE, MEAN, STD, load_efficientnet_lite0
from edgewright.quantization.static.file import load_static
from edgewright.runtime.program import Program, open_program

if TYPE_CHECKING:
    from edgewright.export.executorch.exporter import ExecuTorchExport
    from edgewright.export.onnx.exporter import OnnxExport

ONNX_TOLERANCE = 0.25  # of an int8 network's verification: a code next door in each of many layers adds up
SMALL_BATCH = 16
DESCRIPTION = "network.json"  # what the folder of a compressed classifier holds


def write_onnx(
    model: nn.Module, path: Path, example: Tensor, integers: bool, original: nn.Module | None = None
) -> OnnxExport:
    """Export through `export_onnx`, which runs the file and compares it, with the float network `original` too."""
    tolerance = ONNX_TOLERANCE if integers else None
    return export_onnx(model, path, example_inputs=example, tolerance=tolerance, original=original)


def write_pte(model: nn.Module, path: Path, image: Tensor, original: nn.Module | None = None) -> ExecuTorchExport:
    """The same through `export_executorch`, for one image [1, C, H, W] a call."""
    return export_executorch(model, None, path, example_inputs=[image], original=original)


def write_description(name: str, folder: str | Path) -> None:
    """Leave the name of the bundled network beside its compressed files, so that the folder can be loaded again."""
    write_text(Path(folder) / DESCRIPTION, json.dumps({"model": name}) + "\n")


def is_vision(model: str) -> bool:
    """Whether `model` names a bundled image classifier or a folder that compressing one has left."""
    return model in VISION_MODELS or (Path(model) / DESCRIPTION).is_file()


def load_vision(model: str) -> tuple[nn.Module, Tensor]:
    """(network, example image [1, 3, H, W]): a bundled classifier in float, or the integer network of its folder.

    Raises FormatError for a folder whose files are broken.
    """
    image = normalise(image_crops(1, INPUT_SIZE, 0), MEAN, STD)
    if model in VISION_MODELS:
        return load_efficientnet_lite0(), image
    folder = Path(model)
    try:
        name = read_object(folder / DESCRIPTION).get("model")
    except UsageError as error:
        raise FormatError(f"{folder / DESCRIPTION} does not name a network: {error}") from error
    if name not in tuple(VISION_MODELS):
        raise FormatError(f"{folder / DESCRIPTION} names {name!r:.80}; known are {', '.join(VISION_MODELS)}")
    return load_static(load_efficientnet_lite0(pretrained=False), image, folder / "model.safetensors"), image


def program_logits(path: Path, images: Tensor, threads: int | None = None) -> Tensor:
    """Logits [N, classes] of a file of ours (.onnx or .pte) in its runtime, in batches where it takes them."""
    with open_program(path, threads, check=False) as program:
        batch = SMALL_BATCH if program.inputs[0].shape[0] is None else int(program.inputs[0].shape[0])
        return torch.cat([torch.from_numpy(program.run([part.numpy()])[0]) for part in images.split(batch)])


def latencies(files: Mapping[str, Path], image: Tensor, repeats: int, threads: int = 1) -> dict[str, Any]:
    """Milliseconds for one image [1, 3, H, W], the files in turn: subject -> Measurement."""
    array = image.numpy()
    programs = {name: open_program(path, threads, check=False) for name, path in files.items()}

    def case(program: Program) -> Callable[[], Any]:
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
