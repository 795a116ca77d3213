"""The measurements behind the int8 whitepaper's recipe, each a list of report rows.

`settings` are the recipe's; every function builds what it needs, so that any of them can be run alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.compression.vision_files import latencies, program_logits, runtime_quantize, write_onnx
from edgewright.data.digits import digits_network, score, train_digits
from edgewright.evaluation.classification import agreement, logits_of
from edgewright.io import images as pictures
from edgewright.models.efficientnet_lite import MEAN, STD, load_efficientnet_lite0
from edgewright.quantization.static.config import StaticConfig
from edgewright.quantization.static.freezing import freeze_, freeze_after_
from edgewright.quantization.static.integer import IntegerExecutor
from edgewright.quantization.static.network import calibrate_, convert_static, quantize_static
from edgewright.quantization.static.sqnr import feature_sqnr, plot_channel_ranges, plot_sqnr, save_rows, sqnr_report
from edgewright.quantization.static.training import StaticTraining, train_static

Rows = list[dict[str, Any]]
Labelled = tuple[Tensor, Tensor]  # images and labels
SCHEMES = {
    "layer_sym": ("layer, symmetric", StaticConfig(granularity="layer")),
    "layer_asym": ("layer, asymmetric", StaticConfig(granularity="layer", symmetric=False)),
    "channel_sym": ("channel, symmetric", StaticConfig()),
    "channel_asym": ("channel, asymmetric", StaticConfig(symmetric=False)),
}
OTHERS = {
    "8-bit activations alone": StaticConfig(weight_bits=None),
    "W4A8 calibrated": StaticConfig(weight_bits=4),
    "W8A4 calibrated": StaticConfig(activation_bits=4),
}
EVALUATIONS = 40  # of a training run's validation curve
JITTER_OVER = 20  # of them, the last


def normalised(images: Tensor) -> Tensor:
    return pictures.normalise(images, MEAN, STD)


def weight_rows(settings: Any, output: Path) -> Rows:
    """SQNR of the weights at 8 bits: the worst depthwise layer and the worst live channel of any; CSV and plots."""
    model = load_efficientnet_lite0()
    example = torch.zeros(1, 3, settings.size, settings.size)
    bits = (8, 6, 4) if settings.evaluation else (8,)
    found = sqnr_report(model, example, bits=bits)
    save_rows(found, output / "weights.csv")
    plot_sqnr(found, output / "sqnr.png")
    plot_channel_ranges(model, example, output / "ranges.png")
    rows: Rows = []
    for scheme, (subject, _) in SCHEMES.items():
        deep = [row for row in found if row.scheme == scheme and row.bits == 8 and row.kind == "depthwise"]
        for metric, value in (
            ("worst_depthwise_layer", min(row.sqnr for row in deep)),
            ("worst_depthwise_channel", min(row.worst_channel for row in deep)),
        ):
            rows.append({"metric": metric, "value": value, "subject": subject, "n": len(deep), "unit": "dB"})
    widest = max(deep, key=lambda row: row.spread_after)
    for metric, value in (("spread_before", widest.spread_before), ("spread_after", widest.spread_after)):
        rows.append({"metric": metric, "value": value, "subject": f"{widest.layer}, widest channel over median"})
    return rows


def photographs_parts(settings: Any, output: Path) -> dict[str, Callable[[], Rows]]:
    """Name -> measurement, all sharing one float network and its answers."""
    bench = cache(partial(_Bench, settings, output))
    parts: dict[str, Callable[[], Rows]] = {}
    for subject, config in SCHEMES.values():
        parts[f"W8A8 {subject}"] = partial(_calibrated, bench, f"W8A8 {subject}", config)
    for name, config in OTHERS.items():
        parts[name] = partial(_calibrated, bench, name, config)
    for name, bits in (("W4A8", StaticConfig(weight_bits=4)), ("W8A4", StaticConfig(activation_bits=4))):
        parts[f"{name} trained"] = partial(_trained, bench, f"{name} trained", bits)
    parts["integers"] = lambda: bench().integer_rows()
    parts["files"] = lambda: bench().file_rows()
    return parts


def _calibrated(bench: Callable[[], _Bench], subject: str, config: StaticConfig) -> Rows:
    return bench().quality_rows(subject, bench().prepared(config))


def _trained(bench: Callable[[], _Bench], subject: str, config: StaticConfig) -> Rows:
    return bench().trained_rows(subject, config)


class _Bench:
    """The float network, the pictures, and its answers to those of the evaluation."""

    def __init__(self, settings: Any, output: Path) -> None:
        self.settings, self.output = settings, output
        self.model = load_efficientnet_lite0()
        crops = partial(pictures.image_crops, size=settings.size)
        self.calibration = normalised(crops(settings.calibration, seed=settings.seed))
        self.evaluation = normalised(crops(settings.evaluation, seed=settings.seed + 1, split="evaluation"))
        frames = sum(1 for _ in pictures.VIDEOS["evaluation"]) * pictures.FRAMES_PER_VIDEO
        self.groups = [i % (len(pictures.PHOTOGRAPHS["evaluation"]) + frames) for i in range(settings.evaluation)]
        self.reference = logits_of(self.model, self.evaluation)

    def prepared(self, config: StaticConfig) -> nn.Module:
        return calibrate_(quantize_static(self.model, self.calibration[:1], config), self.calibration.split(8))

    def agreement_rows(self, subject: str, logits: Tensor) -> Rows:
        found = agreement(self.reference, logits, self.groups)
        return [
            {"metric": metric, "value": each.value, "subject": subject, "se": each.se, "n": each.n, "unit": unit}
            for metric, (each, unit) in found.items()
        ]

    def quality_rows(self, subject: str, prepared: nn.Module) -> Rows:
        rows = self.agreement_rows(subject, logits_of(prepared, self.evaluation))
        features = feature_sqnr(prepared, self.evaluation[:32].split(8))
        if "pool" in features:
            rows.append({"metric": "feature_sqnr", "value": features["pool"], "subject": subject, "unit": "dB"})
        return rows

    def trained_rows(self, subject: str, config: StaticConfig) -> Rows:
        settings = self.settings
        folder = self.output / f"training-{subject.split()[0]}"
        count = settings.training_images
        images = pictures.image_crops(count, settings.size, seed=settings.seed + 2)
        training = StaticTraining(
            settings.steps, settings.batch, settings.learning_rate, checkpoint_every=25, seed=settings.seed
        )
        prepared = self.prepared(config)
        train_static(prepared, self.model, images, training, folder, normalised)
        rows = self.quality_rows(subject, freeze_(prepared))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # measured: its state is no longer needed
        return rows

    def integer_rows(self) -> Rows:
        """Integer-only execution against fake quantisation: layer by layer, and the answers of the whole network."""
        converted = convert_static(self.prepared(StaticConfig()))
        executor = IntegerExecutor(converted)
        matches = executor.compare(self.evaluation[:8]).values()
        equal = sum(match.equal * match.elements for match in matches) / sum(match.elements for match in matches)
        subject = "W8A8 in integers only"
        answers = torch.cat([executor(part) for part in self.evaluation.split(8)])
        return [
            {"metric": "equal_codes", "value": 100 * equal, "subject": subject, "unit": "%"},
            {"metric": "worst_step", "value": max(m.worst for m in matches), "subject": subject},
            *self.agreement_rows(subject, answers),
        ]

    def file_rows(self) -> Rows:
        """Sizes, answers and latencies of files: float, ours, and ONNX Runtime's own quantisation."""
        folder, example = self.output, self.calibration[:2]
        converted = convert_static(self.prepared(StaticConfig()))
        write_onnx(self.model, folder / "float.onnx", example, integers=False)
        write_onnx(converted, folder / "int8.onnx", example, integers=True, original=self.model)
        files = {"float32 in ONNX Runtime": folder / "float.onnx", "W8A8 in ONNX Runtime": folder / "int8.onnx"}
        for seven, name in ((False, "ONNX Runtime's own"), (True, "ONNX Runtime's own, as documented for AVX2")):
            files[name] = folder / f"runtime-{7 if seven else 8}.onnx"
            runtime_quantize(files["float32 in ONNX Runtime"], files[name], self.calibration, seven)
        rows: Rows = []
        for name, file in files.items():
            size = file.stat().st_size / 1e6
            rows += [
                {"metric": "file_size", "value": size, "subject": name, "unit": "MB"},
                *self.agreement_rows(name, program_logits(file, self.evaluation)),
            ]
        for name, time in latencies(files, self.evaluation[:1], self.settings.runs).items():
            rows.append(
                {
                    "metric": "latency",
                    "value": time.median,
                    "se": time.spread,
                    "subject": name,
                    "n": time.n,
                    "unit": "ms",
                }
            )
        return rows


