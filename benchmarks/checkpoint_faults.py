"""Ten thousand crashes: what a restore finds after each of them, counted.

A training saves checkpoints onto a disk in memory (`checkpointing.faults`), every operation is recorded. Then, for
every operation and many draws, the power fails there: what had no fsync is lost, cut short, torn or reordered. Further
faults are flipped bytes, shortened and missing files in what lies there, operations that the disk refuses, and child
processes that are killed (SIGKILL) on a real disk. A state is unreadable when a restore gives neither the state before
nor the new one, or fails though a checkpoint had been finished.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgewright.errors import EdgewrightError, OutputError
from edgewright.measure.report import Report
from edgewright.systems.check_n_run import CheckpointConfig, DiffCheckpointer, restore
from results import ROOT, save

sys.path.insert(0, str(ROOT))

from tests.systems.check_n_run.faults import MemoryFiles, Operation, crashed
from tests.systems.check_n_run.toy import Run, same

POLICIES = ("full", "one-shot", "consecutive", "intermittent")
SAVES = 4


def config(policy: Any, keep: int = 1) -> CheckpointConfig:
    return CheckpointConfig(policy=policy, bits="none", keep=keep)


def train(files: Any, policy: str, keep: int = 1, tell: Callable[[int], None] = lambda n: None) -> list[dict[str, Any]]:
    """The states that were saved, one after the other."""
    run = Run()
    torch.manual_seed(0)
    checkpointer = DiffCheckpointer(files, run.model, run.optimizers, reader=run.reader, config=config(policy, keep))
    states = []
    for number in range(SAVES):
        run.step()
        states.append(run.state())
        checkpointer.steps += 1
        checkpointer.save(now=True)
        tell(number)
    checkpointer.close()
    return states


def found(files: Any, states: list[dict[str, Any]]) -> int:
    """Number of the state that a restore gives; -1: it says that there is none; -2: neither one of them."""
    with torch.random.fork_rng(devices=[]):
        run = Run(seed=5)
        try:
            restore(files, run.model, run.optimizers, run.reader)
        except EdgewrightError:
            return -1
        state = run.state()
    return next((number for number, one in enumerate(states) if same(one, state)), -2)


def power_failures(count: int, draw: random.Random) -> Counter[str]:
    """Crashes of `count` recorded runs' worth, spread over policies and operations."""
    tally: Counter[str] = Counter()
    runs = []
    for policy in POLICIES:
        disk, ends = MemoryFiles(), list[int]()
        states = train(disk, policy, 1, lambda _, d=disk, e=ends: e.append(len(d.log)))  # type: ignore[misc]
        runs.append((disk.log, states, ends))
    while tally["faults"] < count:
        for log, states, ends in runs:
            for at in range(len(log) + 1):
                done = sum(end <= at for end in ends) - 1
                state = found(crashed(log, at, draw, torn=draw.random() < 0.9), states)
                tally["faults"] += 1
                tally["unreadable"] += state not in (done, done + 1)
                tally["new state"] += state == done + 1
    return tally


