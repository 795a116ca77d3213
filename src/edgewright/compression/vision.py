"""`edgewright compress` for image classifiers: calibrate, train if asked, convert, export, run the files, report.

`compress_vision` takes any network that `quantize_static` takes; `compress_bundled` is the command's way to it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from edgewright.compression.settings import VISION_MODELS
from edgewright.compression.vision_files import latencies, program_logits, write_description, write_onnx, write_pte
from edgewright.errors import UsageError
from edgewright.evaluation.classification import add_agreement, logits_of
from edgewright.io.images import image_crops, normalise
from edgewright.io.run_folder import claim_folder
from edgewright.measure.report import Report
from edgewright.models.efficientnet_lite import INPUT_SIZE, MEAN, STD, load_efficientnet_lite0
from edgewright.quantization.static.config import StaticConfig
from edgewright.quantization.static.file import save_static
from edgewright.quantization.static.freezing import freeze_
from edgewright.quantization.static.network import calibrate_, convert_static, quantize_static, static_report
from edgewright.quantization.static.sqnr import feature_sqnr, plot_channel_ranges, plot_sqnr, save_rows, sqnr_report
from edgewright.quantization.static.training import StaticTraining, train_static

FLOAT, SHIPPED, IN_RUNTIME = "float32", "quantised", "quantised, in ONNX Runtime"
IN_EXECUTORCH = "quantised, in ExecuTorch"
TARGETS = ("onnx", "pte")


@dataclass(frozen=True)
class VisionSettings:
    """bits: of the weights, 2 to 8, per output channel; activations have 8. steps: of training under quantisation, 0
    for calibration alone. batch: of calibration and training. runs: timings of one image; 0 leaves them out. targets:
    files to write, "onnx" (always) and "pte" (for ExecuTorch, one image a call).
    """

    bits: int = 8
    steps: int = 0
    learning_rate: float = 1e-4
    batch: int = 8
    runs: int = 30
    seed: int = 0
    targets: tuple[str, ...] = ("onnx",)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown:
            raise UsageError(f"an image classifier is written as {', '.join(TARGETS)}, not {', '.join(unknown)}")
        if self.steps < 0 or self.batch < 1 or self.runs < 0:
            raise UsageError(f"steps={self.steps}, batch={self.batch}, runs={self.runs}: none can be negative")
        self.static  # noqa: B018  (checks the bits)

    @property
    def static(self) -> StaticConfig:
        return StaticConfig(weight_bits=self.bits)


def compress_vision(
    model: nn.Module,
    calibration_images: Tensor,
    output: str | Path,
    settings: VisionSettings | None = None,
    *,
    evaluation_images: Tensor | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Report:
    """Compress a classifier to integers and leave everything about it in the folder `output`.

    images: [N, C, H, W] as the network takes them; the evaluation's are compared with the float network and fall back
    to the calibration's, which the report then says. Files: model.safetensors (codes packed at `bits`), int8.onnx,
    float.onnx and, where asked for, int8.pte (each run and compared before it gets its name), weights.csv, sqnr.png,
    ranges.png, report.json and .md.
    """
    settings = settings or VisionSettings()
    folder = Path(output)
    if calibration_images.ndim != 4 or not len(calibration_images):
        raise UsageError(
            f"calibration_images has the shape {tuple(calibration_images.shape)}; give images [N, C, H, W], N > 0"
        )
    images = calibration_images if evaluation_images is None else evaluation_images
    example = calibration_images[:2]
    say(f"calibrating on {len(calibration_images)} images")
    prepared = quantize_static(model, example, settings.static)
    calibrate_(prepared, calibration_images.split(settings.batch))
    if settings.steps:
        say(f"training {settings.steps} steps under quantisation")
        training = StaticTraining(
            settings.steps, settings.batch, settings.learning_rate, checkpoint_every=25, seed=settings.seed
        )
        train_static(prepared, model, calibration_images, training, folder / "training")
        freeze_(prepared)
        shutil.rmtree(folder / "training" / "checkpoints", ignore_errors=True)
    converted = convert_static(prepared)

    report = Report(f"{type(model).__name__} at {settings.bits}-bit weights", asdict(settings))
    say("measuring")
    reference = logits_of(model, images)
    add_agreement(report, SHIPPED, reference, logits_of(converted, images))
    features = feature_sqnr(prepared, images[:32].split(settings.batch))
    last, worst = list(features)[-1], min(features, key=lambda name: features[name])
    report.add("feature_sqnr", features[last], subject=SHIPPED, unit="dB")
    rows = sqnr_report(model, example, bits=tuple(dict.fromkeys((8, settings.bits))))
    save_rows(rows, folder / "weights.csv")
    plot_sqnr(rows, folder / "sqnr.png", settings.bits)
    plot_channel_ranges(model, example, folder / "ranges.png")

    size = save_static(converted, folder / "model.safetensors", settings.static)
    report.add("packed_size", size / 1e6, subject=SHIPPED, unit="MB")
    files = {FLOAT: folder / "float.onnx", IN_RUNTIME: folder / "int8.onnx"}
    say("exporting to ONNX and running what was written")
    for subject, network in ((FLOAT, model), (IN_RUNTIME, converted)):
        export = write_onnx(network, files[subject], example, network is converted, original=model)
        report.add("file_size", export.path.stat().st_size / 1e6, subject=subject, unit="MB")
        report.add("distance_to_original", export.checks["original"]["relative_error"], subject=subject)
    add_agreement(report, IN_RUNTIME, reference, program_logits(files[IN_RUNTIME], images))
    if "pte" in settings.targets:
        say("exporting to ExecuTorch and running what was written")
        files[IN_EXECUTORCH] = folder / "int8.pte"
        _add_pte(report, converted, files[IN_EXECUTORCH], images, reference, model)
    if settings.runs:
        for name, time in latencies(files, example[:1], settings.runs).items():
            report.add("latency", time.median, se=time.spread, n=time.n, subject=name, unit="ms")
    _add_notes(report, prepared, settings, evaluation_images is None, features[worst], worst)
    report.save(folder)
    return report


def compress_bundled(
    name: str,
    output: str | Path,
    settings: VisionSettings,
    *,
    calibration: int = 128,
    evaluation: int = 144,
    say: Callable[[str], None] = lambda sentence: None,
) -> Report:
    """Compress a classifier that an installed package carries, on crops of photographs that packages carry too."""
    if name not in VISION_MODELS:
        raise UsageError(f"unknown image classifier {name!r}; known: {', '.join(VISION_MODELS)}")
    claim_folder(output, "compress")
    model = load_efficientnet_lite0()
    crops = image_crops(calibration, INPUT_SIZE, settings.seed)
    held_out = image_crops(evaluation, INPUT_SIZE, settings.seed + 1, "evaluation")
    report = compress_vision(
        model, normalise(crops, MEAN, STD), output, settings, evaluation_images=normalise(held_out, MEAN, STD), say=say
    )
    write_description(name, output)
    return report


def _add_pte(
    report: Report, converted: nn.Module, path: Path, images: Tensor, reference: Tensor, original: nn.Module
) -> None:
    export = write_pte(converted, path, images[:1], original)
    report.add("distance_to_original", export.checks["original"]["relative_error"], subject=IN_EXECUTORCH)
    report.add("file_size", export.bytes / 1e6, subject=IN_EXECUTORCH, unit="MB")
    report.add("delegated", 100 * export.delegation.share, subject=IN_EXECUTORCH, n=export.delegation.total, unit="%")
    add_agreement(report, IN_EXECUTORCH, reference, program_logits(path, images))
    report.notes.extend(export.summary()[1:])


def _add_notes(
    report: Report, prepared: nn.Module, settings: VisionSettings, same_images: bool, worst: float, where: str
) -> None:
    found = static_report(prepared)
    report.notes.append("agreement and KL are against the float network; latency: one image, one thread")
    report.notes.append("distance_to_original: difference from the float network over the spread of its outputs")
    if same_images:
        report.notes.append("no evaluation images were given: agreement is on the calibration images, which flatters")
    report.notes.append(f"{len(found.layers)} layers; the noisiest activation is {where} at {worst:.1f} dB")
    report.notes.extend(f"left in float: {line}" for line in found.left_float)
    report.notes.extend(found.notices)
    if settings.bits < 8:
        report.notes.append(
            f"model.safetensors packs the {settings.bits}-bit codes; runtimes multiply int8: the exported files hold "
            "them in a byte each and are neither smaller nor faster than at 8 bits"
        )
