"""Int8 whitepaper (arXiv 1806.08342): what each choice of an integer network costs, and what training wins back.

EfficientNet-Lite0 with its ImageNet weights is held against its float self on crops of real photographs and video
frames: schemes after calibration, 4 bits with and without training, ONNX Runtime's own quantiser. A small network
trained here on handwritten digits shows accuracy over seeds, and what correcting and freezing batch norm is good for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgewright.measure.report import Report
from edgewright.systems.int8_whitepaper.study import digits_rows, photographs_parts, weight_rows
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, row_over_seeds


@dataclass(frozen=True)
class Int8Whitepaper:
    """size: pixels of a crop. evaluation 0 leaves the photographs out; blocks 0 keeps the whole network.

    steps, batch, learning_rate: of training EfficientNet-Lite0 under quantisation; digits_steps: of training the small
    network, and digits_qat_steps of training it on under quantisation.
    """

    seed: int = 0
    seeds: int = 3
    size: int = 128
    calibration: int = 100
    evaluation: int = 144
    training_images: int = 512
    steps: int = 150
    batch: int = 16
    learning_rate: float = 1e-4
    runs: int = 50
    digits_steps: int = 300
    digits_qat_steps: int = 200


def tiny() -> Int8Whitepaper:
    return Int8Whitepaper(seeds=1, size=64, evaluation=0, digits_steps=30, digits_qat_steps=15)


def small() -> Int8Whitepaper:
    return Int8Whitepaper()


def paper() -> Int8Whitepaper:
    """The published resolution and steps; the paper's ImageNet is not here, so the images are those of `small`."""
    return Int8Whitepaper(size=224, evaluation=1152, training_images=4096, steps=20000, learning_rate=1e-5)


REAL = ("small", "paper")  # a tiny run looks at no photographs and trains too little to show anything
CLAIMS = (
    Claim("worst_depthwise_channel", "channel, symmetric", ">", against="layer, symmetric", factor=2.0),
    Claim("worst_depthwise_layer", "channel, symmetric", ">", against="layer, asymmetric", factor=1.2),
    Claim("accuracy", "digits, 4-bit weights, trained", ">", against="digits, 4-bit weights, calibrated", sizes=REAL),
    Claim("jitter", "corrected, then frozen", "<", against="naive fold", sizes=REAL),
    Claim("top1_agreement", "8-bit activations alone", ">", 85.0, sizes=REAL),
    Claim("kl", "W8A8 channel, symmetric", "<", against="W8A8 layer, symmetric", factor=0.5, sizes=REAL),
    Claim("kl", "W4A8 trained", "<", against="W4A8 calibrated", factor=0.5, sizes=REAL),
    Claim("kl", "W8A4 trained", ">", against="W4A8 trained", sizes=REAL),
    Claim("kl", "W8A8 in ONNX Runtime", "<", against="ONNX Runtime's own, as documented for AVX2", sizes=REAL),
    Claim("file_size", "W8A8 in ONNX Runtime", "<", against="float32 in ONNX Runtime", factor=0.3, sizes=REAL),
)
CLOCKED: tuple[str, ...] = ("latency",)
HEADLINE: Headline | None = Headline(
    "EfficientNet-Lite0 at W8A8 keeps {ours:.0f} % of first choices in ONNX Runtime, whose own quantiser keeps "
    "{theirs:.0f}; {layer:.0f} % with a step a layer",
    {
        name: Cell("int8-whitepaper.csv", {"metric": "top1_agreement", "subject": subject})
        for name, subject in (
            ("ours", "W8A8 in ONNX Runtime"),
            ("theirs", "ONNX Runtime's own, as documented for AVX2"),
            ("layer", "W8A8 layer, symmetric"),
        )
    },
)


def plan(settings: Int8Whitepaper) -> Plan:
    """Seconds are estimates for two idle cores, from runs of each part with few steps."""
    pixels = (settings.size / 128) ** 2
    digits = settings.seeds * (0.015 * settings.digits_steps + 0.03 * 6 * settings.digits_qat_steps)
    photographs = 0.0
    steps: tuple[str, ...] = (f"a small network on digits, {settings.seeds} seed(s): float, calibrated, trained",)
    if settings.evaluation:
        images = 8 * settings.calibration + 12 * settings.evaluation + 2 * settings.training_images
        photographs = 120 + pixels * (0.08 * images + 2 * settings.steps * settings.batch * 0.11)
        steps += (
            f"calibrate EfficientNet-Lite0 on {settings.calibration} crops of {settings.size} pixels, seven ways",
            f"train W4A8 and W8A4 for {settings.steps} steps each on the float network's answers",
            "export to ONNX, and quantise the float file with ONNX Runtime; agreement, size, latency",
        )
    outputs: tuple[str, ...] = ("weights.csv", "sqnr.png", "ranges.png", "jitter.png", "points.json")
    return Plan(
        ("SQNR of every layer's weights under four schemes", *steps),
        seconds=4 + digits + photographs,
        memory_bytes=int(3e9 if settings.evaluation else 8e8),
        disk_bytes=int(4e8 if settings.evaluation else 1e7),
        outputs=(*outputs, "agreement.png", "float.onnx", "int8.onnx") if settings.evaluation else outputs,
    )


def run(settings: Int8Whitepaper, output: Path) -> Report:
    """Training resumes in training-*/."""
    run = Run(output, "Int8 whitepaper: EfficientNet-Lite0 and a network for digits as integers")
    run.add_rows(run.memo("weights", partial(weight_rows, settings, output)))
    if settings.evaluation:
        for name, measure in photographs_parts(settings, output).items():
            run.add_rows(run.memo(name, measure))
        label = "same first choice as the float network (% of crops)"
        run.bars("agreement.png", "top1_agreement", label, xlim=(0, 100))
    seeds = run.over_seeds("digits", settings.seeds, partial(digits_rows, settings))
    run.add_rows(row_over_seeds(rows) for rows in zip(*seeds, strict=True) if rows[0]["metric"] != "curve")
    curves = {row["subject"]: (row["steps"], row["value"]) for row in seeds[0] if row["metric"] == "curve"}
    run.lines("jitter.png", curves, "step", "validation loss (nats)", style=".-", yscale="log")
    run.note("SQNR in dB; jitter: standard deviation of the last 20 validation losses of a training run")
    if settings.evaluation:
        run.note(
            f"agreement and KL against the float network, on {settings.evaluation} crops of pictures that nothing was "
            "calibrated or trained on; standard errors count pictures"
        )
    return run.report
