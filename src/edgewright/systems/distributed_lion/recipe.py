"""Distributed Lion (arXiv 2404.00438): one bit a weight between the workers, against all-reduced gradients.

A byte-level transformer learns English and a small vision transformer learns digits, with several workers that each see
their own batch: majority vote, average, Lion and AdamW on averaged gradients, and a vote without momentum. The workers
live in one process (the tests show that processes give the same bits); bytes are counted by the formulas that the
benchmark lion_link measures on a wire. Learning rates are chosen on a seed that is not scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from edgewright.io.atomic import write_text
from edgewright.io.images import digits
from edgewright.io.json_file import read_object
from edgewright.io.text import load_texts
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.systems.distributed_lion.distributed import lion_groups
from edgewright.systems.distributed_lion.exchange import wire_bytes
from edgewright.systems.distributed_lion.lion import Lion
from edgewright.systems.distributed_lion.simulated import SimulatedLion, SimulatedWorkers
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import over_seeds
from edgewright.training.batches import BlockBatches
from edgewright.training.config import TrainConfig
from edgewright.training.loop import fit

if TYPE_CHECKING:
    from torch import Tensor

MAVO, AVG, LION, ADAMW, NO_MOMENTUM = "majority vote", "average", "Lion", "AdamW", "vote without momentum"
METHODS = (MAVO, AVG, LION, ADAMW, NO_MOMENTUM)
SCHEMES = {MAVO: "mavo two_phase", AVG: "avg two_phase", LION: "fp32", ADAMW: "fp32", NO_MOMENTUM: "mavo two_phase"}
DECAY = {ADAMW: 0.1}  # the others take 1.0, as Lion wants it ten times AdamW's where its rate is a tenth
RATE = 10.0  # AdamW's learning rates, in those of the others
PILOT = 10_000  # added to the seed: runs that choose the learning rate


@dataclass(frozen=True)
class Text:
    """A byte-level Llama on Python's documentation topics; `batch` rows of `length` bytes for each worker."""

    width: int = 96
    layers: int = 3
    length: int = 64
    batch: int = 8
    workers: int = 4
    steps: int = 250
    held_out: int = 96


@dataclass(frozen=True)
class Digits:
    """A vision transformer on 8 x 8 digits, for every number of workers; `batch` images for all of them together."""

    width: int = 48
    layers: int = 2
    batch: int = 64
    workers: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 400


@dataclass(frozen=True)
class DistributedLionSettings:
    """Both tasks over `seeds`; `rates` are tried by runs of `pilot_steps`, a tenth of what AdamW gets.

    The trials are as long as the runs: of half that length they prefer a rate that ends worse.
    """

    seed: int = 0
    seeds: int = 3
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    pilot_steps: int = 250
    text: Text = field(default_factory=Text)
    digits: Digits = field(default_factory=Digits)


def tiny() -> DistributedLionSettings:
    text = Text(width=32, layers=1, length=32, batch=2, steps=12, held_out=8)
    return DistributedLionSettings(0, 1, (1e-3,), 0, text, Digits(16, 1, 16, (1, 2), 12))


def small() -> DistributedLionSettings:
    return DistributedLionSettings()


def paper() -> DistributedLionSettings:
    """Longer and wider; the published runs (CIFAR-10, ImageNet, OpenWebText, 4 to 32 machines) need data and GPUs."""
    text = Text(width=512, layers=8, length=256, batch=32, workers=32, steps=14_000, held_out=1000)
    digits = Digits(512, 6, 1024, (4, 8, 16, 32), 10_000)
    return DistributedLionSettings(0, 3, (3e-5, 9e-5, 3e-4), 2000, text, digits)


