"""APOLLO (arXiv 2412.05270): AdamW's loss with a sketch of its state, against what else saves memory.

A byte-level Llama learns English from nothing with every optimizer, each at the best of three learning rates, over
several seeds; SmolLM2-135M is tuned for a few steps at fixed rates; state is counted in the live optimizers.

deviation: a million weights, minutes and Python's documentation instead of 60M to 7B weights on C4.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import edgewright
from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.report import Report
from edgewright.systems.apollo import apollo_param_groups, optimizer_memory
from edgewright.systems.apollo.peers import RATES, byte_blocks, byte_llama, named_optimizer, smollm2_shapes, trained
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, smoothed

# without Muon, whose bfloat16 products take minutes a step on a CPU without such instructions
TUNED = ("AdamW", "AdamW 8-bit (torchao)", "Adafactor", "GaLore", "APOLLO", "APOLLO-Mini")
SMOOTH, EARLY, LAST = 10, 100, 0.2


@dataclass(frozen=True)
class Tuning:
    """SmolLM2-135M, its last `layers` blocks trained (0: all of it); seeds 0 leaves this part out."""

    seeds: int = 2
    steps: int = 20
    batch: int = 4
    tokens: int = 64
    layers: int = 4
    rank: int = 64
    learning_rate: float = 1e-4
    held_out_blocks: int = 32
    methods: tuple[str, ...] = TUNED


@dataclass(frozen=True)
class Apollo:
    """search_steps: of the runs that choose a learning rate, on the first seed. rank: of APOLLO and GaLore."""

    seed: int = 0
    seeds: int = 3
    steps: int = 200
    search_steps: int = 40
    batch: int = 8
    context: int = 128
    hidden: int = 128
    layers: int = 4
    rank: int = 32
    held_out_blocks: int = 128
    methods: tuple[str, ...] = tuple(RATES)
    tuning: Tuning = field(default_factory=Tuning)


def tiny() -> Apollo:
    return Apollo(
        seeds=1,
        steps=4,
        search_steps=0,
        batch=2,
        context=16,
        hidden=32,
        layers=1,
        rank=8,
        held_out_blocks=4,
        methods=("AdamW", "SGD with momentum", "APOLLO", "APOLLO-Mini"),
        tuning=Tuning(seeds=0),
    )


def small() -> Apollo:
    return Apollo()


def paper() -> Apollo:
    """The length of the published 60M run, at a width that this text can feed."""
    whole = Tuning(seeds=3, steps=500, batch=16, tokens=256, layers=0, held_out_blocks=256)
    return Apollo(steps=10_000, search_steps=1000, batch=64, context=256, hidden=512, layers=8, rank=128, tuning=whole)


BOTH = ("small", "paper")
CLAIMS = (
    Claim("state", "APOLLO", "<", against="AdamW", factor=0.5, sizes=BOTH),
    Claim("state", "APOLLO-Mini", "<", against="AdamW", factor=0.25, sizes=BOTH),
    Claim("smollm2_saving", "APOLLO", ">", 3.2),
    Claim("smollm2_saving", "APOLLO-Mini", ">", 4.7),
    Claim("loss", "APOLLO", "<", against="AdamW", factor=1.03, sizes=BOTH),
    Claim("loss", "APOLLO-Mini", "<", against="AdamW", factor=1.03, sizes=BOTH),
    Claim("loss", "SGD with momentum", ">", against="AdamW", factor=1.1, sizes=BOTH),
    Claim("loss", "APOLLO rank 1 by channel", ">", against="APOLLO-Mini", sizes=BOTH),
    Claim("jump", "APOLLO without limiter", ">", against="APOLLO", sizes=BOTH),
    Claim("tuned_loss", "APOLLO", "<", against="AdamW", factor=1.02, sizes=BOTH),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "loss {ours:.2f} nats/byte where AdamW has {adamw:.2f}, with {saving:.1f}x less state on SmolLM2 ({mini:.1f}x "
    "APOLLO-Mini); a step takes {step:.0f} ms, AdamW's list operations {foreach:.0f}, its fused kernel {fused:.0f}",
    {
        "ours": Cell("apollo.csv", {"metric": "loss", "subject": "APOLLO"}),
        "adamw": Cell("apollo.csv", {"metric": "loss", "subject": "AdamW"}),
        "saving": Cell("apollo.csv", {"metric": "smollm2_saving", "subject": "APOLLO"}),
        "mini": Cell("apollo.csv", {"metric": "smollm2_saving", "subject": "APOLLO-Mini"}),
        "step": Cell("apollo-step.csv", {"metric": "step", "subject": "whole: APOLLO"}),
        "foreach": Cell("apollo-step.csv", {"metric": "step", "subject": "whole: AdamW, foreach"}),
        "fused": Cell("apollo-step.csv", {"metric": "step", "subject": "whole: AdamW"}),
    },
)


def plan(settings: Apollo) -> Plan:
    part = settings.tuning
    tried = sum(len(RATES[method]) for method in settings.methods) if settings.search_steps else 0
    steps = tried * settings.search_steps + len(settings.methods) * settings.seeds * settings.steps
    weights = 12 * settings.layers * settings.hidden**2
    pretraining = steps * (0.01 + settings.batch * settings.context * 6 * weights / 6e10)
    tuned = len(part.methods) * part.seeds
    lines = [f"choose learning rates in {tried} runs of {settings.search_steps} steps"] if tried else []
    lines.append(f"train a byte-level Llama with {len(settings.methods)} optimizers, {settings.seeds} seed(s) each")
    if part.seeds:
        lines.append(f"tune {part.layers or 30} blocks of SmolLM2-135M, {tuned} runs of {part.steps} steps")
    share = (2 * 30 + 4 * (part.layers or 30)) / 180 if part.seeds else 0
    return Plan(
        steps=tuple(lines),
        seconds=4 + pretraining + tuned * part.steps * (part.batch * part.tokens * 135e6 * 6 * share / 1e11 + 0.5),
        memory_bytes=int(2.2e9 if part.seeds else 6e8),
        disk_bytes=10**7,
        outputs=("loss.png", "scales.png", "state.png", "points.json"),
    )


def run(settings: Apollo, output: Path) -> Report:
    run = Run(output, "APOLLO: loss and state of optimizers on equal steps")
    runs = _pretraining(settings, run)
    _saving(settings, run)
    if settings.tuning.seeds:
        _tuning(settings, run)
    run.note("standard errors are over seeds of initialisation and order of the text, the same for all")
    _plots(runs, run)
    return run.report


def _pretraining(settings: Apollo, run: Run) -> dict[str, list[dict[str, Any]]]:
    blocks, held_out = (byte_blocks(split, settings.context) for split in ("calibration", "evaluation"))
    held_out = held_out[:: max(1, len(held_out) // settings.held_out_blocks)][: settings.held_out_blocks]

    def measure(method: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        model = byte_llama(settings.hidden, settings.layers, settings.context, seed)
        optimizer = named_optimizer(method, model, rate, settings.rank)
        return trained(model, optimizer, blocks, held_out, steps, settings.batch, seed)

    runs: dict[str, list[dict[str, Any]]] = {}
    for method in settings.methods:
        rates = RATES.get(method, RATES["AdamW"])
        rate = rates[len(rates) // 2]
        if settings.search_steps:
            tried = {
                r: run.memo(f"search/{method}/{r:g}", partial(measure, method, r, settings.seed, settings.search_steps))
                for r in rates
            }
            last = max(1, round(LAST * settings.search_steps))
            rate = min(tried, key=lambda r: (mean(tried[r]["losses"][-last:]), r))
        seeds = range(settings.seed, settings.seed + settings.seeds)
        points = runs[method] = run.over_seeds(method, seeds, lambda s: measure(method, rate, s, settings.steps))  # noqa: B023
        run.add("loss", [p["loss"] for p in points], method, "nats a byte, held out")
        run.add("jump", [_jump(p["losses"]) for p in points], method, "nats between two steps")
        run.add("state", points[0]["state"] / 1e6, method, "MB")
        run.add("learning_rate", rate, method)
    return runs


def _jump(losses: list[float]) -> float:
    """The largest rise of the training loss from one step to the next, early on."""
    return max((b - a for a, b in itertools.pairwise(losses[:EARLY])), default=0.0)


def _saving(settings: Apollo, run: Run) -> None:
    """State of SmolLM2-135M by the shapes of its weights, in MB, and how many times less than AdamW's it is."""
    model, rank = smollm2_shapes(), settings.tuning.rank
    cases: dict[str, dict[str, Any]] = {
        "AdamW": {"rank": None},
        "APOLLO": {"rank": rank},
        "APOLLO, embedding too": {"rank": rank, "include_embeddings": True},
        "APOLLO-Mini": {"rank": 1},
        "APOLLO-Mini, embedding too": {"rank": 1, "include_embeddings": True},
    }
    for name, options in cases.items():
        memory = optimizer_memory(model, apollo_param_groups(model, **options))
        run.add("smollm2_state", memory["total"] / 1e6, name, "MB")
        run.add("smollm2_saving", memory["vs_adamw"], name, "times less than AdamW")


