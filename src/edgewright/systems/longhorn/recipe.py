"""Longhorn (arXiv 2407.14207): a memory of fixed size against Mamba's and against attention, on recall and on text.

Three small language models of the same width and depth: Longhorn; transformers' Mamba with the scan of mambapy where
that is installed; attention with feed-forwards whose width makes the parameters equal. They learn to recall values by
key, at one length and tested at a longer one, and to write characters of English documentation, over the same seeds.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from transformers import MambaConfig, MambaForCausalLM

from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.text import load_texts
from edgewright.io.transformers_names import cache_of
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.models.decoder.state_cache import snapshot
from edgewright.systems.longhorn.recall_task import RecallTask, recall_accuracy, recall_rows
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import over_seeds
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

if TYPE_CHECKING:
    from torch import nn

MODELS = ("Longhorn", "Mamba", "attention")
ABLATION = "Longhorn, beta fixed at 0.5"
CHARACTERS = 128  # ASCII
STEP_SECONDS = {
    "Longhorn": 1.7e-8,
    "Mamba": 4e-8,
    "attention": 3e-9,
    ABLATION: 1.7e-8,
}  # a width^2 layer token, 2 cores
INITIAL = 0.1  # standard deviation of weights at the start
REACHED = 0.9  # recall whose first step is reported


@dataclass(frozen=True)
class Recall:
    """`pairs` to remember in rows of `length` tokens; tested there and at `longer`. looks: times a run is judged.

    A small vocabulary and a question at nearly every place (`density`): with 8 pairs of 64 tokens, each asked for
    once, none of the models learned to tell one pair from another within 1200 steps of 16 rows. Attention, which
    stays at chance with the others' learning rate, has one of its own; rates come from pilots of one seed.
    """

    pairs: int = 4
    length: int = 32
    longer: int = 128
    vocabulary: int = 16
    density: float | None = 0.75
    width: int = 64
    layers: int = 2
    steps: int = 800
    batch: int = 32
    learning_rate: float = 5e-3
    attention_learning_rate: float = 2e-3
    rows: int = 256
    looks: int = 20
    ablation: bool = True


@dataclass(frozen=True)
class Text:
    """Characters of Python's documentation topics in blocks of `length`; held-out topics are scored."""

    length: int = 128
    width: int = 96
    layers: int = 3
    steps: int = 300
    batch: int = 8
    learning_rate: float = 2e-3
    held_out_blocks: int = 64


@dataclass(frozen=True)
class LonghornSettings:
    """Both parts over `seeds` seeds of initialisation and order; the data of a seed are the same for all models."""

    seed: int = 0
    seeds: int = 3
    weight_decay: float = 0.1
    recall: Recall = field(default_factory=Recall)
    text: Text = field(default_factory=Text)


def tiny() -> LonghornSettings:
    return LonghornSettings(
        seeds=1,
        recall=Recall(2, 12, 24, 16, None, 16, 1, steps=12, batch=8, rows=16, looks=2, ablation=False),
        text=Text(32, 16, 1, steps=12, batch=4, held_out_blocks=4),
    )


def small() -> LonghornSettings:
    return LonghornSettings()