TRAINED = ("small", "paper")
CLAIMS = (
    Claim("bits_up", MAVO, "<", 1.1, sizes=TRAINED),
    Claim("fewer_bytes", MAVO, ">", 28.0, sizes=TRAINED),
    Claim("fewer_bytes", MAVO, ">", 20.0),  # a table of bytes is a third of the tiny model, at 1.6 bits
    Claim("fewer_bytes", AVG, ">", 12.0),
    Claim("text_loss", MAVO, "<", against=LION, factor=1.03, sizes=TRAINED),
    Claim("text_loss", AVG, "<", against=ADAMW, factor=1.03, sizes=TRAINED),
    Claim("text_loss", NO_MOMENTUM, ">", against=MAVO, factor=1.01, sizes=TRAINED),
    Claim("digits_loss_ratio", f"{MAVO}, 4 workers", "<", 1.1, sizes=TRAINED),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "{fewer:.1f}x fewer bytes on the wire than float32 gradients, a step at 100 Mbit/s {faster:.1f}x as fast; loss "
    "{ours:.2f} nats/byte, Lion {lion:.2f}, AdamW {adamw:.2f}",
    {
        "fewer": Cell("lion_link.csv", {"metric": "fewer_bytes", "subject": "majority vote"}),
        "faster": Cell("lion_link.csv", {"metric": "faster at 100 Mbit/s", "subject": "majority vote"}),
        "ours": Cell("distributed-lion.csv", {"metric": "text_loss", "subject": "majority vote"}),
        "lion": Cell("distributed-lion.csv", {"metric": "text_loss", "subject": "Lion"}),
        "adamw": Cell("distributed-lion.csv", {"metric": "text_loss", "subject": "AdamW"}),
    },
)


def plan(settings: DistributedLionSettings) -> Plan:
    text, digits = settings.text, settings.digits
    work = text.workers * text.batch * text.length * text.layers * text.width * (text.width + 200)
    image = 16 * digits.batch * digits.layers * digits.width * (digits.width + 200)
    steps = settings.seeds * text.steps + len(settings.rates) * settings.pilot_steps
    sides = len(digits.workers) * 2 + 2
    seconds = 8e-10 * len(METHODS) * steps * work + sides * settings.seeds * digits.steps * (2e-9 * image + 0.01)
    return Plan(
        steps=(
            f"choose a learning rate for {len(METHODS)} methods among {len(settings.rates)} on bytes of English",
            f"train each with {text.workers} workers, {settings.seeds} seeds of {text.steps} steps",
            f"train on digits with {', '.join(map(str, digits.workers))} workers",
            "count the bytes that a worker sends",
        ),
        seconds=5 + seconds,
        memory_bytes=int(1e9),
        disk_bytes=10**6,
        outputs=("text.png", "points.json"),
    )


def run(settings: DistributedLionSettings, output: Path) -> Report:
    """Every finished training is kept in points.json, so a second call goes on after the last one."""
    store = output / "points.json"
    points: dict[str, Any] = read_object(store) if store.exists() else {}

    def point(key: str, make: Callable[[], Any]) -> Any:
        if key not in points:
            points[key] = make()
            write_text(store, json.dumps(points) + "\n")
        return points[key]

    report = Report("Distributed Lion: loss and bytes between the workers")
    rates: dict[str, float] = {}
    for method in METHODS:
        tried = {
            rate: point(f"pilot/{method}/{rate}", partial(_text, settings, method, rate, PILOT, True))["loss"]
            for rate in (settings.rates if len(settings.rates) > 1 else ())
        }
        rates[method] = min(tried, key=lambda rate: tried[rate]) if tried else settings.rates[0]
    runs = {
        method: [
            point(f"text/{method}/{seed}", partial(_text, settings, method, rates[method], seed, False))
            for seed in range(settings.seeds)
        ]
        for method in METHODS
    }
    for method, found in runs.items():
        report.add("text_loss", **over_seeds([one["loss"] for one in found]), subject=method, unit="nats a byte")
        report.add("learning_rate", rates[method] * (RATE if method == ADAMW else 1), subject=method)
        _bytes(report, method, found[0], settings.text.workers)
    _digits_rows(report, settings, rates, point)
    _plot(runs, settings, output)
    report.notes.append("learning rates were chosen on the text task, on a seed of their own; errors are over seeds")
    report.notes.append("bytes: payload that one worker sends in a step, by formula; benchmarks/lion_link.py measures")
    return report


