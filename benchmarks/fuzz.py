"""Damaged files for every reader: what comes back is a result or an error of `edgewright.errors`, soon and in memory.

python benchmarks/fuzz.py --count 20000              all readers and a table; exit code 1 where a rule was broken
python benchmarks/fuzz.py --reader gguf --seed 3     one reader
python benchmarks/fuzz.py --input "gguf:17" --keep F one input again, kept in the folder F, with its traceback

Rules: no other exception, no dead process, at most 20 s of processor time, at most 2 GB more than before, nothing
written outside the input's own folder, no unpickler but torch's restricted one. The inputs depend on the seed and their
number alone.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fuzz_mutations import CODE_RAN, damage
from tests.fuzz_readers import READERS
from tests.pickle_guard import guard

MOST_SECONDS, MOST_BYTES = 20.0, 2 << 30  # of processor time, which other work on the machine does not lengthen
HANGS = 5 * MOST_SECONDS  # by the clock
WRITES = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "shutil.rmtree",
)

# The beginnings of `Outcome.problem`, by the column of the table.
KINDS = {
    "untyped": ("untyped",),
    "died": ("the process died",),
    "over_2gb": ("over 2 GB",),
    "over_20s": ("over 20 s",),
    "wrote_outside": ("wrote",),
    "opened_pickle": ("opened a pickle",),
    "ran_code": ("code from",),
    "no_sentence": ("not one sentence",),
}


@dataclass
class Outcome:
    """Of one input. problem: which rule it broke, or ""; detail: the last frames; error: the type that was raised."""

    reader: str
    number: int
    problem: str = ""
    detail: str = ""
    error: str = ""
    seconds: float = 0.0


@dataclass
class Tally:
    """Of all inputs."""

    inputs: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    broken: list[Outcome] = field(default_factory=list)
    slowest: float = 0.0
    longest: dict[str, float] = field(default_factory=dict)
    weights_only: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.inputs[outcome.reader] += 1
        self.refused[outcome.reader] += bool(outcome.error)
        self.slowest = max(self.slowest, outcome.seconds)
        self.longest[outcome.reader] = max(self.longest.get(outcome.reader, 0.0), outcome.seconds)
        if outcome.problem:
            self.broken.append(outcome)

    def text(self) -> str:
        lines = [f"{'reader':<28}{'inputs':>8}{'refused':>9}{'broken':>8}"]
        for reader, count in sorted(self.inputs.items()):
            broken = sum(outcome.reader == reader for outcome in self.broken)
            lines.append(f"{reader:<28}{count:>8}{self.refused[reader]:>9}{broken:>8}")
        total, refused = sum(self.inputs.values()), sum(self.refused.values())
        lines.append(f"{'all':<28}{total:>8}{refused:>9}{len(self.broken):>8}   slowest {self.slowest:.1f} s")
        return "\n".join(lines)

    def write(self, path: Path, seed: int) -> None:
        """A row a reader: inputs tried, refused with an error of ours, and how many broke each rule."""
        from edgewright.io.atomic import write_text

        lines = ["reader,inputs,refused," + ",".join(KINDS) + ",slowest_s,seed"]
        for reader in (*sorted(self.inputs), "all"):
            rows = [one for one in self.broken if reader in (one.reader, "all")]
            inputs, refused = (sum(c.values()) if reader == "all" else c[reader] for c in (self.inputs, self.refused))
            counts = [sum(one.problem.startswith(marks) for one in rows) for marks in KINDS.values()]
            slowest = self.slowest if reader == "all" else self.longest[reader]
            lines.append(",".join(map(str, (reader, inputs, refused, *counts, f"{slowest:.1f}", seed))))
        write_text(path, "\n".join(lines) + "\n")


def order(readers: list[str], seed: int) -> Iterator[tuple[str, int]]:
    """(reader, number of the input) without an end, each reader as often as its weight says."""
    numbers = Counter[str]()
    for turn in itertools.count():
        for reader in readers:
            for _ in range(READERS[reader].weight if turn % READERS[reader].every == 0 else 0):
                yield reader, numbers[reader]
                numbers[reader] += 1


def make_input(base: Path, reader: str, number: int, seed: int, folder: Path) -> str:
    """A damaged copy of a reader's valid input in `folder`; what was done to it."""
    chance = random.Random(f"{seed} {reader} {number}")
    shutil.copytree(base / reader, folder, symlinks=True)
    chosen = READERS[reader]
    files = sorted({f for pattern in chosen.targets for f in folder.rglob(pattern) if f.is_file()})
    done = [damage(file, chance) for file in chance.sample(files, min(len(files), chance.choice((1, 1, 1, 2))))]
    if chosen.seal is not None and chance.random() < 0.7:
        try:
            chosen.seal(folder)
            done.append("sealed again")
        except Exception:  # what cannot be sealed stays as it is
            pass
    return "; ".join(done)


