"""PARQ (arXiv 2503.15748): quantisation inside the optimizer, from full-precision training to a hard grid.

A small residual network reads handwritten digits at 1 and 2 bits: full precision, the hard map (straight-through),
BinaryRelax and PARQ with the same steps and seeds. Beyond size tiny, MiniLM learns its own embeddings at ternary
weights: PARQ against fake-quantised layers at equal steps.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from edgewright.data.sentences import SentenceBench, SentenceSettings
from edgewright.io.atomic import write_text
from edgewright.io.images import digits
from edgewright.io.json_file import read_object
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.parq.lsbq import LSBQ
from edgewright.systems.parq.model import convert_parq_, on_target, quantized_groups
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.systems.parq.plots import (
    BINS,
    REACH,
    plot_inverse_slope,
    plot_on_target,
    plot_weights,
    weight_histogram,
)
from edgewright.systems.parq.proximal import ProxBinaryRelax, ProxHard, ProxPARQ
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import over_seeds
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("full precision", "straight-through", "BinaryRelax", "PARQ")
BITS = (1, 2)
EARLY, LATE = 0.25, 0.1  # parts of a run whose training loss is compared: its first quarter, its last tenth
LOOKS = 6  # times that a run is judged on held-out digits


@dataclass(frozen=True)
class Sentences:
    """MiniLM at ternary weights; seeds 0 leaves this part out."""

    seeds: int = 2
    steps: int = 200
    batch: int = 16
    tokens: int = 32
    learning_rate: float = 3e-4
    steepness: float = 10.0
    layers: int = 0
    training_sentences: int = 3000
    held_out_sentences: int = 256


@dataclass(frozen=True)
class Parq:
    """Annealing runs from `anneal_start` to `anneal_end`, as fractions of the steps; the tail trains on the grid."""

    seed: int = 0
    seeds: int = 5
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 3e-3
    width: int = 8
    anneal_start: float = 0.2
    anneal_end: float = 0.8
    steepness: float = 10.0
    sentences: Sentences = field(default_factory=Sentences)


def tiny() -> Parq:
    return Parq(seeds=1, steps=40, batch=32, width=4, learning_rate=1e-2, sentences=Sentences(seeds=0))


def small() -> Parq:
    return Parq()


def paper() -> Parq:
    """Long runs; the published ones are CIFAR-10 and ImageNet, which no package carries."""
    return Parq(steps=6000, steepness=50.0, width=32, sentences=Sentences(steps=20000, batch=64, tokens=64))


NOISE = 0.99  # "at least as accurate, but for noise": a hundredth less still counts
CLAIMS = (
    *(Claim("on_target", f"{method} {bits} bit", ">", 0.999999) for method in METHODS[1:] for bits in BITS),
    Claim("accuracy", "PARQ 1 bit", ">", against="straight-through 1 bit", factor=NOISE, sizes=("small", "paper")),
    Claim("early_gap", "PARQ 1 bit", "<", against="straight-through 1 bit", factor=0.5),
    Claim("late_gap", "PARQ 1 bit", "<", 0.1, sizes=("small", "paper")),
    Claim("accuracy", "PARQ 2 bit", ">", against="full precision", factor=0.9, sizes=("small", "paper")),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "digits at 1 bit: {ours:.1%} right, straight-through {hard:.1%}, full precision {full:.1%}; at 2 bits {two:.1%}",
    {
        name: Cell("parq.csv", {"metric": "accuracy", "subject": subject})
        for name, subject in (
            ("ours", "PARQ 1 bit"),
            ("hard", "straight-through 1 bit"),
            ("full", METHODS[0]),
            ("two", "PARQ 2 bit"),
        )
    },
)


def plan(settings: Parq) -> Plan:
    part = settings.sentences
    runs = settings.seeds * (1 + len(BITS) * (len(METHODS) - 1))
    digits = 2.1e-5 * runs * settings.steps * settings.batch * settings.width  # 115 s for 35 runs of 300
    layers = part.layers or 6
    steps = [f"train {runs} networks on 8 x 8 digits for {settings.steps} steps at full precision, 1 and 2 bits"]
    if part.seeds:
        steps.append(f"distil MiniLM-L6 into ternary weights, {3 * part.seeds} runs of {part.steps} steps")
    minilm = 3 * part.seeds * part.steps * 0.47 * layers / 6 * part.batch * part.tokens / 512
    return Plan(
        steps=tuple(steps),
        seconds=5 + digits + minilm,
        memory_bytes=int(1.4e9 if part.seeds else 6e8),
        disk_bytes=10**7,
        outputs=("weights.png", "on_target.png", "loss.png", "slope.png", "points.json"),
    )


def run(settings: Parq, output: Path) -> Report:
    """Every finished training is kept in points.json, so a second call goes on after the last one."""
    store = output / "points.json"
    points: dict[str, dict[str, Any]] = read_object(store) if store.exists() else {}

    def keep(key: str, point: dict[str, Any]) -> None:
        points[key] = point
        write_text(store, json.dumps(points) + "\n")

    for seed in range(settings.seeds):
        for bits, method in [(0, METHODS[0]), *((bits, method) for bits in BITS for method in METHODS[1:])]:
            subject = method if not bits else f"{method} {bits} bit"
            if f"{subject}/{seed}" not in points:
                keep(f"{subject}/{seed}", _digits(settings, method, bits, settings.seed + seed))
    report = Report("PARQ: digits at 1 and 2 bits, sentence embeddings at ternary weights")
    _report_digits(report, settings, points)
    _plots(settings, points, output)
    if settings.sentences.seeds:
        _sentences(settings, points, keep, report)
    return report


# -- digits ------------------------------------------------------------------------------------------------------------


def network(width: int, seed: int) -> nn.Module:
    """A residual network on [N, 1, 8, 8]: stem, two blocks (the second at half size), mean over pixels, ten classes."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
            self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norms[1](self.second(self.norms[0](self.first(x)).relu()))
            return (hidden + self.skip(x)).relu()

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Block(width, width, 1),
            Block(width, 2 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )


