"""One checkpoint from copied state to a folder that exists: every process writes, the first one commits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from edgewright.measure.machine import versions
from edgewright.systems.check_n_run import commit
from edgewright.systems.check_n_run.chain import catalogue
from edgewright.systems.check_n_run.config import CheckpointConfig, Kind, Saved
from edgewright.systems.check_n_run.files import Files, output_error
from edgewright.systems.check_n_run.keeping import collect
from edgewright.systems.check_n_run.manifest import Manifest
from edgewright.systems.check_n_run.ranks import Ranks
from edgewright.systems.check_n_run.records import Encoding
from edgewright.systems.check_n_run.state import Captured, merge_tables, merge_trees
from edgewright.systems.check_n_run.writer import InProcess, InThread, Job, Written


@dataclass(frozen=True)
class Order:
    """What the checkpoint is to be. unique: 32 hex digits that all processes agreed on; chain, sizes: see Manifest."""

    kind: Kind
    unique: str
    bits: int | None
    parent: list[str] | None
    chain: list[list[str]]
    sizes: list[float]
    base_bytes: int
    restores: int
    stall: float


@dataclass(frozen=True)
class Published:
    """The checkpoint exists. late: what went wrong after that (LATEST, or removing old ones)."""

    saved: Saved
    late: BaseException | None


def publish(
    files: Files,
    ranks: Ranks,
    executor: InThread | InProcess,
    config: CheckpointConfig,
    order: Order,
    state: Captured,
    proved: set[str],
) -> Published:
    """Write and commit; then point LATEST to it and delete what is not kept. proved: ids known to be good, added to.

    Every process calls; all raise when one fails, and nothing is left of the checkpoint then. Raises OutputError.
    """
    began = time.perf_counter()
    identity = commit.checkpoint_id(state.step, order.unique)
    folder = commit.working_folder(files, identity, order.unique)
    state_bits = 8 if config.optimizer_bits == 8 else None
    encoding = Encoding(order.bits, config.method, config.nbins, config.ratio, state_bits, config.seed)
    job = Job(folder, ranks.rank, state.tensors, state.offsets, state.rows, encoding)
    error: BaseException | None = None
    written, manifest, digest = Written(), None, ""
    try:
        try:
            written = executor.run(files, job)
        except Exception as caught:
            error = _spoken(files, caught)
        ranks.together(error, behind=True)
        parts = ranks.gather((written, state.tree, state.tables), behind=True)
        if ranks.first:
            try:
                manifest = _manifest(files, config, order, state.step, identity, parts)
                digest = commit.commit(files, folder, manifest)
            except Exception as caught:
                error = _spoken(files, caught)
        ranks.together(error, behind=True)
        manifest, digest = ranks.gather((manifest, digest), behind=True)[0]
    except BaseException:
        if ranks.first:
            _give_up(files, folder)
        raise
    assert manifest is not None
    proved.add(identity)
    late = _afterwards(files, config, identity, proved) if ranks.first else None
    saved = Saved(
        id=identity,
        kind=order.kind,
        step=state.step,
        bits=order.bits,
        rows=manifest.rows,
        raw_rows=manifest.raw_rows,
        bytes=manifest.data_bytes + len(manifest.encode()[0]),
        data_bytes=manifest.data_bytes,
        ratio=1.0 if order.kind == "full" else manifest.data_bytes / max(order.base_bytes, 1),
        digest=digest,
        stall_seconds=order.stall,
        seconds=time.perf_counter() - began,
        quantize_seconds=sum(part.quantize_seconds for part, _, _ in parts),
        write_seconds=sum(part.write_seconds for part, _, _ in parts),
    )
    return Published(saved, late)


def _manifest(
    files: Files, config: CheckpointConfig, order: Order, step: int, identity: str, parts: list[Any]
) -> Manifest:
    all_files: dict[str, list[Any]] = {}
    dense: dict[str, list[list[Any]]] = {}
    for written, _, _ in parts:
        all_files |= written.files
        for name, places in written.dense.items():
            dense.setdefault(name, []).extend(places)
    return Manifest(
        id=identity,
        kind=order.kind,
        step=step,
        sequence=max((manifest.sequence for manifest in catalogue(files).found), default=0) + 1,
        parent=None if order.parent is None else order.parent[0],
        chain=order.chain,
        policy=config.policy,
        bits=order.bits,
        method=config.method,
        restores=order.restores,
        world=len(parts),
        tables=merge_tables([tables for _, _, tables in parts]),
        records=[record for written, _, _ in parts for record in written.records],
        files=all_files,
        dense=dense,
        state=merge_trees([tree for _, tree, _ in parts]),
        sizes=order.sizes,
        versions={name: text for name, text in versions().items() if name in ("edgewright", "torch", "python")},
        created=int(time.time()),
    )


def _afterwards(files: Files, config: CheckpointConfig, identity: str, proved: set[str]) -> BaseException | None:
    """What comes once the checkpoint exists; its failure leaves a hint, or old checkpoints, as they were."""
    try:
        commit.point(files, identity)
        collect(files, config.keep, proved)
    except OSError as error:
        return output_error(files, error)
    return None


def _spoken(files: Files, error: Exception) -> BaseException:
    """What the operating system refused, as a sentence; every other error as it is."""
    return output_error(files, error) if isinstance(error, OSError) else error


def _give_up(files: Files, folder: str) -> None:
    """Remove what a failed write left, as far as the disk lets us."""
    try:
        commit.discard(files, folder)
    except OSError:
        pass