def digits_rows(settings: Any, seed: int) -> Rows:
    """Accuracy of the small network as floats, calibrated and trained on; jitter of two ways to fold batch norm."""
    data, held_out = pictures.digits("calibration"), pictures.digits("evaluation")
    model = digits_network(settings.seed + seed)
    train_digits(model, data, held_out, settings.digits_steps, 3e-3, settings.seed + seed)
    rows: Rows = [_accuracy("digits, float", model, held_out)]
    steps = settings.digits_qat_steps
    for bits in (8, 4):
        prepared = quantize_static(model, data[0][:1], StaticConfig(weight_bits=bits))
        calibrate_(prepared, data[0][:512].split(64))
        rows.append(_accuracy(f"digits, {bits}-bit weights, calibrated", prepared, held_out))
        freeze_after_(prepared, steps)
        train_digits(prepared, data, held_out, steps, 1e-3, settings.seed + seed)
        rows.append(_accuracy(f"digits, {bits}-bit weights, trained", prepared, held_out))
    rows += jitter_rows(model, data, held_out, 2 * steps, settings.seed + seed)
    return rows


def jitter_rows(model: nn.Module, data: Labelled, held_out: Labelled, steps: int, seed: int) -> Rows:
    """The trained network trained on at 4 bits, in small batches: how restless is its validation loss?

    One step a layer, as in the paper's figure: with a step a channel, folding scales a channel's weights and its step
    alike, so that no code can jump with the batch.
    """
    rows: Rows = []
    for name, bn, at in (("naive fold", "naive", 1.0), ("corrected, then frozen", "correct", 1 / 3)):
        config = StaticConfig(weight_bits=4, granularity="layer", symmetric=False, bn=bn)
        student = calibrate_(quantize_static(model, data[0][:1], config), data[0][:512].split(64))
        freeze_after_(student, steps, at)
        every = max(1, steps // EVALUATIONS)
        result = train_digits(student, data, held_out, steps, 1e-4, seed, every, "constant", batch=16)
        marks, curve = zip(*((r["step"], r["eval_loss"]) for r in result.history if "eval_loss" in r), strict=True)
        tail = torch.tensor(curve[-JITTER_OVER:], dtype=torch.float64)
        rows.append({"metric": "jitter", "value": float(tail.std()), "subject": name, "unit": "nats"})
        rows.append(_accuracy(f"digits, 4-bit weights per layer, {name}", student, held_out))
        rows.append({"metric": "curve", "value": list(curve), "steps": list(marks), "subject": name})
    return rows


def _accuracy(subject: str, model: nn.Module, held_out: Labelled) -> dict[str, Any]:
    value = score(model, *held_out)["accuracy"]
    return {"metric": "accuracy", "value": value, "subject": subject, "unit": "%", "n": len(held_out[0])}
