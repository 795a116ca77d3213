"""ParetoQ (arXiv 2502.02631): one family of grids and one training recipe from 1 to 4 bits.

A sentence encoder learns, under quantisation, to give its own full-precision embeddings. Every width is run with
round-to-nearest, searched scales and training, over several seeds; the two 2-bit grids are compared. `end_to_end` adds
SmolLM2-135M through `edgewright compress` at the widths named there.

deviation: training starts from scales of least squared error. The published start (the largest weight of the row) lies
far from where scales end up at 2 bits and below, and billions of tokens later that does not matter; after a few hundred
steps it does. It is run too, as "qat, published start".
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from edgewright.compression.pipeline import compress
from edgewright.compression.settings import CompressSettings, TrainingBudget
from edgewright.data.sentences import SentenceBench, SentenceSettings
from edgewright.measure.report import Report
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run

GRIDS = {"1": "binary", "1.58": "ternary", "2": "seq2", "2 (LSQ)": "int2", "3": "int3", "4": "int4"}
MONOTONE = ("4", "3", "2", "1.58", "1")
SEEDED = ("1", "1.58", "2", "2 (LSQ)")  # run with every seed: where the spread could decide something
PUBLISHED_START = ("2", "1.58")  # widths whose published start is not the searched one and far from it


@dataclass(frozen=True)
class ParetoQ:
    """steps, batch (sentences) and learning_rate of each training; layers 0 keeps the whole encoder."""

    seed: int = 0
    seeds: int = 3
    steps: int = 200
    batch: int = 16
    tokens: int = 32
    learning_rate: float = 3e-4
    layers: int = 0
    training_sentences: int = 3000
    held_out_sentences: int = 256
    end_to_end: tuple[float, ...] = ()
    end_to_end_budget: str = "24"


def tiny() -> ParetoQ:
    return ParetoQ(
        seeds=1,
        steps=24,
        batch=8,
        tokens=16,
        learning_rate=1e-3,
        layers=1,
        training_sentences=96,
        held_out_sentences=48,
    )


def small() -> ParetoQ:
    return ParetoQ()


def paper() -> ParetoQ:
    """Many epochs of every sentence that the built-in text holds; the published runs use billions of tokens."""
    return ParetoQ(
        steps=20000,
        batch=64,
        tokens=64,
        learning_rate=1e-4,
        training_sentences=100000,
        held_out_sentences=1000,
        end_to_end=(4.0, 3.0, 2.0, 1.58, 1.0),
        end_to_end_budget="2000",
    )


# Training beats rounding at every width, by far at 2 bits and below; fewer bits are never better.
WIDE = {"2": 0.6, "1.58": 0.6, "1": 0.6}
CLAIMS = (
    *(
        Claim("embedding_error", f"qat {width} bit", "<", against=f"rtn {width} bit", factor=WIDE.get(width, 1.0))
        for width in MONOTONE
    ),
    *(
        Claim("embedding_error", f"qat {more} bit", "<", against=f"qat {fewer} bit", sizes=("small", "paper"))
        for more, fewer in itertools.pairwise(MONOTONE)
    ),
)
CLOCKED: tuple[str, ...] = ("seconds", "decode", "prefill", "time_to_first_token", "roofline", "peak_memory")
HEADLINE: Headline | None = Headline(
    "sentence encoder at 2 bits: 1 - cosine {ours:.3f} instead of {mse:.3f} with searched steps, {rtn:.3f} rounded",
    {
        name: Cell("paretoq.csv", {"metric": "embedding_error", "subject": f"{method} 2 bit"})
        for name, method in (("ours", "qat"), ("mse", "mse"), ("rtn", "rtn"))
    },
)


def plan(settings: ParetoQ) -> Plan:
    layers = settings.layers or 6
    per_step = 0.47 * layers / 6 * settings.batch * settings.tokens / 512  # measured: 0.47 s at 16 x 32 on two cores
    trainings = len(SEEDED) * settings.seeds + len(GRIDS) - len(SEEDED) + len(PUBLISHED_START)
    steps = (
        f"embed {settings.held_out_sentences} held-out sentences with MiniLM-L6 in full precision",
        f"quantise at {', '.join(GRIDS)} bits without training",
        f"train {trainings} models for {settings.steps} steps of {settings.batch} sentences",
        *(
            f"compress SmolLM2-135M to {bits:g} bits (budget {settings.end_to_end_budget})"
            for bits in settings.end_to_end
        ),
    )
    return Plan(
        steps=steps,
        seconds=15 + trainings * settings.steps * per_step + 600 * len(settings.end_to_end),
        memory_bytes=int(3e9 if settings.end_to_end else 1.2e9),
        disk_bytes=int(1e8 + 1.5e9 * len(settings.end_to_end)),
        outputs=("error.png", "points.json"),
    )


def run(settings: ParetoQ, output: Path) -> Report:
    run = Run(output, "ParetoQ: MiniLM-L6 distilled to itself, by width and method")
    data = SentenceSettings(settings.layers, settings.tokens, settings.training_sentences, settings.held_out_sentences)
    bench = cache(lambda: SentenceBench(data))
    for width in GRIDS:
        for method in ("rtn", "mse", "qat", *(["qat, published start"] if width in PUBLISHED_START else [])):
            seeds = settings.seeds if method == "qat" and width in SEEDED else 1
            subject = f"{method} {width} bit"
            errors = run.over_seeds(subject, seeds, partial(_error, bench, settings, width, method))
            run.add("embedding_error", errors, subject, "1 - cosine")
    run.note("standard errors are over seeds of the training order; rows without one were run once")
    widths = [float(width) for width in MONOTONE]
    curves = {
        method: run.curve("embedding_error", [f"{method} {width} bit" for width in MONOTONE], widths)
        for method in ("rtn", "mse", "qat")
    }
    axes = ("bits per weight of the grid", "1 - cosine to full precision, held out")
    run.lines("error.png", curves, *axes, style="o-", yscale="log")
    for bits in settings.end_to_end:
        budget = TrainingBudget.parse(settings.end_to_end_budget)
        what = CompressSettings("smollm2-135m", bits=bits, budget=budget, seed=settings.seed)
        part: Any = compress(what, output / f"smollm2-{bits:g}bit")
        run.add_rows({**asdict(row), "subject": f"SmolLM2 {bits:g} bit: {row.subject}"} for row in part.rows)
    return run.report


def _error(bench: Callable[[], SentenceBench], settings: ParetoQ, width: str, method: str, seed: int) -> float:
    """Mean of 1 - cosine to the full-precision embeddings, on held-out sentences, after conversion."""
    grid = GRIDS[width]
    nearest = "absmean" if grid == "binary" else "absmax"  # absmax would make every weight of a binary row huge
    weight = {
        "rtn": WeightConfig(grid, scale=nearest),
        "mse": WeightConfig(grid, scale="mse"),
        "qat": WeightConfig(grid, initial="mse"),
        "qat, published start": WeightConfig(grid, initial="paper"),
    }[method]
    student = copy.deepcopy(bench().model)
    quantize_(student, QuantConfig(rules=(Rule("encoder.layer.*", weight),)))
    if method.startswith("qat"):
        budget: dict[str, Any] = {"steps": settings.steps, "batch": settings.batch}
        bench().distil(student, **budget, learning_rate=settings.learning_rate, seed=settings.seed + seed)
    return bench().error(convert_(student))