def damages(count: int, draw: random.Random) -> Counter[str]:
    """The newest checkpoint's files are flipped, cut, removed or emptied: the one before must come back."""
    tally: Counter[str] = Counter()
    for number in range(count):
        if number % 100 == 0:
            disk = MemoryFiles()
            states = train(disk, POLICIES[number // 100 % 3], 2)
            good = {path: bytes(file.data) for path, file in disk.files.items()}
            names = {folder: set(held) for folder, held in disk.folders.items()}
            newest = disk.open("LATEST").read().decode().strip()
        for path, data in good.items():
            disk.files[path].data[:] = data
        disk.folders = {folder: set(held) for folder, held in names.items()}
        path = draw.choice([f"{newest}/{name}" for name in names[newest]])
        data, how = disk.files[path].data, draw.randrange(4)
        if how == 0:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif how == 1:
            del data[draw.randrange(len(data)) :]
        elif how == 2:
            disk.folders[newest].discard(path.rpartition("/")[2])
            kept = disk.files.pop(path)
        else:
            start = draw.randrange(len(data))
            data[start : start + 64] = draw.randbytes(len(data[start : start + 64]))
        state = found(disk, states)
        if how == 2:
            disk.files[path] = kept
        tally["faults"] += 1
        tally["unreadable"] += state not in (SAVES - 2, SAVES - 1)  # random bytes may be those that were there
    return tally


def refusing(disk: MemoryFiles, at: int, code: int, failed: list[Operation]) -> Callable[[Operation], None]:
    """The first operation from number `at` on fails."""

    def before(operation: Operation) -> None:
        if not failed and len(disk.log) >= at:
            failed.append(operation)
            raise OSError(code, os.strerror(code))

    return before


def refusals(count: int, draw: random.Random) -> Counter[str]:
    """One operation fails with ENOSPC or EIO: a checkpoint can be restored then, and the last save has everything."""
    tally: Counter[str] = Counter()
    while tally["faults"] < count:
        policy = draw.choice(POLICIES)
        disk, failed = MemoryFiles(), list[Operation]()
        disk.before = refusing(disk, draw.randrange(60), draw.choice((errno.ENOSPC, errno.EIO)), failed)
        run, states, last = Run(), [], -1
        torch.manual_seed(0)
        checkpointer = DiffCheckpointer(disk, run.model, run.optimizers, reader=run.reader, config=config(policy))
        for number in range(SAVES):
            run.step()
            states.append(run.state())
            checkpointer.steps += 1
            try:
                checkpointer.save(now=True)
                last = number
            except OutputError:
                tally["unreadable"] += found(disk, states) not in (number - 1, number)
        tally["faults"] += len(failed)
        tally["unreadable"] += found(disk, states) < last
    return tally


def kills(count: int, draw: random.Random) -> Counter[str]:
    """Child processes on a real disk, killed at a random time."""
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        states = train(Path(folder, "whole"), "full")
        whole = time.perf_counter() - began
        for number in range(count):
            root = Path(folder, str(number))
            root.mkdir()
            child = os.fork()
            if not child:
                torch.set_num_threads(1)
                try:
                    train(root, POLICIES[number % 4], 1, lambda n, root=root: (root / f"done-{n}").touch())  # type: ignore[misc]
                finally:
                    os._exit(0)
            time.sleep(draw.uniform(0.0, whole))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done = max((n for n in range(SAVES) if (root / f"done-{n}").exists()), default=-1)
            state = found(root, states)
            tally["faults"] += 1
            tally["unreadable"] += state not in (done, done + 1)
    return tally


def measure(power: int, damage: int, refused: int, killed: int, seed: int = 0) -> Report:
    """The tally of every kind of fault."""
    report = Report("faults injected into checkpoints")
    total: Counter[str] = Counter()
    draw = random.Random(seed)
    cases = {
        "power failures": (power_failures, power), "damaged files": (damages, damage),
        "refused operations": (refusals, refused), "killed processes": (kills, killed),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for name, (inject, count) in cases.items():
            tally = inject(count, draw)
            total += tally
            for metric in ("faults", "unreadable"):
                report.add(metric, tally[metric], subject=name)
            print(f"{name}: {dict(tally)}", flush=True)
    for metric in ("faults", "unreadable"):
        report.add(metric, total[metric], subject="all")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--power", type=int, default=9000)
    parser.add_argument("--damage", type=int, default=1500)
    parser.add_argument("--refused", type=int, default=200)
    parser.add_argument("--killed", type=int, default=100)
    parser.add_argument("--dry", action="store_true", help="do not write results/check-n-run-faults.csv")
    args = parser.parse_args()
    report = measure(args.power, args.damage, args.refused, args.killed)
    report.print_table()
    if not args.dry:
        print(save(report, "check-n-run-faults"))


if __name__ == "__main__":
    main()
