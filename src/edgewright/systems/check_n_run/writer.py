"""Writing in the background: rows are quantised chunk by chunk, and each file is written while the next is quantised.

At most one write is in flight. The work runs in a thread, or in a process of its own (`executor="process"`), which
keeps the interpreter's lock out of the training's way; the thread then only waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from edgewright.errors import EdgewrightError, OutputError
from edgewright.systems.check_n_run.files import Files
from edgewright.systems.check_n_run.records import Encoding, Rows, encode, tuned
from edgewright.systems.check_n_run.shards import SUFFIX, write_shard

_CHUNK = 32 << 20  # bytes of rows that become one file


@dataclass
class Job:
    """Everything that one process writes for one checkpoint."""

    folder: str
    rank: int
    tensors: dict[str, Tensor]
    offsets: dict[str, list[int]]
    rows: list[Rows]
    encoding: Encoding
    chunk: int = _CHUNK


@dataclass
class Written:
    """What became of a job: entries for the manifest, and seconds spent tuning, quantising and writing."""

    files: dict[str, list[Any]] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    dense: dict[str, list[list[Any]]] = field(default_factory=dict)
    tune_seconds: float = 0.0
    quantize_seconds: float = 0.0
    write_seconds: float = 0.0


Tuned = dict[tuple[int, int], tuple[int, float]]


def run_job(files: Files, job: Job, known: Tuned) -> Written:
    """Quantise and write; every file is on the disk when this returns. known: ranges tuned so far. Raises OSError."""
    result = Written()
    began = time.perf_counter()
    job = replace(job, encoding=tuned(job.encoding, job.rows, known))
    result.tune_seconds = time.perf_counter() - began

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        began = time.perf_counter()
        written = write_shard(files, job.folder, name, tensors)
        result.write_seconds += time.perf_counter() - began
        result.files[name + SUFFIX] = [written.sha256, written.bytes]

    files.mkdir(job.folder)
    parts = _parts(job, result)
    with ThreadPoolExecutor(1, "edgewright-write") as pool:
        flying = None
        for number, (tensors, records) in enumerate(parts):
            name = f"r{job.rank:05d}-{number:05d}"
            for record in records:
                result.records.append({**record, "file": name + SUFFIX})
            if not number:
                for dense in job.tensors:
                    result.dense[dense] = [[name + SUFFIX, job.offsets.get(dense, [0] * job.tensors[dense].ndim)]]
            if flying is not None:
                flying.result()
            flying = pool.submit(write, name, tensors)
        if flying is not None:
            flying.result()
    return result


def _parts(job: Job, result: Written) -> Iterator[tuple[dict[str, Tensor], list[dict[str, Any]]]]:
    """(tensors, records) of every file: the first has the dense tensors, each about a chunk of rows."""
    tensors, records, size = dict(job.tensors), list[dict[str, Any]](), 0
    for rows in job.rows:
        width = max(rows.values[:1].numel(), 1) * rows.values.element_size()
        step = max(job.chunk // width, 1)
        for start in range(0, len(rows), step):
            began = time.perf_counter()
            stored, fields = encode(rows.part(start, min(start + step, len(rows))), len(records), job.encoding)
            result.quantize_seconds += time.perf_counter() - began
            tensors |= stored
            records.append(fields)
            size += min(step, len(rows) - start) * width
            if size >= job.chunk:
                yield tensors, records
                tensors, records, size = {}, [], 0
    if tensors:
        yield tensors, records


class InThread:
    """Jobs run where they are asked for: in the background's thread."""

    def __init__(self) -> None:
        self._known: Tuned = {}

    def run(self, files: Files, job: Job) -> Written:
        return run_job(files, job, self._known)

    def close(self) -> None:
        """Nothing to do."""


class InProcess:
    """Jobs run in one child process, which is started at the first job and again should it die."""

    def __init__(self) -> None:
        self._child: Any = None
        self._pipe: Any = None

    def run(self, files: Files, job: Job) -> Written:
        if self._child is None or not self._child.is_alive():
            self.close()
            context = torch.multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._child = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._child.start()
            theirs.close()
        try:
            self._pipe.send((files, job))
            result = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise OutputError("the process that writes checkpoints died; the next checkpoint starts another") from error
        if isinstance(result, BaseException):
            raise result
        found: Written = result
        return found

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._pipe.close()
            self._child.join(10)
            if self._child.is_alive():
                self._child.kill()
            self._child = self._pipe = None


def _serve(pipe: Any) -> None:
    """The child: jobs in, what became of them out, until the pipe is closed."""
    torch.set_num_threads(1)
    known: Tuned = {}
    while True:
        try:
            files, job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(run_job(files, job, known))
        except (OSError, EdgewrightError) as error:
            pipe.send(error)
        except BaseException as error:  # of a type that may not travel
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