def optimizer_of(method: str, model: nn.Module, rate: float, workers: int) -> Any:
    """The optimizer of a method; the house's split decides what decays, tables of embeddings vote ternary."""
    decay = DECAY.get(method, 1.0)
    groups = lion_groups(model, decay)
    plain = [{"params": [p for _, p in group["params"]], "weight_decay": group["weight_decay"]} for group in groups]
    if method == ADAMW:
        return torch.optim.AdamW(plain, lr=rate * RATE, betas=(0.9, 0.95))
    if method == LION:
        return Lion(plain, rate)
    betas = (0.0, 0.99) if method == NO_MOMENTUM else (0.9, 0.99)
    return SimulatedLion(groups, workers, rate, betas, aggregate="avg" if method == AVG else "mavo")


def _train(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: BlockBatches,
    method: str,
    rate: float,
    steps: int,
    workers: int,
    evaluate: Callable[[nn.Module], dict[str, float]],
    seed: int,
) -> dict[str, Any]:
    """One run of `fit`: a micro step is the batch of one worker, whether gradients are averaged or vote."""
    optimizer = optimizer_of(method, model, rate, workers)
    function: Any = SimulatedWorkers(loss, optimizer) if isinstance(optimizer, SimulatedLion) else loss
    config = TrainConfig(steps, accumulation=workers, clip_norm=None, warmup_steps=min(20, steps // 4), seed=seed)
    result = fit(
        model,
        function,
        batches,
        config,
        optimizer=optimizer,
        evaluate=evaluate,
        evaluate_every=max(1, steps // 10),
        progress=False,
    )
    looks = [(int(row["step"]), float(row["eval_loss"])) for row in result.history if "eval_loss" in row]
    counts = {"tables": 0, "others": 0}
    for group in lion_groups(model):
        kind = "tables" if group["zero"] == "ternary" else "others"
        counts[kind] += sum(parameter.numel() for _, parameter in group["params"])
    return {"loss": looks[-1][1], "looks": looks, **counts, **result.metrics}


def _text(settings: DistributedLionSettings, method: str, rate: float, seed: int, pilot: bool) -> dict[str, Any]:
    part = settings.text

    def rows(split: Any) -> Tensor:
        text = "\n".join(load_texts(None, split)).encode()
        ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        return ids[: len(ids) // part.length * part.length].view(-1, part.length)

    held_out = rows("evaluation")
    held_out = held_out[:: max(1, len(held_out) // part.held_out)][: part.held_out]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=part.width,
        intermediate_size=part.width * 8 // 3 // 8 * 8,
        num_hidden_layers=part.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=part.length,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed + seed)
        model = LlamaForCausalLM(config)

    def loss(network: nn.Module, batch: Tensor) -> Tensor:
        found: Tensor = network(input_ids=batch, labels=batch).loss
        return found

    batches = BlockBatches(rows("calibration"), part.batch, seed=settings.seed + seed)
    steps = settings.pilot_steps if pilot else part.steps

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {"loss": float(loss(network, held_out))}

    return _train(model, loss, batches, method, rate, steps, part.workers, evaluate, settings.seed + seed)


def vision_transformer(width: int, layers: int, seed: int) -> nn.Module:
    """Images [N, 1, 8, 8] to ten classes: patches of 2 x 2 with learned places, encoder layers, the mean of them."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, width)

        def forward(self, patches: Tensor) -> Tensor:
            return patches.flatten(2).transpose(1, 2) + self.embedding.weight

    class Mean(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens.mean(1)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        ]
        return nn.Sequential(
            nn.Conv2d(1, width, 2, 2), Places(), *blocks, nn.LayerNorm(width), Mean(), nn.Linear(width, 10)
        )


def _digits(settings: DistributedLionSettings, method: str, rate: float, workers: int, seed: int) -> dict[str, Any]:
    part = settings.digits
    images, labels = digits("calibration")
    held_out, answers = digits("evaluation")
    model = vision_transformer(part.width, part.layers, settings.seed + seed)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(network(batch["x"]), batch["y"])

    def evaluate(network: nn.Module) -> dict[str, float]:
        logits = network(held_out)
        accuracy = float((logits.argmax(1) == answers).float().mean())
        return {"loss": float(F.cross_entropy(logits, answers)), "accuracy": accuracy}

    share = max(1, part.batch // workers)
    batches = BlockBatches({"x": images, "y": labels}, share, seed=settings.seed + seed)
    return _train(model, loss, batches, method, rate, part.steps, workers, evaluate, settings.seed + seed)


def _digits_rows(
    report: Report, settings: DistributedLionSettings, rates: dict[str, float], point: Callable[..., Any]
) -> None:
    """Voting for every number of workers; Lion and AdamW on the same images in one batch, which is their average."""
    cases = [(LION, 1), (ADAMW, 1)] + [
        (method, workers) for workers in settings.digits.workers for method in (MAVO, AVG)
    ]
    base: list[float] = []
    for method, workers in cases:
        found = [
            point(
                f"digits/{method}/{workers}/{seed}",
                partial(_digits, settings, method, rates[method], workers, seed),
            )
            for seed in range(settings.seeds)
        ]
        subject = method if method in (LION, ADAMW) else f"{method}, {workers} workers"
        losses = [one["loss"] for one in found]
        base = losses if method == LION else base
        report.add("digits_loss", **over_seeds(losses), subject=subject, unit="nats")
        report.add("digits_accuracy", **over_seeds([one["eval_accuracy"] for one in found]), subject=subject)
        ratios = [mine / theirs for mine, theirs in zip(losses, base, strict=True)]
        report.add("digits_loss_ratio", **over_seeds(ratios), subject=subject, unit="x Lion")


def _sent(method: str, counts: dict[str, Any], workers: int) -> float:
    """Bytes that one worker sends in a step: tables of embeddings vote ternary, where there is a vote."""
    scheme = SCHEMES[method]
    return wire_bytes(scheme, counts["tables"], workers, ternary=True) + wire_bytes(scheme, counts["others"], workers)


def _bytes(report: Report, method: str, counts: dict[str, Any], workers: int) -> None:
    """What one worker sends, and the bits of its own votes for a weight."""
    parameters, sent = counts["tables"] + counts["others"], _sent(method, counts, workers)
    if method in (MAVO, AVG, NO_MOMENTUM):  # the votes alone: what an all_gather would send to one other
        up = sum(wire_bytes("mavo all_gather", counts[kind], 2, kind == "tables") for kind in ("tables", "others"))
        report.add("bits_up", 8 * up / parameters, subject=method, unit="a weight")
    report.add("sent", sent, subject=method, unit="bytes a step")
    report.add("fewer_bytes", wire_bytes("fp32", parameters, workers) / sent, subject=method, unit="x")


def _plot(runs: dict[str, list[dict[str, Any]]], settings: DistributedLionSettings, output: Path) -> None:
    """Held-out loss of the first seed against the bytes that a worker has sent."""
    with plot(output / "text.png", (6.5, 4)) as axes:
        for method, found in runs.items():
            each = _sent(method, found[0], settings.text.workers)
            steps, losses = zip(*found[0]["looks"], strict=True)
            axes.plot([step * each / 1e6 for step in steps], losses, label=method, marker=".")
        axes.set_xscale("log")
        axes.set_xlabel("megabytes sent by a worker")
        axes.set_ylabel("held-out nats a byte")
        axes.legend()
