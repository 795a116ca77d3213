"""Distributed Lion (arXiv 2404.00438): one bit a weight between the workers, against all-reduced gradients.

A byte-level transformer learns English and a small vision transformer learns digits, with several workers that each see
their own batch: majority vote, average, Lion and AdamW on averaged gradients, and a vote without momentum. The workers
live in one process (the tests show that processes give the same bits); bytes are counted by the formulas that the
benchmark lion_link measures on a wire. Learning rates are chosen on a seed that is not scored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edgewright.measure.report import Report
from edgewright.systems.distributed_lion.exchange import wire_bytes
from edgewright.systems.distributed_lion.tasks import (
    ADAMW,
    AVG,
    LION,
    MAVO,
    METHODS,
    NO_MOMENTUM,
    RATE,
    Digits,
    Text,
    train_digits,
    train_text,
)
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run

SCHEMES = {MAVO: "mavo two_phase", AVG: "avg two_phase", LION: "fp32", ADAMW: "fp32", NO_MOMENTUM: "mavo two_phase"}
PILOT = 10_000  # added to the seed: runs that choose the learning rate


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
        "fewer": Cell("distributed-lion-link.csv", {"metric": "fewer_bytes", "subject": "majority vote"}),
        "faster": Cell("distributed-lion-link.csv", {"metric": "faster at 100 Mbit/s", "subject": "majority vote"}),
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
    run = Run(output, "Distributed Lion: loss and bytes between the workers")
    text, seeds = settings.text, range(settings.seed, settings.seed + settings.seeds)
    rates = {method: _rate(run, settings, method) for method in METHODS}
    curves = {}
    for method, rate in rates.items():
        points = run.over_seeds(f"text/{method}", seeds, partial(train_text, text, method, rate, text.steps))
        run.add("text_loss", [point["loss"] for point in points], method, "nats a byte")
        run.add("learning_rate", rate * (RATE if method == ADAMW else 1), method)
        _add_bytes(run, method, points[0], text.workers)
        each = _sent(method, points[0], text.workers)
        steps, losses = zip(*points[0]["looks"], strict=True)
        curves[method] = [step * each / 1e6 for step in steps], losses
    _add_digits(run, settings, rates)
    run.note("learning rates were chosen on the text task, on a seed of their own; errors are over seeds")
    run.note("bytes: payload that one worker sends in a step, by formula; benchmarks/lion_link.py measures")
    axes = ("megabytes sent by a worker", "held-out nats a byte, first seed")
    run.lines("text.png", curves, *axes, style=".-", xscale="log")
    return run.report


def _rate(run: Run, settings: DistributedLionSettings, method: str) -> float:
    """The learning rate with the lowest loss after the pilot's steps, where there is a choice."""
    if len(settings.rates) == 1:
        return settings.rates[0]
    seed = settings.seed + PILOT

    def loss(rate: float) -> float:
        pilot = partial(train_text, settings.text, method, rate, settings.pilot_steps, seed)
        return float(run.memo(f"pilot/{method}/{rate}", pilot)["loss"])

    return min(settings.rates, key=loss)


def _add_digits(run: Run, settings: DistributedLionSettings, rates: dict[str, float]) -> None:
    """Voting for every number of workers; Lion and AdamW on the same images in one batch, which is their average."""
    task, seeds = settings.digits, range(settings.seed, settings.seed + settings.seeds)
    base: list[float] = []
    for method, workers in [(LION, 1), (ADAMW, 1), *((m, n) for n in task.workers for m in (MAVO, AVG))]:
        train = partial(train_digits, task, method, rates[method], workers)
        points = run.over_seeds(f"digits/{method}/{workers}", seeds, train)
        subject = method if method in (LION, ADAMW) else f"{method}, {workers} workers"
        losses = [point["loss"] for point in points]
        base = base or losses
        run.add("digits_loss", losses, subject, "nats")
        run.add("digits_accuracy", [point["eval_accuracy"] for point in points], subject)
        run.add("digits_loss_ratio", [a / b for a, b in zip(losses, base, strict=True)], subject, "x Lion")


def _sent(method: str, counts: dict[str, Any], workers: int) -> float:
    """Bytes that one worker sends in a step: tables of embeddings vote ternary, where there is a vote."""
    scheme = SCHEMES[method]
    return wire_bytes(scheme, counts["tables"], workers, ternary=True) + wire_bytes(scheme, counts["others"], workers)


def _add_bytes(run: Run, method: str, counts: dict[str, Any], workers: int) -> None:
    """What one worker sends, and the bits of its own votes for a weight."""
    parameters, sent = counts["tables"] + counts["others"], _sent(method, counts, workers)
    if method in (MAVO, AVG, NO_MOMENTUM):  # the votes alone: what an all_gather would send to one other
        up = sum(wire_bytes("mavo all_gather", counts[kind], 2, kind == "tables") for kind in ("tables", "others"))
        run.add("bits_up", 8 * up / parameters, method, "a weight")
    run.add("sent", sent, method, "bytes a step")
    run.add("fewer_bytes", wire_bytes("fp32", parameters, workers) / sent, method, "x")
