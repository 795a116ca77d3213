"""Killing a command at its renames and at random times: the same command, run again, must leave the same files.

Two runs that nothing disturbs tell which files promise equal bytes; the others (times in a report) must exist.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RENAMES = ("replace", "rename", "link")


@dataclass(frozen=True)
class Job:
    """arguments: of `edgewright`, with OUT for the output. prepare: puts into a fresh folder what the job reads."""

    name: str
    arguments: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None


@dataclass
class Outcome:
    """kills: how many runs were killed and finished afterwards. faults: one sentence for each that was not right."""

    job: str
    kills: int = 0
    equal_files: int = 0
    other_files: int = 0
    faults: list[str] = field(default_factory=list)


def kill_everywhere(job: Job, folder: Path, *, renames: int | None = None, times: int = 0, seed: int = 0) -> Outcome:
    """Kill `job` before and after renames (all, or those numbers) and at random times; finish; compare.

    Args:
        job: what is run.
        folder: an empty folder for all of it.
        renames: how many kill points to try, spread evenly; None: all. A rename has one before and one behind it.
        times: how many random times to try.
        seed: of the random times.

    Returns:
        What was compared, and every fault.
    """
    source = folder / "source"
    source.mkdir(parents=True)
    job.prepare(source)
    began = time.monotonic()
    code, count = _run(job, source, folder / "first")
    seconds = time.monotonic() - began
    outcome = Outcome(job.name)
    if code:
        outcome.faults.append(f"an undisturbed run ended with {code}: {_log(folder / 'first')}")
        return outcome
    _run(job, source, folder / "second")
    first, second = _digests(folder / "first"), _digests(folder / "second")
    promised = {name: digest for name, digest in first.items() if second.get(name) == digest}
    outcome.equal_files, outcome.other_files = len(promised), len(first) - len(promised)
    generator = random.Random(seed)
    tried = 2 * count if renames is None else renames
    points: list[dict[str, Any]] = [{"at": (2 * number + 1) * count // tried} for number in range(tried)]
    points += [{"after": generator.uniform(0.02, 1.0) * seconds} for _ in range(times)]
    for number, point in enumerate(points):
        where = f"{job.name}, killed at {point}"
        out = folder / f"killed-{number}"
        code, _ = _run(job, source, out, **point)
        if code == 0:
            shutil.rmtree(out)
            continue  # it had ended before
        outcome.kills += 1
        code, _ = _run(job, source, out)
        faults = list(_differences(_digests(out), first, promised))
        if code and faults:  # a job that was killed behind its last rename may refuse the finished folder
            faults = [f"the next run ended with {code}: {_log(out)}"]
        outcome.faults += [f"{where}: {fault}" for fault in faults]
        shutil.rmtree(out, ignore_errors=True)
    return outcome


def _differences(found: dict[str, str], first: dict[str, str], promised: dict[str, str]) -> Iterator[str]:
    for name in sorted(first.keys() - found.keys()):
        yield f"{name} is missing"
    for name in sorted(found.keys() - first.keys()):
        yield f"{name} was left behind"
    for name in sorted(promised.keys() & found.keys()):
        if found[name] != promised[name]:
            yield f"{name} has other bytes"


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted((folder / "out").rglob("*")) if path.is_file())
    return {
        path.relative_to(folder / "out").as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files
    }


def _log(folder: Path) -> str:
    return (folder / "log.txt").read_text("utf-8", "replace").strip()[-300:]


def _run(job: Job, source: Path, folder: Path, at: int | None = None, after: float | None = None) -> tuple[int, int]:
    """(exit status, renames counted) of the job in a forked process, killed before or behind a rename, or at a time."""
    folder.mkdir(exist_ok=True)
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(job, source, folder, at, after, write)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        count = len(pipe.read())
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), count


def _child(job: Job, source: Path, folder: Path, at: int | None, after: float | None, pipe: int) -> None:
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    done = [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def rename(*args: Any, **kwargs: Any) -> Any:
            if at == 2 * done[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if at == 2 * done[0] + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            done[0] += 1
            os.write(pipe, b".")
            return result

        return rename

    code = 70
    try:
        for name in RENAMES:
            setattr(os, name, counted(getattr(os, name)))
        if after is not None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, after)  # its default action ends the process as SIGKILL would
        from edgewright import cli

        os.chdir(source)
        code = cli.main([argument.replace("OUT", str(folder / "out")) for argument in job.arguments])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
