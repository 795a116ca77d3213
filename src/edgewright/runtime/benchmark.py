"""Size, speed and memory of exported files side by side: runs take turns, memory is taken in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import Unsupported, UsageError
from edgewright.io.gguf.reader import GGUFFile
from edgewright.measure.machine import BandwidthProbe, usable_cores
from edgewright.measure.memory import PeakMemory, peak_memory
from edgewright.measure.progress import ProgressBar
from edgewright.measure.report import Report
from edgewright.measure.size import bits_per_weight, bytes_per_decoded_token
from edgewright.measure.timing import Measurement, alternate
from edgewright.runtime.engine import SUFFIXES, open_engine
from edgewright.runtime.interfaces import Generation
from edgewright.runtime.llamacpp import LlamaCppEngine
from edgewright.runtime.program import PROGRAM_SUFFIXES
from edgewright.runtime.program_benchmark import PROGRAM_METRICS, add_programs

FILE_METRICS = ("file_size", "bits_per_weight", "prefill", "decode", "time_to_first_token", "peak_memory", "roofline")
MACHINE = "this machine"
MEMORY_TOKENS = 16  # decoded in the process that measures memory: the peak is reached at the first


def benchmark_files(
    paths: Sequence[str | Path],
    *,
    prompt_tokens: int = 256,
    decode_tokens: int = 64,
    batch: int = 1,
    length: int = 128,
    repeats: int = 5,
    threads: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Compare exported files.

    Every file is opened, then in each of `repeats` rounds (after one for warming up) every language model computes the
    same random prompt and decodes greedily past any end of text, and the read bandwidth of the machine is taken in
    between; programs take turns likewise.

    Args:
        paths: .gguf, .pte and .onnx files.
        prompt_tokens: of the prompt.
        decode_tokens: that follow.
        batch: rows of a program's inputs.
        length: of a program's inputs where it is free.
        repeats: rounds.
        threads: None uses every core.
        seed: of prompts and inputs.
        progress: show a progress bar.

    Returns:
        One row of each of `FILE_METRICS` a language model and of each of `PROGRAM_METRICS` a program. Values are
        medians over rounds, `se` half the interquartile range. What a file does not tell (bits per weight of an .onnx,
        or of a .pte that was not written here) has no row.

    Raises:
        UsageError: numbers below 1, or no such file.
    """
    files = _subjects(paths)
    if min(prompt_tokens, decode_tokens, repeats) < 1:
        raise UsageError(
            "bench needs at least one prompt token, decoded token and repeat, "
            f"got {prompt_tokens}, {decode_tokens} and {repeats}; e.g. edgewright bench FILE --repeats 5"
        )
    if min(batch, length) < 1:
        raise UsageError(f"bench needs a batch and a length of at least 1, got {batch} and {length}; e.g. --batch 1")
    threads = usable_cores() if threads is None else threads
    languages = {name: path for name, path in files.items() if _is_language(path)}
    programs = {name: path for name, path in files.items() if name not in languages}
    settings: dict[str, Any] = {"files": [str(path) for path in files.values()]}
    if languages:
        settings |= {"prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens}
    if programs:
        settings |= {"batch": batch, "length": length}
    report = Report("bench", {**settings, "repeats": repeats, "threads": threads, "seed": seed})
    rounds = (repeats + 1) * (len(files) + bool(languages))
    with ProgressBar("bench", rounds + len(files), shown=progress) as bar:

        def tick(text: str) -> None:
            bar.advance(1, text)

        if languages:
            _add_languages(report, languages, prompt_tokens, decode_tokens, repeats, threads, seed, tick)
        if programs:
            baselines = add_programs(
                report, programs, batch=batch, length=length, repeats=repeats, threads=threads, seed=seed, tick=tick
            )
    if programs:
        report.notes += [
            f"Programs: one inference of batch {batch}, {length} where a length is free; median latency of {repeats} "
            f"alternating rounds after one of warm-up, ± is half the interquartile range; threads: {threads}.",
            "Peak memory of a program is that of a fresh process that loads it and runs it once; "
            f"Python itself is about {max(baselines) / 1e6:.0f} MB of it.",
        ]
    return report


def report_columns(report: Report) -> list[str]:
    """The metrics of files that a bench report has, in the order of its table."""
    order = ("file_size", *FILE_METRICS[1:5], *PROGRAM_METRICS[1:3], *FILE_METRICS[5:])
    return [metric for metric in order if metric in report.metrics]


def _is_language(path: Path) -> bool:
    """Whether a file is a language model for `open_engine`; a .pte can be either, which only its engine knows."""
    suffix = path.suffix.lower()
    if suffix not in PROGRAM_SUFFIXES:
        return True  # open_engine says what is wrong with the others
    if suffix not in SUFFIXES or not path.is_file():
        return False
    try:
        open_engine(path).close()
    except Unsupported:
        return False
    return True


def _add_languages(
    report: Report,
    files: Mapping[str, Path],
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    threads: int,
    seed: int,
    tick: Callable[[str], None],
) -> None:
    context = prompt_tokens + decode_tokens + 1
    runs, bandwidth, single = _take_turns(files, prompt_tokens, decode_tokens, repeats, threads, context, seed, tick)
    peaks = {}
    for name, path in files.items():
        peaks[name] = peak_memory(_use_file, str(path), context, threads, prompt_tokens, seed)
        tick(f"{name}: memory")
    for name, path in files.items():
        _add_file(report, name, path, runs[name], bandwidth, peaks[name])
    _add(report, f"read bandwidth, threads: {threads}", MACHINE, bandwidth.map(lambda x: x / 1e9), "GB/s")
    if threads != 1:
        _add(report, "read bandwidth, threads: 1", MACHINE, single.map(lambda x: x / 1e9), "GB/s")
    baseline = max(peak.baseline for peak in peaks.values()) / 1e6
    report.notes += [
        f"Median of {repeats} alternating rounds after one of warm-up; ± is half the interquartile range, not a "
        f"standard error. {prompt_tokens} prompt tokens, {decode_tokens} decoded, threads: {threads}.",
        f"Bandwidth limit: this machine reads {bandwidth.median / 1e9:.1f} GB/s with as many threads; the share is the "
        "bytes of weights read per decoded token (all of them, but one row of a token embedding that is not also the "
        "head) times decode speed, over that. Weights that fit a cache can exceed 100 %.",
        "Peak memory is that of a fresh process that loads the file and writes with it, mapped weights included; "
        f"Python itself is about {baseline:.0f} MB of it.",
    ]


def _take_turns(
    files: Mapping[str, Path],
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    threads: int,
    context: int,
    seed: int,
    tick: Callable[[str], None],
) -> tuple[dict[str, list[Generation]], Measurement, Measurement]:
    """Per file its generations, the read bandwidth taken between them, and that of one thread; warm-up left out."""
    runs: dict[str, list[Generation]] = {name: [] for name in files}
    bandwidths: list[float] = []
    cases: dict[str, Callable[[], object]] = {}
    with contextlib.ExitStack() as stack:
        # engines before the probe: OpenMP takes its settings from the library that starts it first
        engines = {
            name: stack.enter_context(open_engine(path, threads=threads, context=context))
            for name, path in files.items()
        }
        probe = BandwidthProbe(threads)

        def run(name: str, ids: list[int]) -> None:
            # one more than decode_tokens: the first new token comes from the prompt's own logits
            runs[name].append(engines[name].generate(ids, decode_tokens + 1, ignore_end=True))
            tick(name)

        def read() -> None:
            bandwidths.append(probe.sample())
            tick("read bandwidth")

        for name, engine in engines.items():
            cases[name] = partial(run, name, _random_prompt(engine, prompt_tokens, seed))
        alternate({**cases, MACHINE: read}, repeats=repeats, warmup=1)
        probe.threads = 1  # the same buffer: its shares divide by fewer threads too
        single = Measurement.of((probe.sample() for _ in range(repeats)), "B/s")
    return {name: rows[1:] for name, rows in runs.items()}, Measurement.of(bandwidths[1:], "B/s"), single


def _add_file(
    report: Report, name: str, path: Path, runs: list[Generation], bandwidth: Measurement, memory: PeakMemory
) -> None:
    decode = Measurement.of(run.decode_tokens_per_second for run in runs)
    size, bits, read_bytes = _weights(path)
    report.add("file_size", size / 1e6, subject=name, unit="MB")
    if bits is not None:
        report.add("bits_per_weight", bits, subject=name)
    _add(report, "prefill", name, Measurement.of(run.prefill_tokens_per_second for run in runs), "tok/s")
    _add(report, "decode", name, decode, "tok/s")
    _add(report, "time_to_first_token", name, Measurement.of(run.time_to_first_token * 1e3 for run in runs), "ms")
    report.add("peak_memory", memory.peak / 1e6, subject=name, unit="MB")
    if read_bytes is not None:
        pairs = zip(decode.samples, bandwidth.samples, strict=True)
        _add(report, "roofline", name, Measurement.of(100 * rate * read_bytes / limit for rate, limit in pairs), "%")


def _weights(path: Path) -> tuple[int, float | None, int | None]:
    """(bytes of all its files, bits per weight, bytes of weights read for a decoded token) of a language model."""
    if path.suffix.lower() == ".gguf":
        gguf = GGUFFile(path)
        return gguf.size, bits_per_weight(gguf), bytes_per_decoded_token(gguf)
    from edgewright.runtime.executorch_program import weights_of

    told = weights_of(path)
    size = path.stat().st_size
    return (size, None, None) if told is None else (size, told.bits_per_weight, told.token_bytes)


def _use_file(path: str, context: int, threads: int, prompt_tokens: int, seed: int) -> None:
    with open_engine(path, context=context, threads=threads, check=False) as engine:  # the parent ran it already
        engine.generate(_random_prompt(engine, prompt_tokens, seed), MEMORY_TOKENS, ignore_end=True)


def _random_prompt(engine: Any, count: int, seed: int) -> list[int]:
    """Seeded random ids of plain tokens; speed does not depend on which, and control marks are left out."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < count:
        drawn = rng.integers(0, engine.vocabulary, 2 * count).tolist()
        plain = [i for i in drawn if not _is_mark(engine, i)]
        ids += plain or drawn  # a vocabulary of marks only is odd, but no reason to search for ever
    return ids[:count]


def _is_mark(engine: Any, token: int) -> bool:
    return isinstance(engine, LlamaCppEngine) and (engine.is_control(token) or engine.is_end(token))


def _subjects(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Name -> path; the file's name, or its whole path where two files have the same name."""
    files = [Path(p) for p in paths]
    if not files:
        raise UsageError("bench needs at least one file, e.g. edgewright bench out/model.gguf")
    names = [file.name for file in files]
    subjects = {(str(f) if names.count(f.name) > 1 else f.name): f for f in files}
    if len(subjects) < len(files):
        raise UsageError(f"bench got the same file twice: {', '.join(map(str, files))}")
    return subjects


def _add(report: Report, metric: str, subject: str, value: Measurement, unit: str) -> None:
    report.add(metric, value.median, subject=subject, se=value.spread, n=value.n, unit=unit)
