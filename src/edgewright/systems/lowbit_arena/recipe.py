"""Low-bit arena: the package's methods and two peers at 1 to 4 bits, on one model, one text, one budget, one plot.

A sentence encoder (MiniLM-L6) learns under quantisation to give its own full-precision embeddings. All methods quantise
the linear layers of its blocks, see the same sentences in the same order for the same number of steps, and are judged
after conversion. The plot's axis is what a weight really takes, scales included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from edgewright.data.sentences import SentenceBench, SentenceSettings
from edgewright.measure.report import Report
from edgewright.systems.lowbit_arena.methods import TRAINED, UNTRAINED, applies, quantized
from edgewright.systems.recipe import Claim, Headline, Plan
from edgewright.systems.run import Run


@dataclass(frozen=True)
class LowBitArena:
    """Budget of each training: steps of `batch` sentences. layers 0 keeps the whole encoder."""

    seed: int = 0
    seeds: int = 2
    steps: int = 80
    batch: int = 16
    tokens: int = 32
    learning_rate: float = 3e-4
    layers: int = 0
    training_sentences: int = 3000
    held_out_sentences: int = 256
    widths: tuple[str, ...] = ("4", "3", "2", "1.58", "1")
    methods: tuple[str, ...] = (*UNTRAINED, *TRAINED)


def tiny() -> LowBitArena:
    return LowBitArena(
        seeds=1,
        steps=12,
        batch=8,
        tokens=16,
        learning_rate=1e-3,
        layers=1,
        training_sentences=96,
        held_out_sentences=48,
        widths=("2",),
    )


def small() -> LowBitArena:
    return LowBitArena()


def paper() -> LowBitArena:
    """No paper has this comparison; these are epochs instead of a taste."""
    return LowBitArena(seeds=3, steps=5000, batch=64, tokens=64, learning_rate=1e-4, training_sentences=100000)


CLAIMS = (
    *(
        Claim("embedding_error", f"{method} 2 bit", "<", against="RTN 2 bit", factor=0.6)
        for method in ("ParetoQ", "GPTQ-style", "PARQ")
    ),
    *(
        Claim("embedding_error", f"ParetoQ {width} bit", "<", against=f"{other} {width} bit", sizes=("small", "paper"))
        for width in ("1", "1.58", "2")
        for other in ("RTN", "MSE", "LLM-QAT")
    ),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = None


def plan(settings: LowBitArena) -> Plan:
    layers = settings.layers or 6
    per_step = 0.5 * layers / 6 * settings.batch * settings.tokens / 512
    trained = [m for m in settings.methods if m in TRAINED]
    trainings = sum(applies(m, w) for m in trained for w in settings.widths)
    return Plan(
        steps=(
            f"embed {settings.held_out_sentences} held-out sentences with MiniLM-L6 in full precision",
            f"quantise at {', '.join(settings.widths)} bits without training: "
            + ", ".join(m for m in settings.methods if m in UNTRAINED),
            f"train {trainings * settings.seeds} models for {settings.steps} steps: {', '.join(trained)}",
        ),
        seconds=30 + trainings * settings.seeds * (settings.steps * per_step + 5),
        memory_bytes=int(1.5e9),
        disk_bytes=int(1e8),
        outputs=("arena.png", "points.json"),
    )


def run(settings: LowBitArena, output: Path) -> Report:
    run = Run(output, "Low-bit arena: MiniLM-L6 distilled to itself, by method and width")
    budget = {"steps": settings.steps, "batch": settings.batch, "learning_rate": settings.learning_rate}
    data = SentenceSettings(settings.layers, settings.tokens, settings.training_sentences, settings.held_out_sentences)
    bench = cache(lambda: SentenceBench(data))

    def measure(method: str, width: str, seed: int) -> dict[str, float]:
        student, bits = quantized(bench(), method, width, {**budget, "seed": settings.seed + seed})
        return {"embedding_error": bench().error(student), "bits_per_weight": bits}

    for width in settings.widths:
        for method in settings.methods:
            if applies(method, width):
                seeds = settings.seeds if method in TRAINED else 1
                subject = f"{method} {width} bit"
                points = run.over_seeds(subject, seeds, partial(measure, method, width))
                run.add("embedding_error", [point["embedding_error"] for point in points], subject, "1 - cosine")
                run.add("bits_per_weight", points[0]["bits_per_weight"], subject, "bits")
    run.note(
        "standard errors are over seeds of the training order; bits per weight of the linear layers, scales included"
    )
    run.note(
        "at 2 bits RTN, MSE and GPTQ (also before training) use integers (-2 to 1); 'no zero': GPTQ on SEQ's levels"
    )
    _plot(settings, run)
    return run.report


def _plot(settings: LowBitArena, run: Run) -> None:
    curves = {}
    for method in settings.methods:
        subjects = [f"{method} {width} bit" for width in settings.widths if applies(method, width)]
        bits = {subject: run.report.value("bits_per_weight", subject) for subject in subjects}
        subjects.sort(key=bits.__getitem__)
        curves[method] = run.curve("embedding_error", subjects, sorted(bits.values()))
    axes = ("bits per weight, scales included", "1 - cosine to full precision, held out")
    run.lines("arena.png", curves, *axes, style="o-", yscale="log")
