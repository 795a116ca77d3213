"""The checkpointer of a training: follows the rows that change, copies them when a checkpoint is due, writes behind."""

from __future__ import annotations

import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed, OutputError, UsageError
from edgewright.systems.check_n_run.config import CheckpointConfig, Policy, RestoreInfo, next_kind, stored_bits
from edgewright.systems.check_n_run.recovery import changed_rows
from edgewright.systems.check_n_run.state import capture, check_optimizers, describe_tables
from edgewright.systems.check_n_run.tables import (
    RowSnapshot,
    Tracker,
    find_tables,
    leaves,
    moves_untouched,
)
from edgewright.training import snapshot
from edgewright.training.background import Background
from edgewright.training.batches import ResumableBatches
from edgewright.training.checkpoint.capture import RowShard, TouchedRows
from edgewright.training.checkpoint.chain import catalogue, chain_of, clean
from edgewright.training.checkpoint.files import Files, open_files, output_error
from edgewright.training.checkpoint.manifest import Manifest, Table
from edgewright.training.checkpoint.ranks import Ranks
from edgewright.training.checkpoint.records import Encoding
from edgewright.training.checkpoint.writer import CommitResult, InProcess, InThread, Saved, WriteRequest, publish


@dataclass
class Lineage:
    """parent: [id, digest] of the last checkpoint; chain: of those that a difference needs, the full one first.

    sizes: shares of the differences since the full one, of `base_bytes`; tables: as they were described in it.
    """

    parent: list[str] | None = None
    chain: list[list[str]] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    base_bytes: int = 0
    tables: dict[str, Table] | None = None

    def adopt(self, saved: Saved, tables: dict[str, Table], policy: Policy) -> None:
        """A checkpoint exists: what comes next builds upon it."""
        self.parent = [saved.id, saved.digest]
        if saved.kind == "full":
            self.chain, self.sizes, self.tables, self.base_bytes = [self.parent], [], tables, saved.data_bytes
            return
        self.sizes.append(saved.ratio)
        if policy == "consecutive":
            self.chain.append(self.parent)


def continued(
    chain: list[Manifest], digests: Mapping[str, str], policy: Policy, tables: dict[str, Table]
) -> Lineage | None:
    """The lineage after a restore of `chain`; None where its differences are not of this policy: begin with a full one.

    One-shot and intermittent need all rows since the full one in a single difference.
    """
    if policy == "full" or (policy != "consecutive" and len(chain) > 2):
        return None
    links = [[link.id, digests[link.id]] for link in chain]
    base = chain[0].data_bytes
    sizes = [link.data_bytes / max(base, 1) for link in chain[1:]]
    if policy != "consecutive":
        sizes = [*chain[-1].sizes, *sizes]
    return Lineage(links[-1], links if policy == "consecutive" else links[:1], sizes, base, tables)


class Prefetched:
    """An iterator that keeps batches ready ahead of the training.

    The source stands `ahead` batches further than the training; its position saved in a checkpoint would skip those.
    Every batch therefore brings the position behind it along, and `state_dict` gives that of the last one handed out.

    Args:
        batches: with `state_dict()` and `load_state_dict()`.
        ahead: batches that are kept ready.
    """

    def __init__(self, batches: ResumableBatches, ahead: int = 2) -> None:
        self.batches, self.ahead = batches, ahead
        self._pool = ThreadPoolExecutor(1, "edgewright-batches")
        self._ready: list[Future[tuple[Any, dict[str, Any]]]] = []
        self._state = dict(batches.state_dict())

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while len(self._ready) <= self.ahead:
            self._ready.append(self._pool.submit(self._make))
        batch, self._state = self._ready.pop(0).result()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch that was handed out."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; batches that were made ahead are dropped."""
        for made in self._ready:
            made.result()
        self._ready.clear()
        self.batches.load_state_dict(state)
        self._state = dict(self.batches.state_dict())

    def _make(self) -> tuple[Any, dict[str, Any]]:
        batch = next(self.batches)
        return batch, dict(self.batches.state_dict())


@dataclass
class _Pending:
    """A checkpoint that is being written. result: once it exists."""

    rows: RowSnapshot
    tables: dict[str, Table]
    result: CommitResult | None = None


