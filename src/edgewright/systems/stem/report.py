"""What the tables of a STEM model cost and save on a text: rows in use, bytes fetched, arithmetic left out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.systems.stem.layer import StemFeedForward, stem_blocks
from edgewright.systems.stem.store import EmbeddingStore


@dataclass(frozen=True)
class CapacityReport:
    """stem_layers: executed ones. stored: weights of the tables; active: those of the rows that this text uses, which
    grow with it. unique_tokens: of `tokens`. fetched_bytes: a token, without a cache and with each row once a sequence
    (distinct). hit_rate: of the store so far, None without one. saved_flops: a token, against the dense feed-forward of
    the same width, and as a share of the dense layer at this length (the paper's f / (4 d + 2 T + 3 f)).
    """

    stem_layers: int
    stored: int
    active: int
    tokens: int
    unique_tokens: int
    table_bytes: int
    fetched_bytes: float
    fetched_bytes_distinct: float
    hit_rate: float | None
    saved_flops: int
    saved_share_of_layer: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def capacity_report(model: nn.Module, ids: Tensor, store: EmbeddingStore | None = None) -> CapacityReport:
    """The report for tokens ids [B, T] (or [T]); unique tokens are counted over all of them."""
    layers = stem_blocks(model)
    config: Any = model.config
    executed = [layers[block] for block in config.share_map if block in layers]
    unique, length = len(torch.unique(ids)), ids.shape[-1]
    sizes = {block: _row_bytes(layer, block, store) for block, layer in layers.items()}
    per_token = sum(sizes[block] for block in config.share_map if block in layers)
    hits, misses = (store.stats()[name] for name in ("hits", "misses")) if store is not None else (0, 0)
    d, f = config.hidden_size, max(layer.intermediate for layer in executed)
    return CapacityReport(
        stem_layers=len(executed),
        stored=sum(layer.vocabulary * layer.intermediate for layer in layers.values()),
        active=sum(unique * layer.intermediate for layer in layers.values()),
        tokens=ids.numel(),
        unique_tokens=unique,
        table_bytes=sum(sizes[block] * layer.vocabulary for block, layer in layers.items()),
        fetched_bytes=float(per_token),
        fetched_bytes_distinct=sum(sizes.values()) * unique / ids.numel(),
        hit_rate=hits / (hits + misses) if hits + misses else None,
        saved_flops=sum(_saved(layer, d) for layer in executed),
        saved_share_of_layer=saved_share(d, f, length) if all(x.config.replace != "add" for x in executed) else 0.0,
    )


def saved_share(hidden: int, intermediate: int, length: int) -> float:
    """Share of a dense layer's multiplications in a prompt that STEM leaves out: f / (4 d + 2 T + 3 f)."""
    return intermediate / (4 * hidden + 2 * length + 3 * intermediate)


def row_cosine(table: Tensor, pairs: int = 20000, seed: int = 0) -> float:
    """Mean |cos| of random pairs of distinct rows [V, f]: how far the rows have spread in their space."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(table), (pairs,), generator=generator)
    second = (first + torch.randint(1, len(table), (pairs,), generator=generator)) % len(table)
    rows = nn.functional.normalize(table.detach().float(), dim=1)
    return float((rows[first] * rows[second]).sum(1).abs().mean())


def _saved(layer: StemFeedForward, hidden: int) -> int:
    """Operations a token: the matrix that is gone; a multiplication and an addition are two."""
    return 0 if layer.config.replace == "add" else 2 * hidden * layer.intermediate


def _row_bytes(layer: StemFeedForward, block: int, store: EmbeddingStore | None) -> int:
    if store is not None:
        return store.tables[block].format.row_bytes
    table: Any = layer.table
    if hasattr(table, "codes"):
        bits = {"int4": 4}.get(table.grid, 8)
        return table.codes.shape[1] * bits // 8 + 4 * table.step.shape[1]
    return layer.intermediate * table.weight.element_size()
