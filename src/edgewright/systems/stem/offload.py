"""STEM tables taken out of a model, into host memory or files, with the same logits.

When a forward begins, all its tokens are known: they are made distinct once for all layers, and rows of the first
layers are asked for while the dense layers before them compute. A decoded token asks for the rows of all layers at
once. A layer waits for its rows only where they enter the product, behind its own gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.io.packed import PackedEmbedding
from edgewright.systems.stem.layer import StemFeedForward, stem_blocks
from edgewright.systems.stem.rows import (
    AT_ONCE,
    CODES,
    FLOATS,
    FileRows,
    MemoryRows,
    Parts,
    RowFormat,
    RowTable,
    write_rows,
)
from edgewright.systems.stem.store import EmbeddingStore
from edgewright.systems.stem.training import RowAdamW

DEVICES = ("cpu", "disk")


class _Decoded:
    """The lookups of an offloaded model: plans a forward when it begins and serves its layers."""

    def __init__(self, model: nn.Module, store: EmbeddingStore) -> None:
        self.store = store
        layers = stem_blocks(model)
        share_map = model.config.share_map  # type: ignore[union-attr]
        self.order = [block for block in share_map if block in layers]  # type: ignore[union-attr]
        self.ids: Tensor | None = None
        self.distinct = self.places = torch.empty(0)
        self.ahead = 0
        self.hook = model.model.register_forward_pre_hook(self._begin, with_kwargs=True)  # type: ignore[union-attr]
        for block, layer in layers.items():
            layer.lookup = lambda ids, block=block: self.rows(block, ids)  # type: ignore[misc]

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            return  # the decoder itself says what is missing
        self.ids, (self.distinct, self.places) = ids, self._distinct(ids)
        depth = len(self.order) if ids.shape[-1] == 1 else self.store.prefetch
        self.ahead = 0
        self._request(depth if self.store.prefetch else 0)

    def _distinct(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        distinct, places = torch.unique(ids.cpu(), return_inverse=True)
        return distinct, places.to(self.store.device)

    def _request(self, count: int) -> None:
        for block in self.order[self.ahead : self.ahead + count]:
            self.store.request(block, self.distinct)
        self.ahead += count

    def rows(self, block: int, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, f]."""
        planned = self.ids is not None and (ids is self.ids or torch.equal(ids, self.ids))
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
    threads: int = 1,
    access: str = "pread",
    trainable: bool | RowAdamW = False,
) -> EmbeddingStore:
    """Move the tables of an edge decoder into a store, in place; logits stay the same bit for bit.

    device: "cpu", or "disk" with a folder `path` for the files (see `table_file`); files that are there and fit are
    used as they are when the model has no tables of its own, else they are written. dtype: of DTYPES, that of the
    tables where None; anything narrower rounds, to what the same rounding in the model would give. group: values that
    share a step of int8 and int4. access: "pread" leaves what was read to the system's page cache alone, "mmap" maps
    the files. trainable: gradients go to the store (a `RowAdamW` says how); files are then written in place.
    Raises UsageError for a model that is offloaded already.
    """
    layers = stem_blocks(model)
    if device not in DEVICES or (device == "disk") != (path is not None):
        raise UsageError(f"device={device!r}, path={path}; give device='cpu', or device='disk' with path=FOLDER")
    if any(layer.lookup is not None for layer in layers.values()):
        raise UsageError(
            "the tables of this model are elsewhere already; save_stem(..., store=store) puts them back into a folder"
        )
    optimizer = RowAdamW() if trainable is True else trainable or None
    read_only = optimizer is None
    tables: dict[int, RowTable] = {}
    for block, layer in layers.items():
        if device == "cpu":
            format, _, pieces = _stored(layer, dtype, group)
            parts = list(pieces)
            whole = parts[0] if len(parts) == 1 else {n: torch.cat([p[n] for p in parts]) for n in format.parts}
            tables[block] = MemoryRows(whole, format, read_only)
        else:
            file = table_file(Path(path or ""), block)
            if layer.table is not None:
                format, count, pieces = _stored(layer, dtype, group)
                write_rows(file, table_name(block), count, format, pieces)
            tables[block] = FileRows(file, table_name(block), access=access, read_only=read_only)
            if tables[block].count != layer.vocabulary or tables[block].format.width != layer.intermediate:
                raise UsageError(
                    f"{file} holds {tables[block].count} rows of {tables[block].format.width}; layer {block} has "
                    f"{layer.vocabulary} of {layer.intermediate}"
                )
    weight: Any = next(iter(layers.values())).down_proj.weight
    store = EmbeddingStore(
        tables, cache_rows=cache_rows, prefetch=prefetch, threads=threads,
        device=weight.device,
        dtype=weight.dtype if weight.dtype in FLOATS.values() else torch.float32, optimizer=optimizer,
    )  # fmt: skip
    _Decoded(model, store)
    for layer in layers.values():
        layer.table = None
    return store


def table_file(folder: Path, block: int) -> Path:
    """Where the table of a stored block lies in a folder."""
    return folder / f"stem-layer-{block}.safetensors"


def table_name(block: int) -> str:
    """The name of its tensors, which is that of the module in the decoder."""
    return f"model.layers.{block}.mlp.table"


def _stored(layer: StemFeedForward, dtype: str | None, group: int | None) -> tuple[RowFormat, int, Iterator[Parts]]:
    """(format, rows, their stored form piece by piece; floats in one piece, without a copy where none is needed)."""
    table: Any = layer.table
    if table is None:
        raise UsageError("the model was loaded without its tables; offload it with device='disk' and their folder")
    if isinstance(table, PackedEmbedding):
        packed = table.packed
        if packed.grid not in CODES or dtype not in (None, packed.grid):
            raise UsageError(f"the table is packed as {packed.grid}; tables in a store are int8, int4 or floats")
        count, width = packed.codes.shape
        format = RowFormat(packed.grid, width, None if packed.group == width else packed.group)
        return format, count, iter([format.of_codes(packed.codes, packed.step)])
    weight = table.weight.detach()
    names = {value: name for name, value in FLOATS.items()}
    format = RowFormat(dtype or names.get(weight.dtype, "fp32"), weight.shape[1], group)
    pieces = [weight] if format.dtype in FLOATS else weight.split(AT_ONCE)
    return format, len(weight), (format.encode(piece.cpu()) for piece in pieces)
