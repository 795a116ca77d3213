"""ParetoQ (arXiv 2502.02631): one family of grids and one training recipe from 1 to 4 bits.

A sentence encoder learns, under quantisation, to give its own full-precision embeddings. Every width is run with
round-to-nearest, searched steps and training, over several seeds; the two 2-bit grids are compared. `end_to_end` adds
SmolLM2-135M through `edgewright compress` at the widths named there.

deviation: training starts from steps of least squared error. The published start (the largest weight of the row) lies
far from where steps end up at 2 bits and below, and billions of tokens later that does not matter; after a few hundred
steps it does. It is run too, as "qat, published start".
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.compression.pipeline import compress
from edgewright.compression.settings import Budget, CompressSettings
from edgewright.data.sentences import SentenceBench, SentenceSettings
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import over_seeds

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
        for more, fewer in zip(MONOTONE[:-1], MONOTONE[1:], strict=True)
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
    """Every point is kept in points.json when it is done, so a second call goes on after the last one."""
    store = output / "points.json"
    points: dict[str, float] = read_object(store) if store.exists() else {}
    bench = SentenceBench(
        SentenceSettings(settings.layers, settings.tokens, settings.training_sentences, settings.held_out_sentences)
    )
    for width, grid in GRIDS.items():
        for method in ("rtn", "mse", "qat", "qat, published start"):
            if method == "qat, published start" and width not in PUBLISHED_START:
                continue
            for seed in range(settings.seeds if method == "qat" and width in SEEDED else 1):
                key = f"{method} {width} bit/{seed}"
                if key not in points:
                    points[key] = _error(bench, settings, grid, method, settings.seed + seed)
                    write_text(store, json.dumps(points, indent=1) + "\n")
    report = Report("ParetoQ: MiniLM-L6 distilled to itself, by width and method")
    for subject in dict.fromkeys(key.rpartition("/")[0] for key in points):
        values = [value for key, value in points.items() if key.rpartition("/")[0] == subject]
        report.add("embedding_error", subject=subject, unit="1 - cosine", **over_seeds(values))
    report.notes.append("standard errors are over seeds of the training order; rows without one were run once")
    _plot(report, output / "error.png")
    for bits in settings.end_to_end:
        _add_end_to_end(report, settings, bits, output / f"smollm2-{bits:g}bit")
    return report


def _error(bench: SentenceBench, settings: ParetoQ, grid: str, method: str, seed: int) -> float:
    """Mean of 1 - cosine to the full-precision embeddings, on held-out sentences, after conversion."""
    nearest = "absmean" if grid == "binary" else "absmax"  # absmax would make every weight of a binary row huge
    weight = {
        "rtn": WeightConfig(grid, scale=nearest),
        "mse": WeightConfig(grid, scale="mse"),
        "qat": WeightConfig(grid, initial="mse"),
        "qat, published start": WeightConfig(grid, initial="paper"),
    }[method]
    student = copy.deepcopy(bench.model)
    quantize_(student, QuantConfig(rules=(Rule("encoder.layer.*", weight),)))
    if method.startswith("qat"):
        bench.distil(
            student, steps=settings.steps, batch=settings.batch, learning_rate=settings.learning_rate, seed=seed
        )
    return bench.error(convert_(student))


def _plot(report: Report, path: Path) -> None:
    widths = [float(width) for width in MONOTONE]
    with plot(path, (6.5, 4)) as axes:
        for method in ("rtn", "mse", "qat"):
            chosen = [report.row("embedding_error", f"{method} {width} bit") for width in MONOTONE]
            errors = [row.se or 0 for row in chosen]
            axes.errorbar(widths, [row.value for row in chosen], yerr=errors, marker="o", label=method)
        axes.set_yscale("log")
        axes.set_xlabel("bits per weight of the grid")
        axes.set_ylabel("1 - cosine to full precision, held out")
        axes.grid(which="both", alpha=0.25)
        axes.legend()


def _add_end_to_end(report: Report, settings: ParetoQ, bits: float, folder: Path) -> None:
    budget = Budget.parse(settings.end_to_end_budget)
    part: Any = compress(CompressSettings("smollm2-135m", bits=bits, budget=budget, seed=settings.seed), folder)
    for row in part.rows:
        subject = f"SmolLM2 {bits:g} bit: {row.subject}"
        report.add(row.metric, row.value, subject=subject, se=row.se, n=row.n, unit=row.unit)
