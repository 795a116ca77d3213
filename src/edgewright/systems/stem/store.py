"""Tables outside the model: rows in memory or in files, read ahead by a thread, cached, trained in place.

A file is a safetensors file with one tensor (floats) or two (codes and scales), so that a table that a checkpoint holds
in a shard of its own is already in this form.

When a forward begins, all its tokens are known: they are made distinct once for all layers, and rows of the first
layers are asked for while the dense layers before them compute. A decoded token asks for the rows of all layers at
once. A layer waits for its rows only where they enter the product, behind its own gate. Every answer is the same
whatever the cache size and the timing: the thread only reads the tables; which rows are cached is decided in the
caller's thread, in the order of its calls; and a read that began before its rows were written is repeated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, check_fields, one_of, whole
from edgewright.errors import FormatError, OutputError, UsageError
from edgewright.io.packed import PackedEmbedding, PackedTensor
from edgewright.io.safetensors_header import SafetensorsEntry, check_safetensors
from edgewright.io.tensors import save_tensors
from edgewright.quantization.codecs import pack_nibbles, unpack_nibbles
from edgewright.quantization.fake_quantize import Quantizer
from edgewright.quantization.grids import GRIDS
from edgewright.quantization.scales import grouped, initial_alpha
from edgewright.systems.stem.layer import StemFeedForward, stem_blocks
from edgewright.systems.stem.training import RowAdamW

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CODES = {"int8": "absmax", "int4": "mse"}  # grid -> rule of its scales
NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
AT_ONCE = 4096  # rows converted at a time
SAMPLE = 30  # times the capacity: requests after which all counts are halved

Parts = dict[str, Tensor]
Ids = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RowFormat:
    """dtype: of FLOATS or CODES; width: values of a row; group: values that share a scale, None for the whole row."""

    dtype: str
    width: int
    group: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, {"dtype": one_of(*FLOATS, *CODES)})
        if self.group is not None and (self.group < 1 or self.width % self.group):
            raise UsageError(f"group={self.group} does not divide rows of {self.width} values; use None or a divisor")
        if self.dtype == "int4" and self.width % 2:
            raise UsageError(f"rows of {self.width} values cannot be int4, whose codes lie in pairs; use int8")

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, int]]:
        """Suffix of the tensor's name -> (dtype, columns)."""
        if self.dtype in FLOATS:
            return {"weight": (FLOATS[self.dtype], self.width)}
        codes = (torch.int8, self.width) if self.dtype == "int8" else (torch.uint8, self.width // 2)
        return {"codes": codes, "step": (torch.float32, self.width // (self.group or self.width))}

    @property
    def row_bytes(self) -> int:
        return sum(columns * dtype.itemsize for dtype, columns in self.parts.values())

    @torch.no_grad()
    def encode(self, rows: Tensor) -> Parts:
        """Stored form of rows [n, width]."""
        if self.dtype in FLOATS:
            return {"weight": rows.to(FLOATS[self.dtype])}
        if not torch.isfinite(rows).all():
            raise FormatError("rows of a table hold NaN or infinity; they cannot be quantised")
        quantizer, values = Quantizer(GRIDS[self.dtype]), rows.float()
        weights = grouped(values, self.width // (self.group or self.width))
        alpha = initial_alpha(weights, quantizer.grid, CODES[self.dtype], quantizer.scale_dtype)
        codes, scale = quantizer.encode(values, alpha)
        return self.of_codes(codes.to(torch.int8), scale)

    def of_codes(self, codes: Tensor, scale: Tensor) -> Parts:
        """Stored form of codes int8 [n, width] with scales [n, groups]."""
        return {"codes": pack_nibbles(codes) if self.dtype == "int4" else codes, "step": scale}

    def decode(self, parts: Parts) -> Tensor:
        """Rows [n, width] in the float type of the format (float32 for codes)."""
        if self.dtype in FLOATS:
            return parts["weight"]
        codes = unpack_nibbles(parts["codes"]) if self.dtype == "int4" else parts["codes"]
        return PackedTensor(codes, parts["step"], self.dtype).dequantize()


class RowTable:
    """`count` rows by part of the format, in memory or in a mapped file; a float tensor is used without a copy.

    Ids are ascending, distinct, int64 [n]. `read` may come from any thread.
    """

    def __init__(self, parts: Parts, format: RowFormat, read_only: bool = False) -> None:
        self.parts, self.format, self.read_only = parts, format, read_only
        self.count = len(next(iter(parts.values())))
        self.path: Path | None = None
        self.maps: list[Any] = []

    @classmethod
    def open(cls, path: str | Path, name: str, read_only: bool = True) -> RowTable:
        """The rows of a safetensors file whose tensors are called `name`.weight, or .codes and .step."""
        path = Path(path)
        if not path.is_file():
            raise FormatError(f"the table shard {path} is missing; the rows of {name} should be in it")
        format, entries = _layout(path, name)
        parts, maps = {}, []
        for part, entry in entries.items():
            dtype, columns = format.parts[part]
            shape = (entry.shape[0], columns * dtype.itemsize)
            try:
                maps.append(np.memmap(path, np.uint8, "c" if read_only else "r+", entry.start, shape))
            except OSError as error:
                raise OutputError(f"cannot open {path} (read_only={read_only}): {error}") from error
            parts[part] = torch.from_numpy(maps[-1]).view(dtype)
        table = cls(parts, format, read_only)
        table.path, table.maps = path, maps
        return table

    def read(self, ids: Tensor) -> Tensor:
        """Rows [n, width], decoded."""
        return self.format.decode({name: part.index_select(0, ids) for name, part in self.parts.items()})

    def write(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Replace rows; what they became, decoded. Raises UsageError where the table is read-only."""
        if self.read_only:
            where = f" {self.path}" if self.path else ""
            raise UsageError(f"the table{where} is read-only; open the store with trainable=True to write rows")
        encoded = self.format.encode(rows)
        for name, part in self.parts.items():
            part.index_copy_(0, ids, encoded[name])
        return self.format.decode(encoded)


def _layout(path: Path, name: str) -> tuple[RowFormat, dict[str, SafetensorsEntry]]:
    """(format, entry of each part) of a table in a safetensors file."""
    entries = check_safetensors(path)
    parts = {part: entries[f"{name}.{part}"] for part in ("weight", "codes", "step") if f"{name}.{part}" in entries}
    shapes = [entry.shape for entry in parts.values()]
    types = {part: entry.dtype for part, entry in parts.items()}
    if all(len(shape) == 2 and all(shape) and shape[0] == shapes[0][0] for shape in shapes):
        if list(types) == ["weight"] and types["weight"] in NAMES:
            return RowFormat(NAMES[types["weight"]], shapes[0][1]), parts
        if types in ({"codes": "U8", "step": "F32"}, {"codes": "I8", "step": "F32"}):
            dtype, width = ("int4", 2 * shapes[0][1]) if types["codes"] == "U8" else ("int8", shapes[0][1])
            if width % shapes[1][1] == 0:
                return RowFormat(dtype, width, None if shapes[1][1] == 1 else width // shapes[1][1]), parts
    raise FormatError(f"{path} does not hold the rows of {name} (as .weight, or .codes and .step) in a form known here")


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
            least = np.argsort(held, kind="stable")[: len(rest)]
            slots = np.concatenate([slots, least[self.counts[ids[rest]] > held[least]]])
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
    cached: Tensor
    missing: Tensor
    read: Future[tuple[Tensor, Any]] | None
    version: int


class EmbeddingStore:
    """The tables of all STEM layers, by stored block.

    Args:
        tables: stored block -> its rows.
        cache_rows: rows of each layer kept on `device` in `dtype`; 0, the default, keeps none (a cache did not pay
            where the operating system's held the file: 0.94 of the speed in memory with it, 0.96 without).
        prefetch: layers that are read ahead in a prompt; 0 reads each when it is fetched.
        device: where rows are wanted.
        dtype: of the rows there.
        optimizer: makes the store trainable; `scatter_grad` gathers gradients and `step` applies them.

    Raises:
        UsageError: an option outside its range.
    """

    def __init__(
        self,
        tables: Mapping[int, RowTable],
        *,
        cache_rows: int = 0,
        prefetch: int = 2,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        optimizer: RowAdamW | None = None,
    ) -> None:
        check("cache_rows", cache_rows, whole(0))
        check("prefetch", prefetch, whole(0))
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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stem") if prefetch else None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.reset_stats()

    def request(self, layer: int, ids: Tensor) -> None:
        """Begin to fetch the rows of distinct ascending ids, int64 [U] on the CPU, without waiting for them."""
        job = self._jobs.get(layer)
        if self._pool is not None and not (job is not None and torch.equal(job.ids, ids)):
            self._jobs[layer] = self._start(layer, ids, self._pool)

    def fetch(self, layer: int, ids: Tensor) -> Tensor:
        """Rows of distinct ascending ids, int64 [U] on the CPU -> [U, f] on the store's device; waits where it must."""
        job = self._jobs.pop(layer, None)
        if job is None or job.version != self._versions[layer] or not torch.equal(job.ids, ids):
            job = self._start(layer, ids, None)  # nobody asked, for other rows, or before they were written
        rows = job.cached
        if len(job.missing):
            read = rows = self._wait(layer, job)
            if len(job.cached):
                rows = read.new_empty(len(ids), read.shape[1])
                rows[job.here.to(self.device)], rows[(~job.here).to(self.device)] = job.cached, read
            if layer in self.caches:
                self.caches[layer].offer(job.missing.numpy(), read)
        self._counts["hits"] += len(ids) - len(job.missing)
        self._counts["misses"] += len(job.missing)
        self._counts["bytes"] += len(job.missing) * self.tables[layer].format.row_bytes
        if (overlay := self.overlays[layer]) and (edited := [key for key in ids.tolist() if key in overlay]):
            rows = rows.clone()
            rows[torch.isin(ids, torch.tensor(edited)).to(self.device)] = torch.stack([overlay[key] for key in edited])
        return rows

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
        for table in self.tables.values():
            for mapped in table.maps:
                mapped.flush()

    def stats(self) -> dict[str, float]:
        """hits, misses: rows that the cache had and had not; bytes read from tables; stall_ms that callers waited."""
        return dict(self._counts)

    def reset_stats(self) -> None:
        self._counts = {"hits": 0, "misses": 0, "bytes": 0, "stall_ms": 0.0}

    def state_dict(self) -> dict[str, Any]:
        """The rows that training changed, with their optimizer states: what a checkpoint of a run must keep."""
        state = self._trained().state_dict()
        for layer, moments in state.items():
            moments["rows"] = self.tables[int(layer)].read(moments["ids"])
        return {"layers": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such rows back over the tables that the run began with."""
        for layer, moments in state["layers"].items():
            self.replace(int(layer), moments["ids"], moments["rows"])
        self._trained().load_state_dict(state["layers"], {layer: rows.count for layer, rows in self.tables.items()})

    def close(self) -> None:
        """Wait for the thread and let go of the files."""
        if self._pool is not None:
            self._pool.shutdown()
        self.tables, self._jobs = {}, {}

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _trained(self) -> RowAdamW:
        if self.optimizer is None:
            raise UsageError("this store is read-only; make it with trainable=True to train or write its rows")
        return self.optimizer

    def _check(self, layer: int, ids: Tensor) -> None:
        check("layer of the store", layer, one_of(*self.tables))
        for row in ids[[0, -1]].tolist() if len(ids) else ():
            check("row of the table", row, whole(0, self.tables[layer].count - 1))

    def _start(self, layer: int, ids: Tensor, pool: ThreadPoolExecutor | None) -> _Job:
        self._check(layer, ids)
        here, cached = torch.zeros(len(ids), dtype=torch.bool), torch.empty(0)
        if layer in self.caches:
            slots = torch.from_numpy(self.caches[layer].request(ids.numpy()))
            here = slots >= 0
            cached = self.caches[layer].rows[slots[here].to(self.device)]
        missing = ids[~here]
        read = pool.submit(self._read, layer, missing) if pool is not None and len(missing) else None
        return _Job(ids, here, cached, missing, read, self._versions[layer])

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


class _Lookups:
    """The lookups of an offloaded model: asks for rows when a forward begins and serves its layers."""

    def __init__(self, model: Any, store: EmbeddingStore) -> None:
        self.store = store
        layers = stem_blocks(model)
        self.order = [block for block in model.config.share_map if block in layers]
        self.ids: Tensor | None = None
        self.distinct = self.places = torch.empty(0)
        self.ahead = 0
        model.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for block, layer in layers.items():
            layer.lookup = lambda ids, block=block: self.rows(block, ids)  # type: ignore[misc]

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            return  # the decoder itself says what is missing
        self.ids, (self.distinct, self.places) = ids, self._distinct(ids)
        self.ahead = 0
        if self.store.prefetch:
            self._request(len(self.order) if ids.shape[-1] == 1 else self.store.prefetch)

    def _distinct(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        distinct, places = torch.unique(ids.cpu(), return_inverse=True)
        return distinct, places.to(self.store.device)

    def _request(self, count: int) -> None:
        for block in self.order[self.ahead : self.ahead + count]:
            self.store.request(block, self.distinct)
        self.ahead += count

    def rows(self, block: int, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, f]."""
        planned = self.ids is not None and torch.equal(ids, self.ids)
        # an edit asks for other tokens
        distinct, places = (self.distinct, self.places) if planned else self._distinct(ids)
        rows = self.store.fetch(block, distinct)
        if planned and self.store.prefetch:
            self._request(1)
        if self.store.optimizer is not None and torch.is_grad_enabled():
            rows = rows.detach().requires_grad_()
            rows.register_hook(lambda gradient: self.store.scatter_grad(block, distinct, gradient))
        return F.embedding(places, rows)


@torch.no_grad()
def offload_(
    model: nn.Module,
    device: str = "cpu",
    path: str | Path | None = None,
    *,
    dtype: str | None = None,
    group: int | None = None,
    cache_rows: int = 0,
    prefetch: int = 2,
    trainable: bool | RowAdamW = False,
) -> EmbeddingStore:
    """Move the tables of an edge decoder into a store, in place; logits stay the same bit for bit.

    Args:
        model: with STEM layers; its tables in memory, or absent where the files of `path` hold them already.
        device: "cpu", or "disk", which needs `path`.
        path: folder of the files (see `table_file`). They are written from the model's tables, and used as they are
            where the model has none.
        dtype: of FLOATS or CODES, that of the tables where None; anything narrower rounds, to what the same rounding
            in the model would give.
        group: values that share a scale of int8 and int4; None: a row.
        cache_rows: as `EmbeddingStore` has it.
        prefetch: as `EmbeddingStore` has it.
        trainable: gradients go to the store (a `RowAdamW` says how); files are then written in place.

    Returns:
        The store, on the device and in the float type of the model.

    Raises:
        UsageError: an option outside its range, a model that is offloaded already, or files of other shapes.
        FormatError: a table shard that is missing or broken.
    """
    layers = stem_blocks(model)
    if device not in ("cpu", "disk") or (device == "disk") != (path is not None):
        raise UsageError(f"device={device!r}, path={path}; give device='cpu', or device='disk' with path=FOLDER")
    if any(layer.lookup is not None for layer in layers.values()):
        raise UsageError(
            "the tables of this model are elsewhere already; save_stem(..., store=store) puts them back into a folder"
        )
    optimizer = RowAdamW() if trainable is True else trainable or None
    tables: dict[int, RowTable] = {}
    for block, layer in layers.items():
        if device == "cpu":
            tables[block] = _stored(layer, dtype, group, optimizer is None)
            continue
        file = table_file(Path(path or ""), block)
        if layer.table is not None:
            write_table(file, block, _stored(layer, dtype, group).parts)
        rows = tables[block] = RowTable.open(file, table_name(block), optimizer is None)
        if (rows.count, rows.format.width) != (layer.vocabulary, layer.intermediate):
            raise UsageError(
                f"{file} holds {rows.count} rows of {rows.format.width}; layer {block} has "
                f"{layer.vocabulary} of {layer.intermediate}"
            )
    weight: Any = next(iter(layers.values())).down_proj.weight
    store = EmbeddingStore(
        tables, cache_rows=cache_rows, prefetch=prefetch, optimizer=optimizer, device=weight.device,
        dtype=weight.dtype if weight.dtype in FLOATS.values() else torch.float32,
    )  # fmt: skip
    _Lookups(model, store)
    for layer in layers.values():
        layer.table = None
    return store


def table_file(folder: Path, block: int) -> Path:
    """Where the table of a stored block lies in a folder."""
    return folder / f"stem-layer-{block}.safetensors"


def table_name(block: int) -> str:
    """The name of its tensors, which is that of the module in the decoder."""
    return f"model.layers.{block}.mlp.table"


def write_table(file: Path, block: int, parts: Parts) -> None:
    """The shard of a stored block, whole or not at all."""
    save_tensors(file, {f"{table_name(block)}.{name}": part for name, part in parts.items()}, {"format": "pt"})


def _stored(layer: StemFeedForward, dtype: str | None, group: int | None, read_only: bool = True) -> RowTable:
    """The table of a layer in its stored form; floats without a copy where none is needed."""
    table: Any = layer.table
    if table is None:
        raise UsageError("the model was loaded without its tables; offload it with device='disk' and their folder")
    if isinstance(table, PackedEmbedding):
        packed = table.packed
        if packed.grid not in CODES or dtype not in (None, packed.grid):
            raise UsageError(f"the table is packed as {packed.grid}; tables in a store are int8, int4 or floats")
        width = packed.codes.shape[1]
        format = RowFormat(packed.grid, width, None if packed.group == width else packed.group)
        return RowTable(format.of_codes(packed.codes, packed.step), format, read_only)
    weight = table.weight.detach()
    names = {value: name for name, value in FLOATS.items()}
    format = RowFormat(dtype or names.get(weight.dtype, "fp32"), weight.shape[1], group)
    if format.dtype in FLOATS:
        return RowTable(format.encode(weight.cpu()), format, read_only)
    pieces = [format.encode(piece.cpu()) for piece in weight.split(AT_ONCE)]
    return RowTable({name: torch.cat([piece[name] for piece in pieces]) for name in format.parts}, format, read_only)
