"""Check-N-Run (arXiv 2010.08679) on MovieLens 100k: bytes that a DLRM's checkpoints take, and what few bits cost it.

Bytes: one training in the order of time, a checkpoint every interval of events, by every policy with and without 4
bits, all at once on the same training. Quality: trainings that are restored r times from quantised checkpoints, against
the same training left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from edgewright.measure.report import Report
from edgewright.systems.check_n_run.config import POLICIES, bits_for
from edgewright.systems.check_n_run.study import STORED, Study
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run


@dataclass(frozen=True)
class CheckNRunSettings:
    """events: of an interval. tables: of the comparison of bytes. restores: r of the comparison of quality, beside 0.

    Quality is measured at the random split, whose test has users that were trained on: there the rows matter.
    """

    seed: int = 0
    seeds: int = 3
    dims: tuple[int, ...] = (64, 16)
    intervals: int = 12
    events: int = 2000
    batch: int = 64
    tables: tuple[str, ...] = ("user", "item", "user_genre", "user_item")
    quality_dim: int = 16
    quality_samples: int = 0
    quality_batch: int = 256
    epochs: float = 2.0
    hidden: int = 64
    dense_lr: float = 1e-3
    sparse_lr: float = 0.02
    bits: tuple[int, ...] = (2, 3, 4, 8)
    restores: tuple[int, ...] = (1, 3, 10, 20)


def tiny() -> CheckNRunSettings:
    return CheckNRunSettings(
        seeds=1, dims=(16,), intervals=5, events=160, batch=32, tables=("user", "user_item"), quality_samples=1500,
        quality_batch=128, epochs=1.0, bits=(2, 8), restores=(2,),
    )  # fmt: skip


def small() -> CheckNRunSettings:
    return CheckNRunSettings()


def paper() -> CheckNRunSettings:
    """Ten seeds and the whole log. The published tables have billions of rows and half-hour intervals."""
    return CheckNRunSettings(seeds=10, intervals=40)


LARGE = ("small", "paper")
CLAIMS = (
    Claim("reduction", "intermittent, 4 bits, d=16", ">", threshold=3.0, sizes=("tiny",)),
    Claim("reduction", "intermittent, 4 bits, d=64", ">", threshold=10.0, sizes=LARGE),
    Claim("reduction", "intermittent, 4 bits, d=16", ">", threshold=6.0, sizes=LARGE),
    Claim("reduction", "full, 4 bits, d=64", ">", threshold=4.0, sizes=LARGE),
    Claim("held_reduction", "intermittent, 4 bits, d=64", ">", threshold=2.5, sizes=LARGE),
    Claim("reduction", "intermittent, float, d=64", ">", against="one-shot, float, d=64", factor=0.95, sizes=LARGE),
    Claim("reduction", "consecutive, float, d=64", ">", against="intermittent, float, d=64", sizes=LARGE),
    Claim("ne_change", "8 bits, 20 restores", "<", against="between seeds", sizes=LARGE),
    Claim("ne_change", "2 bits, 10 restores", ">", threshold=0.1, sizes=LARGE),
    *(Claim("ne_change", f"auto, {r} restores", "<", threshold=0.1, sizes=LARGE) for r in (1, 3, 10, 20)),
    Claim("row_error", "adaptive, 4 bits", "<", against="minmax, 4 bits"),
    Claim("row_error", "minmax, 4 bits", "<", against="symmetric, 4 bits"),
)
CLOCKED: tuple[str, ...] = ("stall",)
HEADLINE: Headline | None = Headline(
    "{wide:.0f}x fewer bytes than full checkpoints at 4 bits with rows of 64 ({narrow:.0f}x with 16), {faults:,.0f} "
    "injected faults with {unreadable:.0f} unreadable, training stands still {stall:.1f} ms instead of {plain:.0f}",
    {
        "wide": Cell("check-n-run.csv", {"metric": "reduction", "subject": "intermittent, 4 bits, d=64"}),
        "narrow": Cell("check-n-run.csv", {"metric": "reduction", "subject": "intermittent, 4 bits, d=16"}),
        "faults": Cell("check-n-run-faults.csv", {"metric": "faults", "subject": "all"}),
        "unreadable": Cell("check-n-run-faults.csv", {"metric": "unreadable", "subject": "all"}),
        "stall": Cell("check-n-run-stall.csv", {"metric": "stall", "subject": "check-n-run, 4 bits"}),
        "plain": Cell("check-n-run-stall.csv", {"metric": "stall", "subject": "torch.save"}),
    },
)


def plan(settings: CheckNRunSettings) -> Plan:
    samples = settings.quality_samples or 72_000
    runs = settings.seeds * (1 + len(settings.bits) * len(settings.restores))
    steps = settings.epochs * samples / settings.quality_batch
    bytes_steps = settings.intervals * settings.events / settings.batch * len(settings.dims)
    each = len(POLICIES) * len(STORED)
    return Plan(
        steps=(
            f"train in order of time, d = {', '.join(map(str, settings.dims))}; {settings.intervals} checkpoints, one "
            f"every {settings.events} events, by {each} policies at once",
            f"train {settings.seeds} seed(s) with {', '.join(map(str, settings.restores))} restores at "
            f"{', '.join(map(str, settings.bits))} bits, and without",
            "normalised entropy and AUC on the test, errors of rows by method, plots",
        ),
        seconds=5 + 0.02 * bytes_steps + 0.2 * each * settings.intervals * len(settings.dims) + 0.012 * steps * runs,
        memory_bytes=int(1.2e9),
        disk_bytes=int(3e8),
        outputs=("sizes.png", "restores.png", "points.json"),
    )


def run(settings: CheckNRunSettings, output: Path) -> Report:
    run = Run(output, "Check-N-Run on MovieLens 100k")
    study = Study(settings)
    sizes = {
        dim: run.memo(f"bytes/{dim}", partial(study.sizes, dim, output / f"checkpoints-{dim}")) for dim in settings.dims
    }
    for dim, figures in sizes.items():
        _add_bytes(run, dim, figures)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    quality = {
        (bits, restores): run.over_seeds(f"quality/{bits}/{restores}", seeds, partial(study.quality, bits, restores))
        for bits, restores in [(0, 0), *product(settings.bits, settings.restores)]
    }
    _add_quality(run, quality)
    for name, error in run.memo("errors", study.row_errors).items():
        run.add("row_error", error, name)

    dim, figures = next(iter(sizes.items()))
    written = {name: [size / 1e6 for size in accumulate(one["bytes"])] for name, one in figures["policies"].items()}
    curves = {name: (range(1, len(values) + 1), values) for name, values in written.items()}
    run.lines("sizes.png", curves, "checkpoint", f"MB written so far, d = {dim}", style=".-", yscale="log")
    changes = {
        f"{bits} bits": run.curve("ne_change", [_subject(bits, r) for r in settings.restores], settings.restores)
        for bits in settings.bits
    }
    axes = ("restores", "normalised entropy against no restore, %")
    run.lines("restores.png", changes, *axes, style="o-", xticks=settings.restores)
    return run.report


def _add_bytes(run: Run, dim: int, figures: dict[str, Any]) -> None:
    full = figures["policies"]["full, float"]
    for name, one in figures["policies"].items():
        subject, count = f"{name}, d={dim}", len(one["bytes"])
        run.add("written", sum(one["bytes"]) / 1e6, subject, "MB", n=count)
        run.add("reduction", sum(full["bytes"]) / sum(one["bytes"]), subject, "x")
        run.add("held", max(one["held"]) / 1e6, subject, "MB")
        run.add("held_reduction", max(full["held"]) / max(one["held"]), subject, "x")
        run.add("stall", 1e3 * sorted(one["stalls"])[count // 2], subject, "ms")
        run.add("full_checkpoints", one["kinds"].count("full"), subject, n=count)
    last, base = figures["since_last"], figures["since_base"]
    run.add("changed_an_interval", 100 * sum(last) / len(last), f"d={dim}", "%", n=len(last))
    run.add("changed_since_first", 100 * base[-1], f"d={dim}", "%", n=len(base))


def _add_quality(run: Run, quality: dict[tuple[int, int], list[dict[str, float]]]) -> None:
    """quality: (bits, restores) -> figures of each seed; (0, 0): left alone."""
    alone = quality.pop((0, 0))
    for metric in ("ne", "auc"):
        run.add(metric, [one[metric] for one in alone], "0 restores")
    values = [one["ne"] for one in alone]
    if len(values) > 1:
        run.add("ne_change", 100 * stdev(values) / mean(values), "between seeds", "%", n=len(values))
    for (bits, restores), figures in quality.items():
        changes = [100 * (a["ne"] / b["ne"] - 1) for a, b in zip(figures, alone, strict=True)]
        run.add("ne_change", changes, _subject(bits, restores), "%")
        run.add("auc", [one["auc"] for one in figures], _subject(bits, restores))
        if bits == bits_for(restores):
            run.add("ne_change", changes, f"auto, {restores} restores", "%")
    run.note(
        "ne_change: normalised entropy against the same seed without restores; between seeds: their standard "
        "deviation; written: all checkpoints, manifests included; held: the most that lay on the disk, keep=1"
    )


def _subject(bits: int, restores: int) -> str:
    return f"{bits} bits, {restores} restores"