def paper() -> LonghornSettings:
    """Longer runs of wider models; the published ones have 120M to 1.3B parameters and up to 100 billion tokens."""
    return LonghornSettings(
        seeds=5,
        recall=Recall(32, 256, 1024, 128, None, 128, 2, steps=20000, batch=64, learning_rate=3e-3),
        text=Text(1024, 768, 24, steps=5000, batch=512, learning_rate=6e-4),
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
        "late": Cell("longhorn_decode.csv", {"metric": "token", "subject": "Longhorn at 8192"}),
        "attention_late": Cell("longhorn_decode.csv", {"metric": "token", "subject": "attention at 8192"}),
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
    """Every finished training is kept in points.json, so a second call goes on after the last one."""
    store = output / "points.json"
    points: dict[str, Any] = read_object(store) if store.exists() else {}
    recall_models = (*MODELS, ABLATION) if settings.recall.ablation else MODELS
    for part, names, train in (("recall", recall_models, _recall), ("text", MODELS, _text)):
        for seed in range(settings.seeds):
            for name in names:
                key = f"{part}/{name}/{seed}"
                if key not in points:
                    points[key] = train(settings, name, settings.seed + seed)
                    write_text(store, json.dumps(points) + "\n")
    report = Report("Longhorn, Mamba and attention: recall by key, English characters, memory")
    metrics = {"recall": "share", "recall_longer": "share", "recall_lost": "share", f"steps_to_{REACHED:.0%}": "steps"}
    for part, names, units in (
        ("recall", recall_models, {**metrics, "recall_parameters": ""}),
        ("text", MODELS, {"text_loss": "nats", "text_parameters": ""}),
    ):
        for metric, unit in units.items():
            for name in names:
                values = [points[f"{part}/{name}/{seed}"][metric] for seed in range(settings.seeds)]
                report.add(metric, **over_seeds(values), subject=name, unit=unit)
    for name in ("Longhorn", "attention"):
        _memory(report, settings, name)
    _plots(settings, points, recall_models, output)
    report.notes += [
        f"recall is tested at {settings.recall.length} tokens, recall_longer at {settings.recall.longer}; "
        "recall_lost is their difference",
        f"steps_to_{REACHED:.0%}: first look at which it was reached, all steps and one more where it never was",
        "Mamba has the same width, depth and state; its matrix A makes its parameters a few percent more",
        "standard errors are over seeds of initialisation and data",
    ]
    return report


# -- the models --------------------------------------------------------------------------------------------------------


def feed_forward_width(width: int, d_state: int = 16) -> int:
    """That with which a layer of attention and feed-forward has the parameters of a Longhorn block of that width."""
    inner, rank = 2 * width, math.ceil(width / 16)
    block = 2 * width * inner + 7 * inner + inner * (2 * rank + 2 * d_state) + inner * width
    return max(1, round((block - 4 * width * width - width) / (3 * width)))


def model_of(name: str, vocabulary: int, width: int, layers: int, context: int, seed: int) -> nn.Module:
    """A language model by the name of its mixer, weights drawn from the seed.

    Embeddings and the weights of attention are N(0, 0.1^2), as transformers' Mamba has them: from 0.02, the usual
    number for large models, attention of this width had not begun to recall after 1200 steps.
    """
    if name == "Mamba":
        tokens: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        shape = MambaConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, state_size=16, use_cache=False,
            use_mambapy=True, tie_word_embeddings=True, initializer_range=INITIAL, **tokens,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MambaForCausalLM(shape)
    attends = name == "attention"
    return new_decoder(
        EdgeDecoderConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=feed_forward_width(width),
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            mixers="full_attention" if attends else "longhorn",
            ffn_types="mlp" if attends else "none",
            longhorn={"fixed_beta": 0.5} if name == ABLATION else None,
            initializer_range=INITIAL,
            max_position_embeddings=context,
        ),
        seed,
    )


def _fit(
    settings: LonghornSettings, model: Any, batches: Any, part: Recall | Text, rate: float, seed: int, **options: Any
) -> Any:
    config = TrainConfig(
        part.steps,
        rate,
        warmup_steps=math.ceil(0.05 * part.steps),
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.95),
        seed=seed,
    )
    return fit(model, lambda m, batch: m(**batch).loss, batches, config, progress=False, **options)


# -- the two parts -----------------------------------------------------------------------------------------------------


class _RecallBatches:
    """Fresh rows for ever."""

    def __init__(self, task: RecallTask, batch: int, seed: int) -> None:
        self.task, self.batch, self.generator = task, batch, torch.Generator().manual_seed(seed)

    def __iter__(self) -> _RecallBatches:
        return self

    def __next__(self) -> Any:
        return recall_rows(self.task, self.batch, self.generator)