def _optimizer(settings: Parq, model: nn.Module, method: str, bits: int) -> Any:
    if not bits:
        return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    groups = quantized_groups(model, {"*": LSBQ(bits, optimal=True)}, skip=())
    return QuantOptimizer(torch.optim.AdamW(groups, lr=settings.learning_rate), _map(settings, method, settings.steps))


def _map(settings: Parq, method: str, steps: int, steepness: float | None = None) -> Any:
    start, end = round(settings.anneal_start * steps), round(settings.anneal_end * steps)
    if method == "straight-through":
        return ProxHard()
    if method == "BinaryRelax":
        return ProxBinaryRelax(start, end)
    return ProxPARQ(start, end, settings.steepness if steepness is None else steepness)


def _digits(settings: Parq, method: str, bits: int, seed: int) -> dict[str, Any]:
    """Held-out accuracy, training losses, and for a quantised run the share of weights on a target over the steps."""
    images, labels = digits("calibration")
    held_out, answers = digits("evaluation")
    model = network(settings.width, seed)
    optimizer = _optimizer(settings, model, method, bits)
    histograms: list[list[float]] = []
    shares: dict[str, float] = {}

    def look(trained: nn.Module) -> dict[str, float]:
        if bits:
            share = on_target(optimizer)
            shares[str(optimizer.steps)] = share
            histograms.append(weight_histogram(optimizer)[0].tolist())
        return {"accuracy": float((trained(held_out).argmax(1) == answers).float().mean())}

    result = fit(
        model,
        lambda trained, batch: F.cross_entropy(trained(batch["x"]), batch["y"]),
        BlockBatches({"x": images, "y": labels}, settings.batch, seed=seed),
        TrainConfig(settings.steps, settings.learning_rate, schedule="cosine", seed=seed),
        optimizer=optimizer,
        evaluate=look,
        evaluate_every=max(1, settings.steps // LOOKS),
        progress=False,
    )
    point: dict[str, Any] = {
        "accuracy": result.metrics["eval_accuracy"],
        "losses": [float(row["loss"]) for row in result.history],
        "on_target": shares,
    }
    if seed == settings.seed and bits:
        point["histograms"] = histograms
    assert torch.isfinite(torch.tensor(point["losses"])).all()
    return point


def _report_digits(report: Report, settings: Parq, points: dict[str, dict[str, Any]]) -> None:
    subjects = [METHODS[0], *(f"{method} {bits} bit" for method in METHODS[1:] for bits in BITS)]
    runs = {subject: [points[f"{subject}/{seed}"] for seed in range(settings.seeds)] for subject in subjects}
    for subject, found in runs.items():
        _add(report, "accuracy", subject, [point["accuracy"] for point in found], "held-out digits")
        if subject != METHODS[0]:
            report.add("on_target", min(list(point["on_target"].values())[-1] for point in found), subject=subject)
    # How far the training loss is from full precision in the beginning, and from straight-through in the end.
    for method in METHODS[1:]:
        for bits in BITS:
            for metric, other, part in (
                ("early_gap", METHODS[0], slice(0, round(EARLY * settings.steps))),
                ("late_gap", f"straight-through {bits} bit", slice(-max(1, round(LATE * settings.steps)), None)),
            ):
                subject = f"{method} {bits} bit"
                gaps = [
                    abs(mean(mine["losses"][part]) - mean(theirs["losses"][part]))
                    for mine, theirs in zip(runs[subject], runs[other], strict=True)
                ]
                if subject != other:
                    _add(report, metric, subject, gaps, "nats of training loss")
    report.notes.append(
        "early_gap: to full precision in the first quarter; late_gap: to straight-through in the last tenth"
    )
    report.notes.append(
        "standard errors are over seeds of initialisation and training order; on_target is the least of all"
    )


def _plots(settings: Parq, points: dict[str, dict[str, Any]], output: Path) -> None:
    def runs(method: str) -> str:
        return f"{method} 1 bit/0"

    every = max(1, settings.steps // LOOKS)
    edges = torch.linspace(-REACH, REACH, BINS + 1)
    taken = points[runs("PARQ")]["histograms"]
    chosen = {
        min((k + 1) * every, settings.steps): torch.tensor(taken[k]) for k in (1, len(taken) // 2, len(taken) - 1)
    }
    plot_weights({f"step {step}": (shares, edges) for step, shares in chosen.items()}, output / "weights.png")
    shares = {m: {int(step): v for step, v in points[runs(m)]["on_target"].items()} for m in METHODS[1:]}
    plot_on_target(shares, output / "on_target.png")
    plot_inverse_slope(
        {m: _map(settings, m, settings.steps) for m in METHODS[1:]}, settings.steps, output / "slope.png"
    )
    with plot(output / "loss.png", (6.5, 4)) as axes:
        for method in METHODS:
            losses = points[runs(method) if method != METHODS[0] else f"{method}/0"]["losses"]
            window = max(1, settings.steps // 30)
            smooth = [mean(losses[max(0, i - window) : i + 1]) for i in range(len(losses))]
            axes.plot(smooth, label=method)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss at 1 bit, smoothed")
        axes.legend()


# -- sentence embeddings -----------------------------------------------------------------------------------------------


def _sentences(settings: Parq, points: dict[str, dict[str, Any]], keep: Any, report: Report) -> None:
    part = settings.sentences
    bench: SentenceBench | None = None
    methods = ("MiniLM ternary, fake-quantised layers", "MiniLM ternary, straight-through", "MiniLM ternary, PARQ")
    for method in methods:
        for seed in range(part.seeds):
            if f"{method}/{seed}" in points:
                continue
            if bench is None:
                data = SentenceSettings(part.layers, part.tokens, part.training_sentences, part.held_out_sentences)
                bench = SentenceBench(data)
            student = copy.deepcopy(bench.model)
            budget: dict[str, Any] = {"steps": part.steps, "batch": part.batch, "learning_rate": part.learning_rate}
            if method == methods[0]:
                weight = WeightConfig("ternary", initial="mse")
                quantize_(student, QuantConfig(rules=(Rule("encoder.layer.*", weight),)))
                bench.distil(student, **budget, seed=settings.seed + seed)
                convert_(student)
            else:
                groups = quantized_groups(student, {"encoder.layer.*": LSBQ(0, optimal=True)})
                prox = _map(settings, method.partition(", ")[2], part.steps, part.steepness)
                optimizer: QuantOptimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=part.learning_rate), prox)
                bench.distil(student, **budget, seed=settings.seed + seed, optimizer=optimizer)
                convert_parq_(student, optimizer)
            keep(f"{method}/{seed}", {"error": bench.error(student)})
        values = [points[f"{method}/{seed}"]["error"] for seed in range(part.seeds)]
        _add(report, "embedding_error", method, values, "1 - cosine")


def _add(report: Report, metric: str, subject: str, values: list[float], unit: str) -> None:
    report.add(metric, subject=subject, unit=unit, **over_seeds(values))