def run(
    count: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    readers: list[str] | None = None,
    say: Any = None,
    jobs: int = 1,
) -> Tally:
    """Try inputs, `jobs` at a time, until so many were tried, or so much time is over."""
    tally, began = Tally(), time.monotonic()
    chosen = readers or list(READERS)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as text:
        work = Path(text)
        (work / "scratch").mkdir()
        os.environ |= {"TMPDIR": str(work / "scratch"), "HF_HOME": str(work / "scratch"), "HF_HUB_OFFLINE": "1"}
        tempfile.tempdir = None
        tally.weights_only = _build(work / "base", chosen)
        tasks = itertools.islice(order(chosen, seed), count)
        workers = [_Worker(work / str(number), work, seed) for number in range(jobs)]
        try:
            busy: dict[_Worker, None] = {}
            for reader, number in tasks:
                if seconds is not None and time.monotonic() - began > seconds:
                    break
                worker = next(worker for worker in workers if worker not in busy)
                worker.send(reader, number)
                busy[worker] = None
                while len(busy) == jobs:
                    _collect(busy, tally, say)
            while busy:
                _collect(busy, tally, say)
        finally:
            for worker in workers:
                worker.close()
    return tally


def _collect(busy: dict[_Worker, None], tally: Tally, say: Any) -> None:
    """Take what workers are done with, of those that are at work; wait for one of them."""
    multiprocessing.connection.wait([worker.pipe for worker in busy], 1.0)
    for worker in list(busy):
        outcome = worker.answer()
        if outcome is None:
            continue
        del busy[worker]
        tally.add(outcome)
        if outcome.problem and say is not None:
            say(f"{outcome.reader}:{outcome.number} {outcome.problem}\n{outcome.detail}")


def _build(base: Path, readers: list[str]) -> list[str]:
    """Make and read every valid input; the readers that gave a file to torch's weights-only reader."""
    weights_only = []
    for reader in readers:
        folder = base / reader
        folder.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[reader].build(folder)
            copy = folder.parent / "valid copy"
            shutil.copytree(folder, copy)
            with guard() as seen:
                READERS[reader].read(copy)  # the undamaged one is read
            assert not seen.violations and seen.unpickled == len(seen.files), (reader, seen)
            shutil.rmtree(copy)
        if seen.files:
            weights_only.append(reader)
    return weights_only


class _Worker:
    """A process that reads one input after the other; another one starts where it died or hung."""

    def __init__(self, place: Path, work: Path, seed: int) -> None:
        self.place, self.work, self.seed = place, work, seed
        place.mkdir()
        self.context = multiprocessing.get_context("fork")
        self.process: Any = None

    def send(self, reader: str, number: int) -> None:
        if self.process is None:
            self.pipe, theirs = self.context.Pipe()
            self.process = self.context.Process(
                target=_serve, args=(theirs, self.pipe, self.place, self.work, self.seed), daemon=False
            )
            self.process.start()
            theirs.close()
        self.began, self.task = time.monotonic(), (reader, number)
        self.pipe.send(self.task)

    def answer(self) -> Outcome | None:
        """What came of the input, or None while it is at work."""
        reader, number = self.task
        taken = time.monotonic() - self.began
        try:
            if self.pipe.poll():
                return self.pipe.recv()
            if taken < HANGS:
                return None
            outcome = Outcome(
                reader, number, f"over {MOST_SECONDS:g} s: not done after {HANGS:g} s", "it was ended", "", taken
            )
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            code = self.process.exitcode
            name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            outcome = Outcome(reader, number, f"the process died ({name})", self._said(), "", taken)
        self.close()
        return outcome

    def _said(self) -> str:
        path = self.place / "said"
        return path.read_bytes()[-1500:].decode("utf-8", "replace") if path.exists() else ""

    def close(self) -> None:
        if self.process is not None:
            if self.process.is_alive():
                self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


