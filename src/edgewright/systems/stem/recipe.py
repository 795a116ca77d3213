"""STEM (arXiv 2601.10639): tables in place of up-projections, from scratch, out of SmolLM2-135M, and edited.

From scratch: dense, a third of the layers STEM, the same with the gate replaced, on equal text and steps. SmolLM2: one
layer and a third of them, with tables of four kinds, and what short training of those layers recovers, the tables
learning outside the model. Edited: a small model learns invented capitals; one country speaks with the rows of another.

deviation: the paper's models have 350 million weights or more and read 100 billion tokens or more.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.report import Report
from edgewright.models.decoder.footprint import footprint
from edgewright.models.decoder.next_token import NextToken
from edgewright.models.decoder.tokenizer import train_tokenizer
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, smoothed
from edgewright.systems.stem.convert import capacity_report, token_means
from edgewright.systems.stem.layer import StemConfig, stem_blocks, stem_layers, table_weights
from edgewright.systems.stem.store import offload_
from edgewright.systems.stem.studies import (
    FactBase,
    SmolLM2,
    convert_smollm2,
    edit_facts,
    row_cosine,
    small_decoder,
    train,
)

KINDS = {"dense": None, "stem 1/3": "up", "gate 1/3": "gate"}
STARTS = ("weighted", "calibrated", "mean", "zero")


@dataclass(frozen=True)
class Scratch:
    """A model of `layers` layers trained from nothing. init: of the tables; "match" for runs under some 5000 steps."""

    vocabulary: int = 4096
    layers: int = 6
    hidden: int = 128
    intermediate: int = 344
    length: int = 128
    batch: int = 8
    steps: int = 300
    learning_rate: float = 2e-3
    init: str = "match"
    seeds: int = 2
    held_out_blocks: int = 64


@dataclass(frozen=True)
class Editing:
    """layers: share of STEM layers; pairs: edits of each kind."""

    entities: int = 200
    vocabulary: int = 1000
    layers: str = "1/2"
    depth: int = 4
    hidden: int = 128
    intermediate: int = 344
    length: int = 48
    batch: int = 32
    steps: int = 1200
    learning_rate: float = 2e-3
    pairs: int = 40
    unrelated: int = 40


@dataclass(frozen=True)
class Settings:
    """The three parts of the recipe."""

    seed: int = 0
    scratch: Scratch = field(default_factory=Scratch)
    smollm2: SmolLM2 = field(default_factory=SmolLM2)
    editing: Editing = field(default_factory=Editing)


def tiny() -> Settings:
    return Settings(
        scratch=Scratch(400, 3, 32, 64, 32, 4, 6, seeds=1, held_out_blocks=4),
        smollm2=SmolLM2(calibration_blocks=0),
        editing=Editing(4, 400, "1/2", 2, 32, 64, 24, 8, 12, pairs=2, unrelated=2),
    )


def small() -> Settings:
    return Settings()


def paper() -> Settings:
    """The shape of MobileLLM-350M on far more steps; the published text is in no package."""
    shape = Scratch(32000, 32, 960, 2560, 2048, 512, 95_000, init="xavier", seeds=1)
    return Settings(scratch=shape, smollm2=SmolLM2(steps=2000, calibration_blocks=2000))


LARGE = ("small", "paper")
CLAIMS = (
    Claim("prefill_flops", "stem 1/3", "<", against="dense"),
    Claim("wrong_logits", "offloaded", "<", threshold=1.0),
    Claim("loss", "stem 1/3", "<", against="dense", sizes=LARGE),
    Claim("loss", "gate 1/3", ">", against="stem 1/3", sizes=LARGE),
    Claim("row_cosine", "stem 1/3", "<", threshold=0.1, sizes=LARGE),
    Claim("row_cosine", "stem 1/3", "<", against="dense", sizes=LARGE),
    # of the paper's kind of start first, then of ours
    Claim("perplexity", "one layer, calibrated", "<", against="one layer, mean", sizes=LARGE),
    Claim("perplexity", "one layer, calibrated", "<", against="one layer, zero", sizes=LARGE),
    Claim("perplexity", "one layer, weighted", "<", against="one layer, mean", sizes=LARGE),
    Claim("perplexity", "one layer, weighted", "<", against="one layer, zero", sizes=LARGE),
    Claim("perplexity", "a third, weighted", "<", against="a third, mean", factor=0.8, sizes=LARGE),
    Claim("perplexity", "a third, weighted", "<", against="a third, zero", factor=0.8, sizes=LARGE),
    Claim("kl", "a third, trained", "<", against="a third, weighted", factor=0.5, sizes=LARGE),
    Claim("changed", "contextual", ">", threshold=0.7, sizes=LARGE),
    Claim("changed", "persistent", ">", threshold=0.7, sizes=LARGE),
    Claim("unrelated_changed", "persistent", "<", threshold=0.05, sizes=LARGE),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "a third of the layers as tables: loss {ours:.2f} against {dense:.2f} of the dense one after 300 steps, bit-equal "
    "from disk; exchanging rows edits {edited:.0%} of the facts",
    {
        "ours": Cell("stem.csv", {"metric": "loss", "subject": "stem 1/3"}),
        "dense": Cell("stem.csv", {"metric": "loss", "subject": "dense"}),
        "edited": Cell("stem.csv", {"metric": "changed", "subject": "persistent"}),
    },
)


def plan(settings: Settings) -> Plan:
    a, b, c = settings.scratch, settings.smollm2, settings.editing
    weights = a.layers * a.hidden * (3 * a.hidden + 3 * a.intermediate) + a.vocabulary * a.hidden
    work = len(KINDS) * a.seeds * (a.steps + 2) * a.batch * a.length * weights * 6.0
    small_weights = c.depth * c.hidden * (3 * c.hidden + 3 * c.intermediate) + c.vocabulary * c.hidden
    work += c.steps * c.batch * c.length * small_weights * 6.0
    tokens = b.length * (b.calibration_blocks + 11 * b.held_out_blocks + 5 * b.steps * b.batch)
    large = bool(b.calibration_blocks)
    return Plan(
        steps=(
            f"train {', '.join(KINDS)} on {a.steps} steps of {a.batch * a.length} tokens, {a.seeds} seeds",
            f"convert SmolLM2, one layer and {b.layers}, {len(STARTS)} kinds of tables; train {b.steps} steps" if large
            else "leave SmolLM2 out",
            f"learn {2 * c.entities} facts in {c.steps} steps, then edit {c.pairs} pairs of each kind of lengths",
        ),
        # estimates for two idle cores: 60 GFLOP/s in small matrices, 4 ms a token through SmolLM2
        seconds=6 + work / 60e9 + (0.004 * tokens + 120) * large,
        memory_bytes=int(1e9 + 16 * a.layers * a.vocabulary * a.intermediate + 8e9 * large),
        disk_bytes=int(2e7 + 16 * a.layers * a.vocabulary * a.intermediate),
        outputs=("losses.png", "points.json"),
    )  # fmt: skip


def run(settings: Settings, output: Path) -> Report:
    """Trainings resume by themselves."""
    run = Run(output, "STEM: tables of token rows in place of up-projections")
    curves = {}
    seeds = range(settings.seed, settings.seed + settings.scratch.seeds)
    for kind in KINDS:
        points = run.over_seeds(kind, seeds, partial(_scratch, settings, kind, output))
        run.add("loss", [point["loss"] for point in points], kind, "nats/token")
        for metric in ("row_cosine", "prefill_flops", "stored", "active"):
            run.add(metric, [point[metric] for point in points], kind)
        steps = [step for step, _ in points[0]["curve"]]
        losses = [mean(row[1] for row in rows) for rows in zip(*(point["curve"] for point in points), strict=True)]
        curves[kind] = (steps, smoothed(losses, len(steps) // 40))
    run.add("wrong_logits", run.memo("offloaded", partial(_offloaded, settings, output)), "offloaded")
    if settings.smollm2.calibration_blocks:
        convert = partial(convert_smollm2, settings.smollm2, settings.seed, STARTS, output)
        run.add_rows(run.memo("smollm2", convert))
    run.add_rows(run.memo("editing", partial(_editing, settings, output)))
    init = settings.scratch.init
    run.note(f"tables begin by init={init!r}; row_cosine of dense: of its up-projections' means by token")
    run.lines("losses.png", curves, "step", "training loss (nats/token)")
    return run.report


def _scratch(settings: Settings, kind: str, output: Path, seed: int) -> dict[str, Any]:
    """Figures of one kind of model after its training, and its losses."""
    s, replace = settings.scratch, KINDS[kind]
    texts = load_texts(None, "calibration")
    tokenizer = train_tokenizer(texts, s.vocabulary)
    training = token_blocks(texts, tokenizer, s.length, seed=seed)
    held_out = token_blocks(load_texts(None, "evaluation"), tokenizer, s.length, s.held_out_blocks, settings.seed)
    spread = s.hidden**-0.5  # of the dense matrices, as the STEM layers' own
    stem = StemConfig(replace, s.init) if replace else None
    model = small_decoder(s, s.layers, "1/3", stem, seed, initializer_range=spread)
    folder = output / f"{kind.replace(' ', '-').replace('/', '-of-')}-{seed}"
    curve = train(model, replace is not None, training, s, seed, folder)
    with torch.no_grad():
        losses = torch.cat([NextToken(model)(part, "rows") for part in held_out.split(8)])
    cost = footprint(model, context=s.length)
    if replace is None:
        means = token_means(model, stem_layers(s.layers, "1/3"), held_out.split(8))
        cosines = [row_cosine(m.means(m.ids)) for m in means.values()]
        active = cost.active
    else:
        seen = torch.unique(training)
        cosines = [row_cosine(weight[seen]) for _, weight in table_weights(model)]
        held = sum(layer.vocabulary * layer.intermediate for layer in stem_blocks(model).values())
        active = cost.stored - held + capacity_report(model, held_out[:1]).active
    return {
        "loss": float(losses.double().mean()),
        "curve": curve,
        "prefill_flops": cost.prefill_flops,
        "stored": cost.stored,
        "active": active,
        "row_cosine": sum(cosines) / len(cosines),
    }


def _offloaded(settings: Settings, output: Path) -> int:
    """Logits that differ between a model and its tables on disk, cached and read ahead."""
    s = settings.scratch
    model = small_decoder(s, s.layers, "1/3", StemConfig("up", s.init), settings.seed).eval()
    ids = torch.randint(s.vocabulary, (2, s.length), generator=torch.Generator().manual_seed(settings.seed))
    folder = output / "tables"
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with offload_(model, "disk", folder, cache_rows=64, prefetch=2):
            wrong = sum(int((model(input_ids=ids).logits != expected).sum()) for _ in range(2))
    shutil.rmtree(folder)
    return wrong


def _editing(settings: Settings, output: Path) -> list[dict[str, Any]]:
    """Rows of a model that learns invented facts and is edited."""
    s = settings.editing
    facts = FactBase.draw(s.entities, settings.seed)
    tokenizer = train_tokenizer(facts.sentences(), s.vocabulary)
    # untied as published: what a row of the table says must not have to be what the head looks for
    stem = StemConfig("up", "match")
    model = small_decoder(s, s.depth, s.layers, stem, settings.seed, tie_word_embeddings=False)
    blocks = facts.rows(tokenizer, max(4096, 2 * s.batch), s.length, settings.seed)
    train(model, True, blocks, s, settings.seed, output / "facts")
    return edit_facts(model, tokenizer, facts, s.pairs, s.unrelated, settings.seed)
