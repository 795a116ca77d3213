"""Writing in the background, from copied state to a folder that exists.

Rows are quantised chunk by chunk, and each file is written while the next is quantised; at most one write is in flight.
The work runs in a thread, or in a process of its own (`executor="process"`), which keeps the interpreter's lock out of
the training's way; the thread then only waits for it. Every process writes, the first one commits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from edgewright.errors import EdgewrightError, OutputError
from edgewright.measure.machine import versions
from edgewright.training.checkpoint.capture import Captured, merge_tables, merge_trees
from edgewright.training.checkpoint.chain import (
    catalogue,
    checkpoint_id,
    collect,
    commit,
    discard,
    update_latest,
    working_folder,
)
from edgewright.training.checkpoint.files import Files, output_error
from edgewright.training.checkpoint.manifest import Manifest
from edgewright.training.checkpoint.ranks import Ranks
from edgewright.training.checkpoint.records import Encoding, RowBatch, encode, tuned
from edgewright.training.checkpoint.shards import SUFFIX, write_shard

_CHUNK = 32 << 20  # bytes of rows that become one file
_DENSE = 512 << 20  # bytes of dense tensors in one file, which are in memory twice while it is written


@dataclass
class Job:
    """Everything that one process writes for one checkpoint."""

    folder: str
    rank: int
    tensors: dict[str, Tensor]
    offsets: dict[str, list[int]]
    rows: list[RowBatch]
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
            for dense in (key for key in tensors if key in job.tensors):
                result.dense[dense] = [[name + SUFFIX, job.offsets.get(dense, [0] * job.tensors[dense].ndim)]]
            if flying is not None:
                flying.result()
            flying = pool.submit(write, name, tensors)
        if flying is not None:
            flying.result()
    return result


def _parts(job: Job, result: Written) -> Iterator[tuple[dict[str, Tensor], list[dict[str, Any]]]]:
    """(tensors, records) of every file: dense tensors first, in files of bounded size, then each a chunk of rows."""
    tensors, records, size = dict[str, Tensor](), list[dict[str, Any]](), 0
    for name, tensor in job.tensors.items():
        if tensors and size + tensor.nbytes > _DENSE:
            yield tensors, []
            tensors, size = {}, 0
        tensors[name] = tensor
        size += tensor.nbytes
    size = 0
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


Kind = Literal["full", "diff"]


@dataclass(frozen=True)
class WriteRequest:
    """What the checkpoint is to be. unique: hex digits that all processes agreed on, the first eight end its name.

    encoding: of rows. parent, chain, sizes, restores: see Manifest. base_bytes: of the full checkpoint that this one
    builds upon. stall: seconds that training has stood still for it. keep: how many checkpoints stay. hint: whether the
    file LATEST names it then.
    """

    unique: str
    kind: Kind = "full"
    policy: str = "full"
    encoding: Encoding = Encoding()
    parent: list[str] | None = None
    chain: list[list[str]] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    base_bytes: int = 0
    restores: int = 0
    stall: float = 0.0
    keep: int = 1
    hint: bool = True


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written.

    Args:
        id: ckpt-<step>-<8 hex digits>.
        kind: "full" or "diff".
        step: in the id.
        bits: of its rows; None for float.
        rows: of tables in it.
        raw_rows: of these, rows stored as floats since no code can hold them.
        bytes: of all its files.
        data_bytes: without the manifest.
        ratio: of the data, against the full checkpoint that it builds upon.
        digest: of the manifest.
        stall_seconds: how long training stood still (waiting for the one before included).
        seconds: until the checkpoint existed.
        quantize_seconds: of the processor, all processes together.
        write_seconds: spent writing, all processes together.
    """

    id: str
    kind: Kind
    step: int
    bits: int | None
    rows: int
    raw_rows: int
    bytes: int
    data_bytes: int
    ratio: float
    digest: str
    stall_seconds: float = 0.0
    seconds: float = 0.0
    quantize_seconds: float = 0.0
    write_seconds: float = 0.0


@dataclass(frozen=True)
class CommitResult:
    """The checkpoint exists. late: what went wrong after that (LATEST, or removing old ones)."""

    saved: Saved
    late: BaseException | None


