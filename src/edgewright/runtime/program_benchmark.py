"""Programs (.onnx, .pte) timed in turn: bytes, latency with its spread, inferences per second, peak memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from edgewright.measure.memory import PeakMemory, peak_memory
from edgewright.measure.report import Report
from edgewright.measure.timing import Measurement, alternate
from edgewright.runtime.program import open_program
from edgewright.runtime.program_inputs import stand_in_inputs

PROGRAM_METRICS = ("file_size", "latency", "inferences", "peak_memory")
SAMPLE_SECONDS = 0.05  # a sample repeats a short program until it lasts so long: the clock and the switch cost nothing
MOST_CALLS = 10_000


def add_programs(
    report: Report,
    files: Mapping[str, Path],
    *,
    batch: int,
    length: int,
    repeats: int,
    threads: int,
    seed: int,
    tick: Callable[[str], None] = lambda text: None,
) -> list[float]:
    """Measure every program and add its rows; returns the bytes of Python itself, one a program.

    files: name -> path. Free first axes get `batch`, other free axes `length`. In each of `repeats` rounds (after one
    for warming up) every program runs once, or as often as fills `SAMPLE_SECONDS`; latency is per inference.
    """
    latencies = time_programs(files, batch, length, repeats, threads, seed, tick)
    baselines = []
    for name, path in files.items():
        memory: PeakMemory = peak_memory(_use_program, str(path), threads, batch, length, seed)
        tick(f"{name}: memory")
        latency = latencies[name].map(lambda seconds: seconds * 1e3, "ms")
        rate = latencies[name].map(lambda seconds: batch / seconds, "1/s")
        report.add("file_size", program_bytes(path) / 1e6, subject=name, unit="MB")
        if path.suffix.lower() == ".pte":
            from edgewright.runtime.executorch_program import weights_of

            told = weights_of(path)
            if told is not None:
                report.add("bits_per_weight", told.bits_per_weight, subject=name)
        report.add("latency", latency.median, subject=name, se=latency.spread, n=latency.n, unit="ms")
        report.add("inferences", rate.median, subject=name, se=rate.spread, n=rate.n, unit="1/s")
        report.add("peak_memory", memory.peak / 1e6, subject=name, unit="MB")
        baselines.append(float(memory.baseline))
    return baselines


def time_programs(
    files: Mapping[str, Path],
    batch: int,
    length: int,
    repeats: int,
    threads: int,
    seed: int = 0,
    tick: Callable[[str], None] = lambda text: None,
) -> dict[str, Measurement]:
    """Seconds of one inference of every program; sample i of one was taken beside sample i of every other."""
    with contextlib.ExitStack() as stack:
        cases: dict[str, Callable[[], None]] = {}
        calls: dict[str, int] = {}
        for name, path in files.items():
            program = stack.enter_context(open_program(path, threads))
            inputs = stand_in_inputs(program.inputs, batch=batch, length=length, seed=seed)
            program.run(inputs)  # the first run lays out memory
            start = time.perf_counter()
            program.run(inputs)
            once = max(time.perf_counter() - start, 1e-9)
            calls[name] = max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / once)))

            def sample(name: str, run: Callable[[], object]) -> None:
                for _ in range(calls[name]):
                    run()
                tick(name)

            cases[name] = partial(sample, name, partial(program.run, inputs))
        samples = alternate(cases, repeats=repeats, warmup=1)
    return {name: found.map(lambda x, n=calls[name]: x / n, "s") for name, found in samples.items()}  # type: ignore[misc]


def program_bytes(path: Path) -> int:
    """Bytes of the file and of the external data that our exporter puts beside a large one."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def _use_program(path: str, threads: int, batch: int, length: int, seed: int) -> None:
    with open_program(path, threads, check=False) as program:
        program.run(stand_in_inputs(program.inputs, batch=batch, length=length, seed=seed))