def _recall(settings: LonghornSettings, name: str, seed: int) -> dict[str, Any]:
    part = settings.recall
    task, longer = (
        RecallTask(part.pairs, length, part.vocabulary, part.density) for length in (part.length, part.longer)
    )
    held_out = [recall_rows(t, part.rows, torch.Generator().manual_seed(10**6 + seed)) for t in (task, longer)]
    model = model_of(name, part.vocabulary, part.width, part.layers, part.longer, seed)
    every = max(1, part.steps // part.looks)
    curve: list[float] = []

    def accuracy(m: Any, rows: dict[str, Any]) -> float:
        pieces = [m(input_ids=ids).logits for ids in rows["input_ids"].split(32)]
        return float(recall_accuracy(torch.cat(pieces), rows["labels"]).mean())

    def look(m: Any) -> dict[str, float]:
        curve.append(accuracy(m, held_out[0]))
        return {"recall": curve[-1]}

    batches = _RecallBatches(task, part.batch, seed)
    rate = part.attention_learning_rate if name == "attention" else part.learning_rate
    _fit(settings, model, batches, part, rate, seed, evaluate=look, evaluate_every=every)
    model.eval()
    with torch.no_grad():
        far = accuracy(model, held_out[1])
    steps = [min((i + 1) * every, part.steps) for i in range(len(curve))]
    reached = next((step for step, value in zip(steps, curve, strict=True) if value >= REACHED), part.steps + 1)
    return {
        "recall": curve[-1],
        "recall_longer": far,
        "recall_lost": curve[-1] - far,
        f"steps_to_{REACHED:.0%}": reached,
        "recall_parameters": sum(p.numel() for p in model.parameters()),
        "curve": [steps, curve],
    }


def _text(settings: LonghornSettings, name: str, seed: int) -> dict[str, Any]:
    part = settings.text

    def blocks(split: Any) -> torch.Tensor:
        text = "\n".join(load_texts(None, split)).encode("ascii", "replace")
        ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        return ids[: len(ids) // part.length * part.length].view(-1, part.length)

    training, held_out = blocks("calibration"), blocks("evaluation")[: part.held_out_blocks]
    model = model_of(name, CHARACTERS, part.width, part.layers, part.length, seed)
    result = _fit(
        settings,
        model,
        BlockBatches({"input_ids": training, "labels": training}, part.batch, seed=seed),
        part,
        part.learning_rate,
        seed,
        evaluate=lambda m: {"loss": sum(float(m(input_ids=b, labels=b).loss) * len(b) for b in held_out.split(16))},
        evaluate_every=part.steps,
    )
    return {
        "text_loss": result.metrics["eval_loss"] / len(held_out),
        "text_parameters": sum(p.numel() for p in model.parameters()),
        "losses": [float(row["loss"]) for row in result.history],
    }


def _memory(report: Report, settings: LonghornSettings, name: str) -> None:
    """Bytes of the cache after a short and after an eight times longer text."""
    part = settings.text
    model: Any = model_of(name, CHARACTERS, part.width, part.layers, 8 * part.length, settings.seed).eval()
    sizes = []
    with torch.no_grad():
        for length in (part.length, 8 * part.length):
            output = model(torch.zeros(1, length, dtype=torch.long), use_cache=True)
            sizes.append(snapshot(cache_of(output)).bytes)
    report.add("memory", sizes[1], subject=name, unit="bytes")
    report.add("memory_growth", sizes[1] / sizes[0], subject=name, unit="x")


def _plots(settings: LonghornSettings, points: dict[str, Any], names: tuple[str, ...], output: Path) -> None:
    with plot(output / "recall.png", (6.5, 4)) as axes:
        for colour, name in enumerate(names):
            for seed in range(settings.seeds):
                steps, curve = points[f"recall/{name}/{seed}"]["curve"]
                axes.plot(steps, curve, color=f"C{colour}", label=name if not seed else None, alpha=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel("recall, held out")
        axes.set_ylim(0, 1.02)
        axes.legend()
    with plot(output / "text.png", (6.5, 4)) as axes:
        for name in MODELS:
            runs = [points[f"text/{name}/{seed}"]["losses"] for seed in range(settings.seeds)]
            losses = [mean(step) for step in zip(*runs, strict=True)]
            window = max(1, settings.text.steps // 30)
            axes.plot([mean(losses[max(0, i - window) : i + 1]) for i in range(len(losses))], label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats a character, smoothed")
        axes.legend()
