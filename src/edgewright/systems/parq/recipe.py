"""PARQ (arXiv 2503.15748): quantisation inside the optimizer, from full-precision training to a hard grid.

A small residual network reads handwritten digits at 1 and 2 bits: full precision, the hard map (straight-through),
BinaryRelax and PARQ with the same steps and seeds. Beyond size tiny, MiniLM learns its own embeddings at ternary
weights: PARQ against fake-quantised layers at equal steps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from edgewright.data.sentences import SentenceBench, SentenceSettings
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.parq.digits import network, train_digits
from edgewright.systems.parq.lsbq import LSBQ
from edgewright.systems.parq.model import BINS, REACH, convert_parq_, quantized_groups
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.systems.parq.proximal import ProxBinaryRelax, ProxHard, ProxPARQ
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, smoothed

METHODS = ("full precision", "straight-through", "BinaryRelax", "PARQ")
BITS = (1, 2)
SENTENCES = ("MiniLM ternary, fake-quantised layers", "MiniLM ternary, straight-through", "MiniLM ternary, PARQ")
EARLY, LATE = 0.25, 0.1  # parts of a run whose training loss is compared: its first quarter, its last tenth


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
    run = Run(output, "PARQ: digits at 1 and 2 bits, sentence embeddings at ternary weights")
    kinds = {METHODS[0]: (METHODS[0], 0), **{f"{m} {bits} bit": (m, bits) for m in METHODS[1:] for bits in BITS}}
    runs: dict[str, list[dict[str, Any]]] = {}
    for subject, (method, bits) in kinds.items():
        points = runs[subject] = run.over_seeds(subject, settings.seeds, partial(_digits, settings, method, bits))
        run.add("accuracy", [point["accuracy"] for point in points], subject, "held-out digits")
        if bits:
            run.add("on_target", min(list(point["on_target"].values())[-1] for point in points), subject)
    _gaps(settings, run, runs)
    run.note("early_gap: to full precision in the first quarter; late_gap: to straight-through in the last tenth")
    run.note("standard errors are over seeds of initialisation and training order; on_target is the least of all")
    _plots(settings, run, {method: runs[method if method in runs else f"{method} 1 bit"][0] for method in METHODS})
    if settings.sentences.seeds:
        part = settings.sentences
        data = SentenceSettings(part.layers, part.tokens, part.training_sentences, part.held_out_sentences)
        bench = cache(lambda: SentenceBench(data))
        for method in SENTENCES:
            errors = run.over_seeds(method, part.seeds, lambda seed: _sentences(settings, bench(), method, seed))  # noqa: B023
            run.add("embedding_error", errors, method, "1 - cosine")
    return run.report


def _map(settings: Parq, method: str, steps: int, steepness: float) -> Any:
    start, end = round(settings.anneal_start * steps), round(settings.anneal_end * steps)
    if method == "straight-through":
        return ProxHard()
    if method == "BinaryRelax":
        return ProxBinaryRelax(start, end)
    return ProxPARQ(start, end, steepness)


def _digits(settings: Parq, method: str, bits: int, seed: int) -> dict[str, Any]:
    model, rate = network(settings.width, settings.seed + seed), settings.learning_rate
    if bits:
        groups: Any = quantized_groups(model, {"*": LSBQ(bits, optimal=True)}, skip=())
        prox = _map(settings, method, settings.steps, settings.steepness)
        optimizer: Any = QuantOptimizer(torch.optim.AdamW(groups, lr=rate), prox)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    return train_digits(model, optimizer, settings.steps, settings.batch, rate, settings.seed + seed)


def _gaps(settings: Parq, run: Run, runs: dict[str, list[dict[str, Any]]]) -> None:
    """How far the training loss is from full precision in the beginning, and from straight-through in the end."""
    early = slice(0, round(EARLY * settings.steps))
    late = slice(-max(1, round(LATE * settings.steps)), None)
    for subject in (f"{method} {bits} bit" for method in METHODS[1:] for bits in BITS):
        hard = f"{METHODS[1]} {subject[-5:]}"
        for metric, reference, part in (("early_gap", METHODS[0], early), ("late_gap", hard, late)):
            pairs = zip(runs[subject], runs[reference], strict=True)
            gaps = [abs(mean(a["losses"][part]) - mean(b["losses"][part])) for a, b in pairs]
            if subject != reference:
                run.add(metric, gaps, subject, "nats of training loss")


def _plots(settings: Parq, run: Run, points: dict[str, dict[str, Any]]) -> None:
    """Of the first seed at 1 bit."""
    steps = settings.steps
    losses = {method: smoothed(point["losses"], max(1, steps // 30)) for method, point in points.items()}
    run.lines("loss.png", losses, "step", "training loss at 1 bit, smoothed", yscale="log")
    shares = {m: ([int(s) for s in points[m]["on_target"]], list(points[m]["on_target"].values())) for m in METHODS[1:]}
    run.lines("on_target.png", shares, "step", "share of weights on a target", style=".-", ylim=(-0.03, 1.03))
    maps = {method: _map(settings, method, steps, settings.steepness) for method in METHODS[1:]}
    slopes = {method: [prox.inverse_slope(step) for step in range(steps)] for method, prox in maps.items()}
    run.lines("slope.png", slopes, "step", "inverse slope")
    histograms = list(points["PARQ"]["histograms"].items())
    edges = torch.linspace(-REACH, REACH, BINS + 1).tolist()
    with plot(run.output / "weights.png", (6.5, 4)) as axes:
        for step, histogram in (histograms[1], histograms[len(histograms) // 2], histograms[-1]):
            axes.stairs(histogram, edges, label=f"step {step}")
        axes.set(xlabel="weight / outermost target of its row", ylabel="share of the weights")
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.legend()


def _sentences(settings: Parq, bench: SentenceBench, method: str, seed: int) -> float:
    """Mean of 1 - cosine to the full-precision embeddings, on held-out sentences, after conversion."""
    part, student = settings.sentences, copy.deepcopy(bench.model)
    budget: dict[str, Any] = {"steps": part.steps, "batch": part.batch, "learning_rate": part.learning_rate}
    budget["seed"] = settings.seed + seed
    if method == SENTENCES[0]:
        quantize_(student, QuantConfig(rules=(Rule("encoder.layer.*", WeightConfig("ternary", initial="mse")),)))
        bench.distil(student, **budget)
        return bench.error(convert_(student))
    groups = quantized_groups(student, {"encoder.layer.*": LSBQ(0, optimal=True)})
    prox = _map(settings, method.partition(", ")[2], part.steps, part.steepness)
    optimizer: QuantOptimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=part.learning_rate), prox)
    bench.distil(student, **budget, optimizer=optimizer)
    return bench.error(convert_parq_(student, optimizer))