def _serve(pipe: Any, others: Any, place: Path, work: Path, seed: int) -> None:
    others.close()
    sys.dont_write_bytecode = True
    said = open(place / "said", "wb")  # noqa: SIM115  (what native code prints before it dies)
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    faulthandler.enable(said)
    warnings.simplefilter("ignore")
    written: list[str] = []
    allowed = (str(work / "scratch"), "/dev/null", "/proc/self")
    inside = [""]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES or not inside[0]:
            return
        if event == "open":
            mode, flags = arguments[1], arguments[2] if len(arguments) > 2 else 0
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
            if not writes:
                return
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike) or not os.path.isabs(path):
            return  # a descriptor, or relative to one: its folder was opened under our eyes
        if not str(path).startswith((inside[0], *allowed)):
            written.append(f"{event} {path}")

    sys.addaudithook(watch)
    while True:
        try:
            reader, number = pipe.recv()
        except EOFError:
            os._exit(0)
        case = place / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        made = make_input(work / "base", reader, number, seed, case / "input")
        written.clear()
        inside[0] = str(case)
        before = _reset_peak()
        began = _processor_time()
        outcome = Outcome(reader, number)
        with guard() as seen:
            try:
                READERS[reader].read(case / "input")
            except BaseException as error:
                _judge(outcome, error)
        inside[0] = ""
        outcome.seconds = _processor_time() - began
        if not outcome.problem:
            more = _peak() - before
            if more > MOST_BYTES:
                outcome.problem = f"over 2 GB: {more >> 20} MiB"
            elif outcome.seconds > MOST_SECONDS:
                outcome.problem = f"over {MOST_SECONDS:g} s: {outcome.seconds:.0f} s"
            elif seen.violations:
                outcome.problem = f"opened a pickle: {seen.violations[0]}"
            elif written:
                outcome.problem = f"wrote outside: {written[0]}"
            elif (work / "scratch" / CODE_RAN).exists():
                outcome.problem = "code from the file ran"
            elif [p.name for p in case.iterdir()] != ["input"]:
                outcome.problem = "wrote beside its folder"
        if outcome.problem:
            outcome.detail = f"  [{made}]\n{outcome.detail}"
        pipe.send(outcome)


def _judge(outcome: Outcome, error: BaseException) -> None:
    from edgewright.errors import EdgewrightError

    outcome.error = type(error).__name__
    if isinstance(error, EdgewrightError):
        text = str(error)
        if not text.strip() or "\n" in text.strip() or len(text) > 4000:
            outcome.problem = f"not one sentence, {outcome.error} of {len(text)} characters: {text[:300]!r}"
        return
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    outcome.problem = f"untyped {outcome.error}: {str(error)[:200]!r}"
    outcome.detail = f"  {where}"


def _processor_time() -> float:
    """Seconds that this process and the children that it has waited for were running."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _reset_peak() -> int:
    """Make the peak of this process's memory the present use; bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return _peak()


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, help="inputs (default 20000)")
    parser.add_argument("--seconds", type=float, help="stop after so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", choices=list(READERS), help="only this one; may be repeated")
    parser.add_argument("--input", help="READER:NUMBER, run here with its traceback")
    parser.add_argument("--keep", help="with --input: an empty folder for the input")
    parser.add_argument("--jobs", type=int, default=1, help="inputs that are read at a time")
    parser.add_argument("--table", help="write the counts into this CSV file")
    args = parser.parse_args()
    torch_threads()
    if args.input:
        reader, _, number = args.input.rpartition(":")
        with tempfile.TemporaryDirectory() as text:
            _build(Path(text) / "base", [reader])
            folder = Path(args.keep or Path(text) / "case") / "input"
            print(make_input(Path(text) / "base", reader, int(number), args.seed, folder))
            READERS[reader].read(folder)
        return 0
    count = args.count if args.count or args.seconds else 20_000
    tally = run(count, args.seconds, args.seed, args.reader, lambda text: print(text, flush=True), args.jobs)
    print(f"read by torch's weights-only reader: {', '.join(tally.weights_only) or 'none'}")
    print(tally.text())
    if args.table:
        tally.write(Path(args.table), args.seed)
    return 1 if tally.broken else 0


def torch_threads() -> None:
    import torch

    torch.set_num_threads(1)  # a process that forks must have no other threads


if __name__ == "__main__":
    sys.exit(main())
