"""Check-N-Run (arXiv 2010.08679) on MovieLens 100k: bytes that a DLRM's checkpoints take, and what few bits cost it.

Bytes: one training in the order of time, a checkpoint every interval of events, by every policy with and without 4
bits, all at once on the same training. Quality: trainings that are restored r times from quantised checkpoints, against
the same training left alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.systems.check_n_run import CheckpointConfig, DiffCheckpointer, restore
from edgewright.systems.check_n_run.bits import bits_for
from edgewright.systems.check_n_run.comparisons import METHODS, row_error
from edgewright.systems.check_n_run.faults import MemoryFiles
from edgewright.systems.dlrm.clicks import ClickLoss
from edgewright.systems.dlrm.metrics import evaluate
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.dlrm.movielens import CROSSES, TABLES, movielens_100k
from edgewright.systems.dlrm.optimizers import dlrm_optimizer
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import over_seeds

if TYPE_CHECKING:
    from edgewright.systems.dlrm.clicks import ClickData

POLICIES = ("full", "one-shot", "consecutive", "intermittent")
STORED: tuple[int | str, ...] = ("none", 4)  # bits of the comparison of policies


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
        "faults": Cell("checkpoint_faults.csv", {"metric": "faults", "subject": "all"}),
        "unreadable": Cell("checkpoint_faults.csv", {"metric": "unreadable", "subject": "all"}),
        "stall": Cell("checkpoint_stall.csv", {"metric": "stall", "subject": "check-n-run, 4 bits"}),
        "plain": Cell("checkpoint_stall.csv", {"metric": "stall", "subject": "torch.save"}),
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
    """Every training's figures are kept in points.json when it ends."""
    store = output / "points.json"
    points: dict[str, Any] = read_object(store) if store.exists() else {}

    def measured(key: str, build: Callable[[], Any]) -> Any:
        if key not in points:
            points[key] = build()
            write_text(store, json.dumps(points, indent=1) + "\n")
        return points[key]

    report = Report("Check-N-Run on MovieLens 100k")
    data = _Data(settings)
    sizes = {d: measured(f"bytes/{d}", lambda d=d: bytes_of(settings, d, output, data)) for d in settings.dims}  # type: ignore[misc]
    for dim, found in sizes.items():
        _add_bytes(report, dim, found)
    quality: dict[tuple[int, int], list[dict[str, float]]] = {}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        cases = [(0, 0)] + [(b, r) for b in settings.bits for r in settings.restores]
        for bits, restores in cases:
            key = f"quality/{seed}/{bits}/{restores}"
            one = measured(key, lambda s=seed, b=bits, r=restores: quality_of(settings, s, b, r, data))  # type: ignore[misc]
            quality.setdefault((bits, restores), []).append(one)
    changes = _add_quality(report, settings, quality)
    for name, error in measured("errors", lambda: errors_of(settings, data)).items():
        report.add("row_error", error, subject=name)
    _plot_sizes(sizes, output / "sizes.png")
    _plot_restores(changes, settings, output / "restores.png")
    return report


