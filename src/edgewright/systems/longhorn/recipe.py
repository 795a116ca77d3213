"""Longhorn (arXiv 2407.14207): a memory of fixed size against Mamba's and against attention, on recall and on text.

Three small language models of the same width and depth: Longhorn; transformers' Mamba with the scan of mambapy where
that is installed; attention with feed-forwards whose width makes the parameters equal. They learn to recall values by
key, at one length and tested at a longer one, and to write characters of English documentation, over the same seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from edgewright.measure.report import Report
from edgewright.systems.longhorn.tasks import (
    ABLATION,
    CHARACTERS,
    REACHED,
    CharacterText,
    Recall,
    cache_bytes,
    train_recall,
    train_text,
)
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, smoothed

MODELS = ("Longhorn", "Mamba", "attention")
STEP_SECONDS = {
    "Longhorn": 1.7e-8,
    "Mamba": 4e-8,
    "attention": 3e-9,
    ABLATION: 1.7e-8,
}  # a width^2 layer token, 2 cores


@dataclass(frozen=True)
class LonghornSettings:
    """Both parts over `seeds` seeds of initialisation and order; the data of a seed are the same for all models."""

    seed: int = 0
    seeds: int = 3
    weight_decay: float = 0.1
    recall: Recall = field(default_factory=Recall)
    text: CharacterText = field(default_factory=CharacterText)


def tiny() -> LonghornSettings:
    return LonghornSettings(
        seeds=1,
        recall=Recall(2, 12, 24, 16, None, 16, 1, steps=12, batch=8, rows=16, looks=2, ablation=False),
        text=CharacterText(32, 16, 1, steps=12, batch=4, held_out_blocks=4),
    )


def small() -> LonghornSettings:
    return LonghornSettings()


def paper() -> LonghornSettings:
    """Longer runs of wider models; the published ones have 120M to 1.3B parameters and up to 100 billion tokens."""
    return LonghornSettings(
        seeds=5,
        recall=Recall(32, 256, 1024, 128, None, 128, 2, steps=20000, batch=64, learning_rate=3e-3),
        text=CharacterText(1024, 768, 24, steps=5000, batch=512, learning_rate=6e-4),
    )


NOISE = 1.01
TRAINED = ("small", "paper")
CLAIMS = (
    Claim("memory_growth", "Longhorn", "<", 1.0001),
    Claim("memory_growth", "attention", ">", 4.0),
    Claim("text_loss", "Longhorn", "<", math.log(CHARACTERS)),
    Claim("recall", "Longhorn", ">", 0.95, sizes=TRAINED),
    Claim(f"steps_to_{REACHED:.0%}", "Longhorn", "<", against="Mamba", factor=NOISE, sizes=TRAINED),
    Claim("recall_lost", "Longhorn", "<", against="attention", sizes=TRAINED),
    Claim("text_loss", "Longhorn", "<", against="Mamba", factor=NOISE, sizes=TRAINED),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "recall {recall:.3f} after {steps:.0f} steps (Mamba {mamba_steps:.0f}), {longer:.2f} at four times the length "
    "(attention {attention:.2f}); a token at context 8192 costs {late:.0f} ms, attention's {attention_late:.0f}",
    {
        "recall": Cell("longhorn.csv", {"metric": "recall", "subject": "Longhorn"}),
        "steps": Cell("longhorn.csv", {"metric": "steps_to_90%", "subject": "Longhorn"}),
        "mamba_steps": Cell("longhorn.csv", {"metric": "steps_to_90%", "subject": "Mamba"}),
        "longer": Cell("longhorn.csv", {"metric": "recall_longer", "subject": "Longhorn"}),
        "attention": Cell("longhorn.csv", {"metric": "recall_longer", "subject": "attention"}),
        "late": Cell("longhorn-decode.csv", {"metric": "token", "subject": "Longhorn at 8192"}),
        "attention_late": Cell("longhorn-decode.csv", {"metric": "token", "subject": "attention at 8192"}),
    },
)


def plan(settings: LonghornSettings) -> Plan:
    recall, text = settings.recall, settings.text
    names = (*MODELS, ABLATION) if recall.ablation else MODELS
    seconds = 0.0
    for part, models, length in ((recall, names, recall.length), (text, MODELS, text.length)):
        work = part.steps * part.batch * length * part.layers * part.width * (part.width + 1000)
        seconds += settings.seeds * sum(STEP_SECONDS[name] for name in models) * work / 20
    return Plan(
        steps=(
            f"teach {len(names)} models to recall {recall.pairs} values of {recall.length} tokens, "
            f"{settings.seeds} seeds of {recall.steps} steps, and test them at {recall.longer}",
            f"train {len(MODELS)} models on characters of English, {settings.seeds} seeds of {text.steps} steps",
            "count the bytes that each keeps after a short and a long text",
        ),
        seconds=10 + seconds,
        memory_bytes=int(1.2e9),
        disk_bytes=10**6,
        outputs=("recall.png", "text.png", "points.json"),
    )


def run(settings: LonghornSettings, output: Path) -> Report:
    run = Run(output, "Longhorn, Mamba and attention: recall by key, English characters, memory")
    seeds = range(settings.seed, settings.seed + settings.seeds)
    recall = {
        name: run.over_seeds(
            f"recall/{name}", seeds, partial(train_recall, settings.recall, settings.weight_decay, name)
        )
        for name in ((*MODELS, ABLATION) if settings.recall.ablation else MODELS)
    }
    text = {
        name: run.over_seeds(f"text/{name}", seeds, partial(train_text, settings.text, settings.weight_decay, name))
        for name in MODELS
    }
    metrics = {"recall": "share", "recall_longer": "share", "recall_lost": "share", f"steps_to_{REACHED:.0%}": "steps"}
    _add(run, recall, {**metrics, "recall_parameters": ""})
    _add(run, text, {"text_loss": "nats", "text_parameters": ""})
    for name in ("Longhorn", "attention"):
        short, longer = cache_bytes(settings.text, name, settings.seed)
        run.add("memory", longer, name, "bytes")
        run.add("memory_growth", longer / short, name, "x")
    run.note(
        f"recall is tested at {settings.recall.length} tokens, recall_longer at {settings.recall.longer}; "
        "recall_lost is their difference"
    )
    run.note(f"steps_to_{REACHED:.0%}: first look at which it was reached, all steps and one more where it never was")
    run.note("Mamba has the same width, depth and state; its matrix A makes its parameters a few percent more")
    run.note("standard errors are over seeds of initialisation and data")

    curves = {name: (points[0]["curve"][0], _mean(p["curve"][1] for p in points)) for name, points in recall.items()}
    run.lines("recall.png", curves, "step", "recall, held out, mean of the seeds", ylim=(0, 1.02))
    window = max(1, settings.text.steps // 30)
    losses = {name: smoothed(_mean(p["losses"] for p in points), window) for name, points in text.items()}
    run.lines("text.png", losses, "step", "training loss, nats a character, smoothed")
    return run.report


def _add(run: Run, models: dict[str, list[dict[str, Any]]], metrics: dict[str, str]) -> None:
    """models: name -> figures of each seed. metrics: name -> unit."""
    for metric, unit in metrics.items():
        for name, points in models.items():
            run.add(metric, [point[metric] for point in points], name, unit)


def _mean(curves: Iterable[list[float]]) -> list[float]:
    return [mean(values) for values in zip(*curves, strict=True)]
