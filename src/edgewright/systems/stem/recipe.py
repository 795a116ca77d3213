"""STEM (arXiv 2601.10639): tables in place of up-projections, from scratch, out of SmolLM2-135M, and edited.

From scratch: dense, a third of the layers STEM, the same with the gate replaced, on equal text and steps. SmolLM2: one
layer and a third of them, with tables of four kinds, and what short training of those layers recovers, the tables
learning outside the model. Edited: a small model learns invented capitals; one country speaks with the rows of another.

deviation: the paper's models have 350 million weights or more and read 100 billion tokens or more.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.footprint import footprint
from edgewright.models.decoder.model import new_decoder
from edgewright.models.decoder.next_token import NextToken
from edgewright.models.decoder.tokenizer import train_tokenizer
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import over_seeds
from edgewright.systems.stem.convert import token_means
from edgewright.systems.stem.edit import edit_rows, override_tokens
from edgewright.systems.stem.facts import CAPITALS, RIVERS, Facts, answers, greedy_answer, pairs_by_length, question
from edgewright.systems.stem.layer import StemConfig, stem_blocks, stem_layers, table_weights, with_stem
from edgewright.systems.stem.offload import offload_
from edgewright.systems.stem.report import capacity_report, row_cosine
from edgewright.systems.stem.smollm2 import SmolLM2, convert_smollm2
from edgewright.systems.stem.training import StemAdamW, stem_groups
from edgewright.training import BlockBatches, TrainConfig, fit
from edgewright.training.optimizer import parameter_groups

KINDS = {"dense": None, "stem 1/3": "up", "gate 1/3": "gate"}
STARTS = ("weighted", "calibrated", "mean", "zero")
MODES = {"equal": ("auto",), "longer": ("pad", "copy", "average"), "shorter": ("subset", "average")}


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
    """The shape of MobileLLM-350M on far more steps; the published text is not in the house."""
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
    """Every figure is kept in points.json when it is measured; trainings resume by themselves."""
    store = output / "points.json"
    points: dict[str, Any] = read_object(store) if store.exists() else {}

    def measured(key: str, measure: Callable[[], Any]) -> Any:
        if key not in points:
            points[key] = measure()
            write_text(store, json.dumps(points, indent=1) + "\n")
        return points[key]

    report = Report("STEM: tables of token rows in place of up-projections")
    for kind in KINDS:
        runs = [
            measured(f"{kind}, seed {seed}", partial(_scratch, settings, kind, seed, output))
            for seed in range(settings.seed, settings.seed + settings.scratch.seeds)
        ]
        report.add("loss", **over_seeds([r["loss"] for r in runs]), subject=kind, unit="nats/token")
        for metric in ("row_cosine", "prefill_flops", "stored", "active"):
            if metric in runs[0]:
                report.add(metric, **over_seeds([r[metric] for r in runs]), subject=kind)
    report.add("wrong_logits", measured("offloaded", lambda: _offloaded(settings, output)), subject="offloaded")
    if settings.smollm2.calibration_blocks:
        for row in measured("smollm2", lambda: convert_smollm2(settings.smollm2, settings.seed, STARTS, output)):
            report.add(**row)
    for row in measured("editing", lambda: _editing(settings, output)):
        report.add(**row)
    report.notes.append(
        f"tables begin by init={settings.scratch.init!r}; row_cosine of dense: of its up-projections' means by token"
    )
    _plot(points, output / "losses.png")
    return report


def _scratch_data(settings: Settings, seed: int) -> tuple[Any, Any, Any]:
    """(tokenizer, training blocks, held-out blocks)."""
    s = settings.scratch
    texts = load_texts(None, "calibration")
    tokenizer = train_tokenizer(texts, s.vocabulary)
    training = token_blocks(texts, tokenizer, s.length, seed=seed)
    held_out = token_blocks(load_texts(None, "evaluation"), tokenizer, s.length, s.held_out_blocks, settings.seed)
    return tokenizer, training, held_out


def _decoder(shape: Any, depth: int, layers: Any, replace: str | None, init: str, seed: int, **changes: Any) -> Any:
    heads = max(2, shape.hidden // 32)
    fields = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": max(256, shape.length),
        **changes,
    }
    config = EdgeDecoderConfig(**fields)
    return new_decoder(config if replace is None else with_stem(config, layers, StemConfig(replace, init)), seed)


def _train(model: Any, stem: bool, blocks: Any, shape: Any, seed: int, folder: Path, label: str) -> list[list[float]]:
    """[[step, loss], ...] of a run that leaves `model` trained."""
    whole = NextToken(model)
    if stem:
        groups = stem_groups(model, shape.learning_rate)
    else:
        groups = parameter_groups(model, 0.1, [{"params": model.parameters(), "lr": shape.learning_rate}])
        groups = [group | {"clip_norm": 1.0, "part": "backbone"} for group in groups]
    config = TrainConfig(shape.steps, warmup_steps=shape.steps // 20, clip_norm=None, seed=seed)
    batches = BlockBatches(blocks, shape.batch, seed)
    result = fit(whole, lambda m, ids: m(ids), batches, config, optimizer=StemAdamW(groups), output=folder, label=label)
    model.eval()
    return [[row["step"], row["loss"]] for row in result.history]


def _scratch(settings: Settings, kind: str, seed: int, output: Path) -> dict[str, Any]:
    s, replace = settings.scratch, KINDS[kind]
    _, training, held_out = _scratch_data(settings, seed)
    spread = s.hidden**-0.5  # of the dense matrices, as the STEM layers' own
    model = _decoder(s, s.layers, "1/3", replace, s.init, seed, initializer_range=spread)
    folder = output / f"{kind.replace(' ', '-').replace('/', '-of-')}-{seed}"
    curve = _train(model, replace is not None, training, s, seed, folder, kind)
    with torch.no_grad():
        losses = torch.cat([NextToken(model)(part, "rows") for part in held_out.split(8)])
    cost = footprint(model, context=s.length)
    found = {
        "loss": float(losses.double().mean()),
        "curve": curve,
        "prefill_flops": cost.prefill_flops,
        "stored": cost.stored,
    }
    if replace is None:
        means = token_means(model, stem_layers(s.layers, "1/3"), held_out.split(8))
        cosines = [row_cosine(m.means(m.ids)) for m in means.values()]
        found["active"] = cost.active
    else:
        seen = torch.unique(training)
        cosines = [row_cosine(weight[seen]) for _, weight in table_weights(model)]
        tables = capacity_report(model, held_out[:1])
        held = sum(layer.vocabulary * layer.intermediate for layer in stem_blocks(model).values())
        found["active"] = cost.stored - held + tables.active
    found["row_cosine"] = sum(cosines) / len(cosines)
    return found


def _offloaded(settings: Settings, output: Path) -> int:
    """Logits that differ between a model and its tables on disk, cached and read ahead."""
    s = settings.scratch
    model = _decoder(s, s.layers, "1/3", "up", s.init, settings.seed).eval()
    ids = torch.randint(s.vocabulary, (2, s.length), generator=torch.Generator().manual_seed(settings.seed))
    folder = output / "tables"
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with offload_(model, "disk", folder, cache_rows=64, prefetch=2):
            wrong = sum(int((model(input_ids=ids).logits != expected).sum()) for _ in range(2))
    shutil.rmtree(folder)
    return wrong


def _editing(settings: Settings, output: Path) -> list[dict[str, Any]]:
    """Shares of edits that change the answer to the other country's, and of other facts that an edit disturbs."""
    s = settings.editing
    facts = Facts.draw(s.entities, settings.seed)
    tokenizer = train_tokenizer(facts.sentences(), s.vocabulary)
    # untied as published: what a row of the table says must not have to be what the head looks for
    model = _decoder(s, s.depth, s.layers, "up", "match", settings.seed, tie_word_embeddings=False)
    blocks = facts.rows(tokenizer, max(4096, 2 * s.batch), s.length, settings.seed)
    _train(model, True, blocks, s, settings.seed, output / "facts", "facts")
    ask = lambda i, answer: question(tokenizer, CAPITALS[0], facts.capitals[i][0], facts.capitals[answer][1])  # noqa: E731
    known = [i for i in range(s.entities) if answers(model, *ask(i, i))]
    report = [_share("known", [float(i in known) for i in range(s.entities)], "before any edit")]
    others = [question(tokenizer, RIVERS[0], *pair) for pair in facts.rivers[: s.unrelated]]
    before = [greedy_answer(model, *other) for other in others]
    total: dict[str, list[float]] = {"contextual": [], "persistent": []}
    disturbed: list[float] = []
    for lengths, pairs in pairs_by_length(
        facts, tokenizer, known or list(range(s.entities)), s.pairs, settings.seed
    ).items():
        for mode in MODES[lengths] if pairs else ():
            hits: dict[str, list[float]] = {"contextual": [], "persistent": []}
            for a, b in pairs:
                ids, count = ask(a, b)
                names: dict[str, Any] = {"source": facts.capitals[a][0], "target": facts.capitals[b][0]}
                with override_tokens(model, ids, **names, tokenizer=tokenizer, mode=mode):
                    hits["contextual"].append(float(answers(model, ids, count)))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of shared tokens: their effect is what is counted
                    edit = edit_rows(model, **names, tokenizer=tokenizer, mode=mode)
                hits["persistent"].append(float(answers(model, ids, count)))
                changes = [greedy_answer(model, *o) != old for o, old in zip(others, before, strict=True)]
                disturbed.append(sum(changes) / len(changes))
                edit.undo()
            for form, values in hits.items():
                report.append(_share("changed", values, f"{form}, {lengths}, {mode}"))
                total[form] += values if mode in ("auto", "pad", "subset") else []
    report += [_share("changed", values, form) for form, values in total.items()]
    return [*report, _share("unrelated_changed", disturbed, "persistent")]


def _share(metric: str, values: list[float], subject: str) -> dict[str, Any]:
    return {
        "metric": metric,
        "subject": subject,
        **(over_seeds(values) if values else {"value": 0.0, "se": None, "n": 0}),
    }


def _plot(points: dict[str, Any], path: Path) -> None:
    with plot(path, (6.5, 4)) as axes:
        for color, kind in zip(("#444444", "#4f7cac", "#d08c60"), KINDS, strict=True):
            runs = [point["curve"] for key, point in points.items() if key.startswith(f"{kind}, seed")]
            for i, curve in enumerate(runs):
                window = max(1, len(curve) // 40)
                smooth = [
                    sum(r[1] for r in curve[j : j + window]) / window for j in range(0, len(curve) - window + 1, window)
                ]
                steps = [curve[j + window - 1][0] for j in range(0, len(curve) - window + 1, window)]
                axes.plot(steps, smooth, color=color, alpha=0.8, label=None if i else kind)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss (nats/token)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