def _add_bytes(report: Report, dim: int, found: dict[str, Any]) -> None:
    full = found["policies"]["full, float"]
    for name, one in found["policies"].items():
        subject = f"{name}, d={dim}"
        report.add("written", sum(one["bytes"]) / 1e6, subject=subject, n=len(one["bytes"]), unit="MB")
        report.add("reduction", sum(full["bytes"]) / sum(one["bytes"]), subject=subject, unit="x")
        report.add("held", max(one["held"]) / 1e6, subject=subject, unit="MB")
        report.add("held_reduction", max(full["held"]) / max(one["held"]), subject=subject, unit="x")
        report.add("stall", 1e3 * sorted(one["stalls"])[len(one["stalls"]) // 2], subject=subject, unit="ms")
        report.add("full_checkpoints", one["kinds"].count("full"), subject=subject, n=len(one["kinds"]))
    last, base = found["since_last"], found["since_base"]
    report.add("changed_an_interval", 100 * sum(last) / len(last), subject=f"d={dim}", n=len(last), unit="%")
    report.add("changed_since_first", 100 * base[-1], subject=f"d={dim}", n=len(base), unit="%")


def _add_quality(
    report: Report, settings: CheckNRunSettings, quality: dict[tuple[int, int], list[dict[str, float]]]
) -> dict[tuple[int, int], float]:
    alone = quality[0, 0]
    for metric in ("ne", "auc"):
        report.add(metric, subject="0 restores", **over_seeds([one[metric] for one in alone]))
    values = [one["ne"] for one in alone]
    if len(values) > 1:
        report.add("ne_change", 100 * stdev(values) / mean(values), subject="between seeds", n=len(values), unit="%")
    changes = {}
    for (bits, restores), found in quality.items():
        if not restores:
            continue
        change = over_seeds([100 * (a["ne"] / b["ne"] - 1) for a, b in zip(found, alone, strict=True)])
        changes[bits, restores] = change["value"]
        subject = f"{bits} bits, {restores} restores"
        report.add("ne_change", subject=subject, unit="%", **change)
        report.add("auc", subject=subject, **over_seeds([one["auc"] for one in found]))
        if bits == bits_for(restores):
            report.add("ne_change", subject=f"auto, {restores} restores", unit="%", **change)
    report.notes.append(
        "ne_change: normalised entropy against the same seed without restores; between seeds: their standard "
        "deviation; written: all checkpoints, manifests included; held: the most that lay on the disk, keep=1"
    )
    return changes


class _Data:
    """The log in its two orders, each read when it is first asked for."""

    def __init__(self, settings: CheckNRunSettings) -> None:
        self.settings = settings
        self._timed: ClickData | None = None
        self._random: tuple[ClickData, ClickData] | None = None

    def timed(self) -> ClickData:
        """Nearly everything in the order of time."""
        if self._timed is None:
            whole = movielens_100k("time", train=0.97, valid=0.01).train
            self._timed = whole.tables(list(self.settings.tables))
        return self._timed

    def random(self) -> tuple[ClickData, ClickData]:
        """(to train on, to judge by), plain tables."""
        if self._random is None:
            split = movielens_100k("random", seed=self.settings.seed)
            parts = [
                part.tables([name for name in TABLES if name not in CROSSES]) for part in (split.train, split.test)
            ]
            if self.settings.quality_samples:
                parts = [part.rows(slice(0, self.settings.quality_samples)) for part in parts]
            self._random = parts[0], parts[1]
        return self._random


def bytes_of(settings: CheckNRunSettings, dim: int, output: Path, source: _Data) -> dict[str, Any]:
    """One training with a checkpointer for every policy and storage; sizes in bytes."""
    data = source.timed()
    model, optimizer = _model(settings, data.schema, dim, settings.seed)
    batches = data.batches(settings.batch, settings.seed, shuffled=False)
    root = output / f"checkpoints-{dim}"
    shutil.rmtree(root, ignore_errors=True)
    writers = {}
    for policy in POLICIES:
        for bits in STORED:
            name = f"{policy}, {'float' if bits == 'none' else f'{bits} bits'}"
            config = CheckpointConfig(policy=policy, bits=bits, method="minmax", keep=1, expected_restores=4)  # type: ignore[arg-type]
            # the reader's state would be the same bytes in all of them
            writers[name] = DiffCheckpointer(
                root / name.replace(", ", "-").replace(" ", "-"), model, optimizer, config=config
            )
    found: dict[str, Any] = {n: {"bytes": [], "held": [], "kinds": [], "stalls": []} for n in writers}
    since_last, since_base = [], []
    total = sum(data.schema.sizes)
    watch = writers["full, float"].tracker
    ever = None
    step = _step(model, optimizer, data.schema.slots)
    for _ in range(settings.intervals):
        for _ in range(settings.events // settings.batch):
            step(next(batches))
        masks = [bits.mask() for bits in watch.last]
        ever = masks if ever is None else [a | b for a, b in zip(ever, masks, strict=True)]
        since_last.append(sum(int(mask.sum()) for mask in masks) / total)
        since_base.append(sum(int(mask.sum()) for mask in ever) / total)
        for name, writer in writers.items():
            writer.steps += settings.events // settings.batch
            writer.save(now=True)
            saved, one = writer.history[-1], found[name]
            one["bytes"].append(saved.bytes)
            one["kinds"].append(saved.kind)
            one["stalls"].append(saved.stall_seconds)
            folder = Path(str(writer.files))
            one["held"].append(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    for writer in writers.values():
        writer.close()
    shutil.rmtree(root, ignore_errors=True)
    return {"policies": found, "since_last": since_last, "since_base": since_base}


def quality_of(settings: CheckNRunSettings, seed: int, bits: int, restores: int, source: _Data) -> dict[str, float]:
    """Test figures after a training that was restored `restores` times, evenly spread, at `bits` bits."""
    train, test = source.random()
    model, optimizer = _model(settings, train.schema, settings.quality_dim, seed)
    batches = train.batches(settings.quality_batch, seed)
    step = _step(model, optimizer, train.schema.slots)
    steps = max(1, round(settings.epochs * len(train) / settings.quality_batch))
    stops = {round(steps * (number + 1) / (restores + 1)) for number in range(restores)}
    disk, info = MemoryFiles(), None
    config = CheckpointConfig(policy="one-shot", bits=bits or "none", expected_restores=1e9, nbins=25, ratio=0.6)  # type: ignore[arg-type]
    for number in range(1, steps + 1):
        step(next(batches))
        if number in stops:
            writer = DiffCheckpointer(disk, model, optimizer, reader=batches, config=config, restored=info)
            writer.tracker.mark_all()  # rows changed before this writer came to be
            writer.save(now=True)
            writer.close()
            info = restore(disk, model, optimizer, batches)
    figures = evaluate(model, test)
    return {"ne": figures.ne, "auc": figures.auc, "logloss": figures.logloss}


def errors_of(settings: CheckNRunSettings, source: _Data) -> dict[str, float]:
    """Relative error of trained rows by method and bits, on 512 users."""
    train, _ = source.random()
    model, optimizer = _model(settings, train.schema, settings.quality_dim, settings.seed)
    step, batches = _step(model, optimizer, train.schema.slots), train.batches(settings.quality_batch, settings.seed)
    for _ in range(max(1, len(train) // settings.quality_batch)):
        step(next(batches))
    rows = model.tables[0].weight.detach()[:512]
    return {f"{method}, {bits} bits": row_error(rows, bits, method) for bits in (2, 3, 4) for method in METHODS}


def _model(settings: CheckNRunSettings, schema: Any, dim: int, seed: int) -> tuple[Any, Any]:
    widths = (settings.hidden, dim), (settings.hidden, 1)
    model = DLRM(DLRMConfig(len(schema.dense), schema.sizes, dim, *widths, table_names=schema.tables), seed)
    return model, dlrm_optimizer(model, settings.dense_lr, settings.sparse_lr)


def _step(model: Any, optimizer: Any, slots: tuple[int, ...]) -> Callable[[Any], None]:
    loss = ClickLoss(slots)

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    return step


def _plot_sizes(sizes: dict[int, dict[str, Any]], path: Path) -> None:
    dim, found = next(iter(sizes.items()))
    with plot(path) as axes:
        for name, one in found["policies"].items():
            style = "--" if name.endswith("float") else "-"
            written = [size / 1e6 for size in accumulate(one["bytes"])]
            axes.plot(range(1, len(written) + 1), written, style, marker=".", label=name)
        axes.set_yscale("log")
        axes.set_xlabel("checkpoint")
        axes.set_ylabel(f"MB written so far, d = {dim}")
        axes.legend(fontsize="small", ncols=2)
        axes.grid(alpha=0.25)


def _plot_restores(changes: dict[tuple[int, int], float], settings: CheckNRunSettings, path: Path) -> None:
    with plot(path) as axes:
        for bits in settings.bits:
            axes.plot(
                settings.restores, [changes[bits, r] for r in settings.restores], marker="o", label=f"{bits} bits"
            )
        axes.axhline(0.0, color="black", linewidth=0.5)
        axes.set_xticks(settings.restores)
        axes.set_xlabel("restores")
        axes.set_ylabel("normalised entropy against no restore, %")
        axes.legend()
        axes.grid(alpha=0.25)
