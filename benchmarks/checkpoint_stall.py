"""How long a checkpoint stops the training, beside torch.save of everything and DCP's async_save, all in one run.

One DLRM, 10 % of whose rows change between checkpoints. A stall is the time until training may go on; the writes that
go on behind it are waited for outside the clock. `tracking` is a training step with and without the bitmaps. Quantising
and writing are rates of the same bytes of float rows in this run; restoring is beside loading what torch.save wrote.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from edgewright.io.row_ranges import quantize_rows
from edgewright.measure.report import Report
from edgewright.measure.timing import Measurement, alternate, paired_ratio
from edgewright.systems.check_n_run import CheckpointConfig, DiffCheckpointer, restore
from edgewright.systems.check_n_run.tables import Tracker, find_tables
from edgewright.systems.dlrm.clicks import ClickLoss
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.dlrm.optimizers import dlrm_optimizer
from results import save

TABLES, DIM, DENSE, BATCH, CHANGED = 4, 64, 13, 2048, 0.10


def make(rows: int) -> tuple[DLRM, Any]:
    model = DLRM(DLRMConfig(DENSE, (rows,) * TABLES, DIM, (64, DIM), (64, 1)))
    return model, dlrm_optimizer(model)


def batch_of(rows: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, rows, (BATCH, TABLES), generator=generator, dtype=torch.int32)
    labels = torch.randint(0, 2, (BATCH,), generator=generator).float()
    return {"dense": torch.randn(BATCH, DENSE, generator=generator), "ids": ids, "labels": labels}


def stepper(model: DLRM, optimizer: Any, rows: int) -> Callable[[], None]:
    batches = [batch_of(rows, seed) for seed in range(4)]
    loss, count = ClickLoss((1,) * TABLES), [0]

    def step() -> None:
        count[0] += 1
        optimizer.zero_grad()
        loss(model, batches[count[0] % len(batches)]).backward()
        optimizer.step()

    return step


def synced_save(state: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def add_stalls(report: Report, rows: int, repeats: int, folder: Path) -> None:
    model, optimizer = make(rows)
    stepper(model, optimizer, rows)()
    changed = [torch.randperm(rows)[: int(CHANGED * rows)].sort().values for _ in range(TABLES)]
    writers = {}
    for bits in ("none", 4):
        name = f"check-n-run, {'float' if bits == 'none' else '4 bits'}"
        config = CheckpointConfig(policy="consecutive", bits=bits, nbins=25, ratio=0.6, keep=1, expected_restores=4)  # type: ignore[arg-type]
        writers[name] = DiffCheckpointer(folder / f"ck-{bits}", model, optimizer, config=config)
        writers[name].save(now=True)

    def full_state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    taken: dict[str, list[float]] = {name: [] for name in ("torch.save", "dcp.async_save", *writers)}
    written: dict[str, list[float]] = {name: [] for name in taken}
    flat = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, entries in optimizer.sparse.state_dict()["state"].items():
        flat |= {f"sum.{number}": entries["sum"]}
    for turn in range(repeats + 1):
        for name in taken:
            began = time.perf_counter()
            if name == "torch.save":
                path = folder / "whole.pt"
                synced_save(full_state(), path)
                stall, size = time.perf_counter() - began, path.stat().st_size
            elif name == "dcp.async_save":
                target = folder / f"dcp-{turn}"
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    future = dcp.async_save(
                        flat, storage_writer=FileSystemWriter(target, overwrite=False), no_dist=True
                    )
                stall = time.perf_counter() - began
                future.result()
                size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
                shutil.rmtree(target)
            else:
                writer = writers[name]
                for place, some in enumerate(changed):
                    writer.tracker.last[place].clear()
                    writer.tracker.mark(place, some)
                writer.steps += 1
                began = time.perf_counter()
                writer.save()
                stall = time.perf_counter() - began
                writer.wait()
                size = writer.history[-1].bytes
            if turn:
                taken[name].append(stall)
                written[name].append(size)
    base = Measurement.of(taken["torch.save"])
    for name, seconds in taken.items():
        stall = Measurement.of(seconds)
        report.add("stall", 1e3 * stall.median, subject=name, se=1e3 * stall.spread, n=stall.n, unit="ms")
        ratio = paired_ratio(stall, base)
        report.add("of_torch_save", ratio.median, subject=name, se=ratio.spread, n=ratio.n, unit="x")
        report.add("written", Measurement.of(written[name]).median / 1e6, subject=name, unit="MB")
    for name, writer in writers.items():
        last = writer.history[1:]
        report.add(
            "behind", 1e3 * Measurement.of([s.seconds for s in last]).median, subject=name, n=len(last), unit="ms"
        )
        writer.close()
    add_restores(report, model, optimizer, rows, folder, repeats)


def add_restores(report: Report, model: DLRM, optimizer: Any, rows: int, folder: Path, repeats: int) -> None:
    other, its = make(rows)

    def load() -> None:
        found = torch.load(folder / "whole.pt", weights_only=True)
        other.load_state_dict(found["model"])
        its.load_state_dict(found["optimizer"])

    cases = {
        "torch.load": load,
        "check-n-run, float": lambda: restore(folder / "ck-none", other, its),
        "check-n-run, 4 bits": lambda: restore(folder / "ck-4", other, its),
    }
    for name, seconds in alternate(cases, repeats=repeats, warmup=1).items():
        report.add("restore", 1e3 * seconds.median, subject=name, se=1e3 * seconds.spread, n=seconds.n, unit="ms")


def add_tracking(report: Report, rows: int, repeats: int) -> None:
    """The same training step with and without bitmaps, in turn."""
    model, optimizer = make(rows)
    step = stepper(model, optimizer, rows)
    tables = find_tables(model, [optimizer])

    def tracked(steps: int = 5) -> float:
        tracker = Tracker(tables, [optimizer])
        began = time.perf_counter()
        for _ in range(steps):
            step()
        seconds = time.perf_counter() - began
        tracker.close()
        return seconds / steps

    def plain(steps: int = 5) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - began) / steps

    pairs = [(plain(), tracked()) for _ in range(3 * repeats + 1)][1:]
    without, with_ = (Measurement.of(side) for side in zip(*pairs, strict=True))
    overhead = Measurement.of(100 * (b / a - 1) for a, b in pairs)
    report.add("step", 1e3 * without.median, subject="without bitmaps", se=1e3 * without.spread, n=without.n, unit="ms")
    report.add("step", 1e3 * with_.median, subject="with bitmaps", se=1e3 * with_.spread, n=with_.n, unit="ms")
    report.add("overhead", overhead.median, subject="tracking", se=overhead.spread, n=overhead.n, unit="%")
    tracker = Tracker(tables, [optimizer])
    bytes_ = sum(shard.parameter.nbytes for shard in tables)
    report.add("memory", 100 * tracker.nbytes / bytes_, subject="bitmaps of the tables", unit="%")
    tracker.close()


def add_rates(report: Report, repeats: int, folder: Path) -> None:
    """MB/s of float rows: quantised by each method, and written to this disk with fsync."""
    rows = torch.randn(20_000, DIM, generator=torch.Generator().manual_seed(0))
    data = rows.numpy().tobytes()

    def write() -> None:
        with (folder / "raw").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    cases: dict[str, Callable[[], object]] = {"write and fsync": write}
    for bits in (2, 3, 4):
        cases[f"adaptive, {bits} bits"] = lambda b=bits: quantize_rows(rows, b, "greedy", 25, 0.6)  # type: ignore[misc]
    for bits in (4, 8):
        cases[f"minmax, {bits} bits"] = lambda b=bits: quantize_rows(rows, b, "minmax")  # type: ignore[misc]
    for name, seconds in alternate(cases, repeats=repeats, warmup=1).items():
        rate = seconds.map(lambda s: len(data) / 1e6 / s)
        report.add("rate", rate.median, subject=name, se=rate.spread, n=rate.n, unit="MB/s")


def measure(rows: int = 100_000, repeats: int = 7) -> Report:
    report = Report(f"checkpoints of {TABLES} tables of {rows} x {DIM}, {CHANGED:.0%} of the rows changed")
    with tempfile.TemporaryDirectory() as name:
        add_stalls(report, rows, repeats, Path(name))
        add_rates(report, repeats, Path(name))
    add_tracking(report, rows, repeats)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="of each table (default 100000)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="do not write results/check-n-run-stall.csv")
    args = parser.parse_args()
    report = measure(args.rows, args.repeats)
    report.print_table()
    if not args.dry:
        print(save(report, "check-n-run-stall"))


if __name__ == "__main__":
    main()
