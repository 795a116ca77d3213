"""The rows of all STEM layers outside the model: read ahead by threads, cached where they are used, trained in place.

Every answer is the same whatever the cache size, the number of threads and their timing. Threads only read the tables;
which rows are cached is decided in the caller's thread, in the order of its calls; and a read that began before its
rows were written is repeated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.systems.stem.rows import RowTable
from edgewright.systems.stem.training import RowAdamW

SAMPLE = 30  # times the capacity: requests after which all counts are halved

Ids = np.ndarray[Any, Any]


class RowCache:
    """`capacity` rows of width `width`, on a device. Not for several threads; the store calls it from one alone.

    Requests are counted for every id, also of rows that are not here, and all counts are halved now and then, so that
    what was frequent long ago leaves. Of the rows that are here or were just read, those of the largest counts stay; of
    equal counts, those that are here and then the smaller id. A table of counts costs less than one of its columns.
    """

    def __init__(self, capacity: int, count: int, width: int, dtype: torch.dtype, device: str | torch.device) -> None:
        self.capacity = min(capacity, count)
        self.rows = torch.empty(self.capacity, width, dtype=dtype, device=device)
        self.counts = np.zeros(count, np.int32)
        self.slot_of = np.full(count, -1, np.int64)  # by id
        self.id_in = np.full(self.capacity, -1, np.int64)
        self.used = self.requests = 0

    def request(self, ids: Ids) -> Ids:
        """Count a request of distinct ids; their slots [n], -1 where a row is not here."""
        self.counts[ids] += 1
        self.requests += len(ids)
        if self.requests >= SAMPLE * self.capacity:
            self.counts >>= 1
            self.requests //= 2
        return self.slot_of[ids]

    def offer(self, ids: Ids, rows: Tensor) -> None:
        """Rows [n, width] of distinct ascending ids that were requested and not here."""
        order = np.flatnonzero(self.slot_of[ids] < 0)
        order = order[np.argsort(-self.counts[ids[order]], kind="stable")][: self.capacity]  # the most frequent first
        slots = np.arange(self.used, min(self.used + len(order), self.capacity))
        self.used += len(slots)
        if (rest := order[len(slots) :]).size:
            held = self.counts[self.id_in]
            least = np.argsort(held, kind="stable")[: len(rest)] if len(rest) > 1 else np.array([held.argmin()])
            least = least[self.counts[ids[rest]] > held[least]]
            slots = np.concatenate([slots, least])
        if slots.size:
            order = order[: len(slots)]
            gone = self.id_in[slots]
            self.slot_of[gone[gone >= 0]] = -1
            self.slot_of[ids[order]], self.id_in[slots] = slots, ids[order]
            chosen = torch.from_numpy(order).to(rows.device)
            self.rows[torch.from_numpy(slots).to(self.rows.device)] = rows[chosen]

    def update(self, ids: Ids, rows: Tensor) -> None:
        """New values of ids, for those that are here."""
        slots = self.slot_of[ids]
        here = np.flatnonzero(slots >= 0)
        self.rows[torch.from_numpy(slots[here])] = rows[torch.from_numpy(here)].to(self.rows.device, self.rows.dtype)


@dataclass
class _Job:
    """A fetch under way: distinct ids, which of them the cache had (`here`, with their rows), the read of the rest."""

    ids: Tensor
    here: Tensor
    cached: Tensor | None
    missing: Tensor
    read: Future[tuple[Tensor, Any]] | None
    version: int


class EmbeddingStore:
    """Tables by layer, each `RowTable`.

    cache_rows: rows a layer kept on `device` in `dtype` (0: none). prefetch: layers that are read ahead in a prompt;
    threads: that read. optimizer: makes the store trainable; `scatter_grad` gathers gradients and `step` applies them.
    """

    def __init__(
        self,
        tables: Mapping[int, RowTable],
        *,
        cache_rows: int = 0,
        prefetch: int = 2,
        threads: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        optimizer: RowAdamW | None = None,
    ) -> None:
        if cache_rows < 0 or prefetch < 0 or threads < 1:
            raise UsageError(
                f"cache_rows={cache_rows}, prefetch={prefetch}, threads={threads}; give 0 or more rows, 0 or more "
                "layers and 1 thread or more"
            )
        if not tables:
            raise UsageError("a store needs the table of one layer or more")
        if optimizer is not None and any(rows.read_only for rows in tables.values()):
            raise UsageError(
                "the tables of this store are read-only and cannot be trained; open them with trainable=True"
            )
        self.tables, self.optimizer, self.prefetch = dict(tables), optimizer, prefetch
        self.device, self.dtype = torch.device(device), dtype
        self.caches = {
            layer: RowCache(cache_rows, rows.count, rows.format.width, dtype, device)
            for layer, rows in self.tables.items()
            if cache_rows
        }
        self.overlays: dict[int, dict[int, Tensor]] = {layer: {} for layer in self.tables}
        self._jobs: dict[int, _Job] = {}
        self._versions = dict.fromkeys(self.tables, 0)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="stem") if prefetch else None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.reset_stats()

    def request(self, layer: int, ids: Tensor) -> None:
        """Begin to fetch the rows of distinct ascending ids, int64 [U] on the CPU, without waiting for them."""
        job = self._jobs.get(layer)
        if self._pool is not None and not (job is not None and torch.equal(job.ids, ids)):
            self._check(layer, ids)
            self._jobs[layer] = self._start(layer, ids, self._pool)

    def fetch(self, layer: int, ids: Tensor) -> Tensor:
        """Rows of distinct ascending ids, int64 [U] on the CPU -> [U, f] on the store's device; waits where it must."""
        job = self._jobs.pop(layer, None)
        if job is None or job.version != self._versions[layer] or not torch.equal(job.ids, ids):
            self._check(layer, ids)
            job = self._start(layer, ids, None)  # nobody asked, for other rows, or before they were written
        rows = job.cached
        if len(job.missing):
            read = rows = self._wait(layer, job)
            if job.cached is not None:
                rows = read.new_empty(len(ids), read.shape[1])
                rows[job.here.to(self.device)], rows[(~job.here).to(self.device)] = job.cached, read
            if layer in self.caches:
                self.caches[layer].offer(job.missing.numpy(), read)
        elif rows is None:
            rows = torch.empty(0, self.tables[layer].format.width, dtype=self.dtype, device=self.device)
        self._counts["hits"] += len(ids) - len(job.missing)
        self._counts["misses"] += len(job.missing)
        self._counts["bytes"] += len(job.missing) * self.tables[layer].format.row_bytes
        return self._overlaid(layer, ids, rows)

    def replace(self, layer: int, ids: Tensor, rows: Tensor) -> None:
        """Write rows of distinct ascending ids into the table itself. Raises UsageError where it is read-only."""
        self._check(layer, ids)
        self._versions[layer] += 1
        written = self.tables[layer].write(ids, rows.detach().to("cpu", torch.float32))
        if layer in self.caches:
            self.caches[layer].update(ids.numpy(), written)

    def overlay(self, layer: int, ids: Tensor, rows: Tensor | None) -> None:
        """Answer with these rows for these ids from now on, whatever the table holds; None: with the table's again."""
        self._check(layer, ids)
        for i, key in enumerate(ids.tolist()):
            if rows is None:
                self.overlays[layer].pop(key, None)
            else:
                self.overlays[layer][key] = rows[i].detach().to(self.device, self.dtype, copy=True)

    def scatter_grad(self, layer: int, ids: Tensor, gradient: Tensor) -> None:
        """Add the gradient [U, f] of the rows of distinct ids to what the next `step` applies."""
        self._trained().gather(layer, ids, gradient)

    def step(self, learning_rate: float | None = None) -> float:
        """One lazy AdamW update of all rows with gradients; the norm of the gradients before clipping."""
        return self._trained().apply(self.tables, self.replace, learning_rate)

    def attach(self, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
        """Step after each step of the optimizer of the other weights, with `factor` x the rate of its first group."""
        self._trained()

        def follow(*_: Any) -> None:
            self.step(factor * float(optimizer.param_groups[0]["lr"]))

        optimizer.register_step_post_hook(follow)

    def flush(self) -> None:
        """Have everything that was written on its disk."""
        for rows in self.tables.values():
            rows.flush()

    def stats(self) -> dict[str, float]:
        """Rows that the cache had and had not, bytes read from tables, and milliseconds that callers waited."""
        return dict(self._counts)

    def reset_stats(self) -> None:
        self._counts = {"hits": 0, "misses": 0, "bytes": 0, "stall_ms": 0.0}

    def state_dict(self) -> dict[str, Any]:
        """The rows that training changed, with their optimizer states: what a checkpoint of a run must keep."""
        optimizer = self._trained()
        state = {}
        for layer, moments in optimizer.moments.items():
            ids = moments.ids().sort().values
            state[str(layer)] = {"rows": self.tables[layer].read(ids), "ids": ids, **moments.state(ids)}
        return {"layers": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such rows back over the tables that the run began with."""
        optimizer = self._trained()
        optimizer.reset()
        for layer, kept in state["layers"].items():
            if len(kept["ids"]):
                self.replace(int(layer), kept["ids"], kept["rows"])
                optimizer.restore(int(layer), kept, self.tables[int(layer)].count)

    def close(self) -> None:
        """Wait for the threads and close the files."""
        if self._pool is not None:
            self._pool.shutdown()
        for rows in self.tables.values():
            rows.close()
        self._jobs = {}

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _trained(self) -> RowAdamW:
        if self.optimizer is None:
            raise UsageError("this store is read-only; make it with trainable=True to train or write its rows")
        return self.optimizer

    def _check(self, layer: int, ids: Tensor) -> None:
        if layer not in self.tables:
            raise UsageError(f"the store has no layer {layer}; it has {', '.join(map(str, self.tables))}")
        if len(ids) and (int(ids[0]) < 0 or int(ids[-1]) >= self.tables[layer].count):
            bad = int(ids[0]) if int(ids[0]) < 0 else int(ids[-1])
            raise UsageError(f"row {bad} is outside the table of {self.tables[layer].count} rows")

    def _start(self, layer: int, ids: Tensor, pool: ThreadPoolExecutor | None) -> _Job:
        version = self._versions[layer]
        here, cached, missing = torch.zeros(len(ids), dtype=torch.bool), None, ids
        if layer in self.caches:
            slots = torch.from_numpy(self.caches[layer].request(ids.numpy()))
            here = slots >= 0
            if bool(here.any()):
                cached = self.caches[layer].rows[slots[here].to(self.device)]
                missing = ids[~here]
        read = pool.submit(self._read, layer, missing) if pool is not None and len(missing) else None
        return _Job(ids, here, cached, missing, read, version)

    def _read(self, layer: int, ids: Tensor) -> tuple[Tensor, Any]:
        """Rows on the device, and for a GPU the event after which they are there."""
        rows = self.tables[layer].read(ids).to(self.dtype)
        if self._stream is None:
            return rows, None
        with torch.cuda.stream(self._stream):
            moved = rows.pin_memory().to(self.device, non_blocking=True)
        return moved, self._stream.record_event()

    def _wait(self, layer: int, job: _Job) -> Tensor:
        began = time.perf_counter()
        ready = job.read is not None and job.read.done()
        rows, event = self._read(layer, job.missing) if job.read is None else job.read.result()
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            rows.record_stream(current)
        if not ready:
            self._counts["stall_ms"] += 1e3 * (time.perf_counter() - began)
        return rows

    def _overlaid(self, layer: int, ids: Tensor, rows: Tensor) -> Tensor:
        overlay = self.overlays[layer]
        if overlay and (found := [(i, key) for i, key in enumerate(ids.tolist()) if key in overlay]):
            rows = rows.clone()
            for i, key in found:
                rows[i] = overlay[key]
        return rows