def publish(
    files: Files,
    ranks: Ranks,
    executor: InThread | InProcess,
    request: WriteRequest,
    state: Captured,
    verified: set[str],
) -> CommitResult:
    """Write and commit; then point LATEST to it and delete what is not kept. verified: ids known to be good, added to.

    Every process calls; all raise when one fails, and nothing is left of the checkpoint then. Raises OutputError.
    """
    began = time.perf_counter()
    identity = checkpoint_id(state.step, request.unique)
    folder = working_folder(files, identity, request.unique)
    job = Job(folder, ranks.rank, state.tensors, state.offsets, state.rows, request.encoding)
    error: BaseException | None = None
    written, manifest, digest = Written(), None, ""
    try:
        try:
            written = executor.run(files, job)
        except Exception as caught:
            error = _as_output_error(files, caught)
        ranks.together(error, behind=True)
        parts = ranks.gather((written, state.tree, state.tables), behind=True)
        if ranks.first:
            try:
                manifest = _manifest(files, request, state.step, identity, parts)
                digest = commit(files, folder, manifest)
            except Exception as caught:
                error = _as_output_error(files, caught)
        ranks.together(error, behind=True)
        manifest, digest = ranks.gather((manifest, digest), behind=True)[0]
    except BaseException:
        if ranks.first:
            _give_up(files, folder)
        raise
    assert manifest is not None
    verified.add(identity)
    late = _afterwards(files, request, identity, verified) if ranks.first else None
    saved = Saved(
        id=identity,
        kind=request.kind,
        step=state.step,
        bits=request.encoding.bits,
        rows=manifest.rows,
        raw_rows=manifest.raw_rows,
        bytes=manifest.data_bytes + len(manifest.encode()[0]),
        data_bytes=manifest.data_bytes,
        ratio=1.0 if request.kind == "full" else manifest.data_bytes / max(request.base_bytes, 1),
        digest=digest,
        stall_seconds=request.stall,
        seconds=time.perf_counter() - began,
        quantize_seconds=sum(part.quantize_seconds for part, _, _ in parts),
        write_seconds=sum(part.write_seconds for part, _, _ in parts),
    )
    return CommitResult(saved, late)


def _manifest(files: Files, request: WriteRequest, step: int, identity: str, parts: list[Any]) -> Manifest:
    all_files: dict[str, list[Any]] = {}
    dense: dict[str, list[list[Any]]] = {}
    for written, _, _ in parts:
        all_files |= written.files
        for name, places in written.dense.items():
            dense.setdefault(name, []).extend(places)
    return Manifest(
        id=identity,
        kind=request.kind,
        step=step,
        sequence=max((manifest.sequence for manifest in catalogue(files).found), default=0) + 1,
        parent=None if request.parent is None else request.parent[0],
        chain=request.chain,
        policy=request.policy,
        bits=request.encoding.bits,
        method=request.encoding.method,
        restores=request.restores,
        world=len(parts),
        tables=merge_tables([tables for _, _, tables in parts]),
        records=[record for written, _, _ in parts for record in written.records],
        files=all_files,
        dense=dense,
        state=merge_trees([tree for _, tree, _ in parts]),
        sizes=request.sizes,
        versions={name: text for name, text in versions().items() if name in ("edgewright", "torch", "python")},
        created=int(time.time()),
    )


def _afterwards(files: Files, request: WriteRequest, identity: str, verified: set[str]) -> BaseException | None:
    """What comes once the checkpoint exists; its failure leaves a hint, or old checkpoints, as they were."""
    try:
        if request.hint:
            update_latest(files, identity)
        collect(files, request.keep, verified)
    except OSError as error:
        return output_error(files, error)
    return None


def _as_output_error(files: Files, error: Exception) -> BaseException:
    """What the operating system refused, as a sentence; every other error as it is."""
    return output_error(files, error) if isinstance(error, OSError) else error


def _give_up(files: Files, folder: str) -> None:
    """Remove what a failed write left, as far as the disk lets us."""
    try:
        discard(files, folder)
    except OSError:
        pass