def _tuning(settings: Apollo, run: Run) -> None:
    part = settings.tuning

    @cache
    def smollm2() -> tuple[Any, Any, Any]:
        model, tokenizer = edgewright.load("smollm2-135m")
        cut: Any = partial(token_blocks, tokenizer=tokenizer, block_length=part.tokens)
        if part.layers:
            model.requires_grad_(False)
            model.model.layers[-part.layers :].requires_grad_(True)
        held_out = cut(load_texts(None, "evaluation"), max_blocks=part.held_out_blocks)
        return model, cut(load_texts(None, "calibration")), held_out

    def measure(method: str, seed: int) -> dict[str, Any]:
        model, blocks, held_out = smollm2()
        student = copy.deepcopy(model)
        rate = part.learning_rate * {"GaLore": 4.0, "Adafactor": 10.0}.get(method, 1.0)
        optimizer = named_optimizer(method, student, rate, part.rank)
        if method == "APOLLO-Mini":
            for group in optimizer.param_groups:
                group["scale"] = "auto"
        return trained(student, optimizer, blocks, held_out, part.steps, part.batch, seed)

    for method in part.methods:
        seeds = range(settings.seed, settings.seed + part.seeds)
        points = run.over_seeds(f"SmolLM2 {method}", seeds, partial(measure, method))
        run.add("tuned_loss", [point["loss"] for point in points], method, "nats a token, held out")
        run.add("tuned_state", points[0]["state"] / 1e6, method, "MB")


def _plots(runs: dict[str, list[dict[str, Any]]], run: Run) -> None:
    losses = {
        m: [mean(step) for step in zip(*(p["losses"] for p in points), strict=True)] for m, points in runs.items()
    }
    curves = {method: smoothed(values, SMOOTH) for method, values in losses.items()}
    run.lines("loss.png", curves, "step", "training loss, nats a byte, smoothed")
    scales = {method: list(points[0]["scales"].values()) for method, points in runs.items() if points[0]["scales"]}
    axes = ("weight, from the first layer to the last", "mean factor s, last step")
    run.lines("scales.png", scales, *axes, style="o-", yscale="log")
    run.bars("state.png", "state", "optimizer state, MB")