class DiffCheckpointer:
    """Checkpoints of a model whose tables change row by row, or (policy="full") of any model.

    In a process group every process makes one and calls alike:

        ck = DiffCheckpointer("runs/ck", model, optimizer, reader=batches, config=CheckpointConfig(every_steps=500))
        for batch in batches: train(batch) ck.step()
        ck.save(now=True)
        ck.close()  # or: with DiffCheckpointer(...) as ck

    Args:
        root: a folder or an fsspec URL.
        model: whose tables are followed.
        optimizers: one or several; those that move rows without a gradient are refused.
        reader: with `state_dict()` and `load_state_dict()`, kept with the checkpoint.
        config: settings; the defaults of `CheckpointConfig` where there are none.
        generator: its state is kept beside torch's own.
        shards: where tables are split over processes, the part of each that lies here.
        restored: what `restore` gave for this model, so that the chain of differences goes on instead of beginning with
            a full checkpoint.
        group: process group; default: all processes.

    Raises:
        UsageError: another writer in this root, or optimizers that move untouched rows.
        Unsupported: an optimizer whose state is not kept by parameter.
        OutputError: the root cannot be written.
    """

    def __init__(
        self,
        root: str | Path | Files,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        reader: Any = None,
        config: CheckpointConfig | None = None,
        generator: torch.Generator | None = None,
        shards: Sequence[RowShard] = (),
        restored: RestoreInfo | None = None,
        group: Any = None,
    ) -> None:
        self.config = config = config or CheckpointConfig()
        self.files = open_files(root)
        self.model, self.reader, self.generator = model, reader, generator
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        if reader is not None and not (hasattr(reader, "state_dict") and hasattr(reader, "load_state_dict")):
            raise UsageError(
                f"the reader ({type(reader).__name__}) has no state_dict() and load_state_dict(), so its position "
                "would be lost; use edgewright.training.BlockBatches, or keep the position yourself"
            )
        dense = "full" if config.policy == "full" else config.dense_tables
        tables = find_tables(model, self.optimizers, shards, dense)
        check_optimizers(model, self.optimizers, tables)
        self.history: list[Saved] = []
        self.failures: list[BaseException] = []
        self.skipped = 0
        self.steps = 0 if restored is None else restored.step
        self.restores = 0 if restored is None else restored.restores_so_far
        self._line = Lineage()
        self._pending: _Pending | None = None
        self._failed: BaseException | None = None
        self._verified: set[str] = set()
        self._background = Background()
        self._executor = InProcess() if config.executor == "process" else InThread()
        self._last_time = time.monotonic()
        self._release: Callable[[], Any] = lambda: None
        self.ranks = Ranks(config.timeout_seconds, group)
        self.tracker = Tracker(tables, self.optimizers, config.verify_untracked)
        try:
            self._check_alike(tables)
            self._open()
            if restored is not None:
                self._continue_from(restored)
        except BaseException:
            self._release_all()
            raise

    def __enter__(self) -> DiffCheckpointer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """`close`; a write that failed does not hide the error that ended the block."""
        try:
            self.close()
        except Exception:
            if error is None:
                raise

    def register_rows(self, parameter: Tensor, touched: TouchedRows | None = None, name: str = "") -> None:
        """Follow the rows (first axis) of a parameter: adapters of a bank, experts of a mixture. Before the first
        checkpoint.

        Args:
            parameter: of the model, or with a name of its own.
            touched: gives the rows that the optimizer step just done has changed; None: those with a gradient.
            name: in the checkpoint; default: its name in the model.

        Raises:
            UsageError: an optimizer that moves rows which nobody touched, a parameter without a name, or a checkpoint
                that was written before.
        """
        if self.history or self._pending is not None:
            raise UsageError("register_rows comes before the first checkpoint: the full one must know its tables")
        known = {id(tensor): key for key, tensor in snapshot.model_tensors(self.model).items()}
        shard = RowShard(parameter, name or known.get(id(parameter), ""), touched=touched)
        if not shard.name:
            raise UsageError("the parameter is not in the model: give it a name, register_rows(param, fn, name='bank')")
        for leaf in leaves(self.optimizers):
            for held in leaf.param_groups:
                reason = moves_untouched(leaf, held)
                followed = any(parameter is p for p in held["params"])
                if reason and followed and self.config.policy != "full":
                    raise UsageError(f"{reason} moves rows of {shard.name} that nobody touched; use policy='full'")
        self.tracker.add(shard)

    def step(self) -> None:
        """Count one training step, and save when a checkpoint is due. A write that failed is warned about, once."""
        self.steps += 1
        self._finish_write(wait=False)
        config = self.config
        due = bool(config.every_steps) and self.steps % config.every_steps == 0
        if config.every_seconds and not due:
            due = self.ranks.agree(time.monotonic() - self._last_time >= config.every_seconds)
        if due:
            self.save()

    def save(self, now: bool = False) -> None:
        """Copy the state and write it behind; `now` waits until it exists and raises OutputError where it does not."""
        if not self.tracker.shards and self.config.policy != "full" and self.ranks.world == 1:
            raise UsageError(
                "this model has no table whose rows could be followed, so that every checkpoint is a full one: say so "
                "with CheckpointConfig(policy='full'), or name rows with register_rows"
            )
        began = time.perf_counter()
        self._last_time = time.monotonic()
        busy = self.config.on_busy == "skip" and not now and self._background.busy
        unique, tables = uuid.uuid4().hex, self._tables()
        said = self.ranks.gather((busy, self._line.tables not in (None, tables), unique))
        if any(is_busy for is_busy, _, _ in said):
            self.skipped += 1
            return
        self._finish_write(wait=True)
        config, policy = self.config, self.config.policy
        grown = any(changed for _, changed, _ in said)  # state that appeared after the full one is not in it
        kind = next_kind(policy, bool(self._line.chain) and not grown, self._line.sizes)
        bits = stored_bits(self.config.bits, self.config.expected_restores, self.restores)
        chosen, rows = self.tracker.take(kind == "full", policy == "consecutive")
        try:
            own = {
                "random": snapshot.random_state(self._device(), self.generator),
                "reader": None if self.reader is None else self.reader.state_dict(),
            }
            state = capture(self.model, self.optimizers, self.tracker.shards, chosen, self.steps, self.ranks.rank, own)
        except BaseException:
            self.tracker.put_back(rows)
            raise
        line = self._line if kind == "diff" else Lineage(self._line.parent)
        state_bits = 8 if config.optimizer_bits == 8 else None
        request = WriteRequest(
            unique=said[0][2],
            kind=kind,
            policy=policy,
            encoding=Encoding(bits, config.method, config.nbins, config.ratio, state_bits, config.seed),
            parent=line.parent,
            chain=list(line.chain),
            sizes=list(line.sizes),
            base_bytes=line.base_bytes,
            restores=self.restores,
            stall=time.perf_counter() - began,
            keep=config.keep,
        )
        pending = self._pending = _Pending(rows, tables)

        def write() -> None:
            pending.result = publish(self.files, self.ranks, self._executor, request, state, self._verified)

        self._background.start(write)
        if now:
            self._finish_write(wait=True, raises=True)

    def wait(self) -> None:
        """Until nothing is being written."""
        self._finish_write(wait=True)

    def close(self) -> None:
        """Finish what is being written and let the root go. Raises the error of the last write if that failed."""
        try:
            self._finish_write(wait=True)
        finally:
            self._release_all()
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise error

    def _finish_write(self, wait: bool, raises: bool = False) -> None:
        """Take note of a write that has ended."""
        if self._pending is None or (self._background.busy and not wait):
            return
        error = self._background.wait()
        pending, self._pending = self._pending, None
        published = pending.result
        if published is None:
            self.tracker.put_back(pending.rows)
            self._failed = error = error or CheckFailed("a checkpoint was neither written nor refused")
        else:
            self.history.append(published.saved)
            self._line.adopt(published.saved, pending.tables, self.config.policy)
            error, self._failed = published.late, None
        if error is not None:
            self.failures.append(error)
            lost = self.ranks.world > 1 and isinstance(error, OutputError)
            if published is None and (raises or lost or not isinstance(error, Exception)):
                self._failed = None
                raise error
            warnings.warn(f"{error}; training goes on, the next checkpoint has these rows too", RuntimeWarning, 3)

    def _open(self) -> None:
        """Lock the root and clear what a killed process left."""
        error: BaseException | None = None
        if self.ranks.first:
            try:
                # also when nobody calls close: a lock must not outlive its holder
                self._release = weakref.finalize(self, self.files.unlock, self.files.lock())
                known = catalogue(self.files)
                if known.other_version is not None:
                    raise known.other_version
                clean(self.files)
            except Exception as caught:
                error = output_error(self.files, caught) if isinstance(caught, OSError) else caught
                if isinstance(caught, UsageError):
                    error = caught
        self.ranks.together(error)

    def _release_all(self) -> None:
        self.tracker.close()
        self._executor.close()
        self._release()
        self.ranks.close()

    def _continue_from(self, info: RestoreInfo) -> None:
        """Build upon the checkpoint that the model was restored from."""
        known = catalogue(self.files)
        tip = known.get(info.id)
        if tip is None:
            raise UsageError(f"{self.files} does not hold {info.id}, which `restored` names; leave restored out")
        if self.config.policy == "full":
            return
        chain = chain_of(known, tip)
        line = continued(chain, known.digests, self.config.policy, self._tables())
        if line is None:
            return
        self._line = line
        for bits, rows in zip(self.tracker.base, changed_rows(self.files, chain, self.tracker.shards), strict=True):
            bits.mark(rows.to(bits.bits.device))

    def _tables(self) -> dict[str, Table]:
        """The tables of this process with their optimizer's state, as a full checkpoint would describe them."""
        return describe_tables(self.tracker.shards, self.optimizers)

    def _check_alike(self, tables: list[RowShard]) -> None:
        """What no table holds must be the same on every process, or be known as a part of something."""
        held = {id(shard.parameter) for shard in tables}
        names = {
            name: list(tensor.shape)
            for name, tensor in snapshot.model_tensors(self.model).items()
            if id(tensor) not in held
        }
        for rank, theirs in enumerate(self.ranks.gather(names)):
            name, was, now = snapshot.first_difference(names, theirs) or ("", None, None)
            if name:
                raise UsageError(
                    f"{name} is {was} on process {self.ranks.rank} and {now} on process {rank}: name the parts of "
                    "tables with shards=[RowShard(parameter, name, first, rows), ...]"
                )

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))
