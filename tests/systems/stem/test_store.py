"""Tables outside the model: the same bits whatever the cache, the threads and their timing; training; shards."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgewright.errors import FormatError, UsageError
from edgewright.io.packed import PackedEmbedding
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.stem.convert import capacity_report
from edgewright.systems.stem.files import load_offloaded, save_stem
from edgewright.systems.stem.layer import stem_blocks
from edgewright.systems.stem.store import (
    SAMPLE,
    EmbeddingStore,
    RowCache,
    RowFormat,
    RowTable,
    offload_,
    table_file,
    write_table,
)
from edgewright.systems.stem.training import RowAdamW, StemAdamW, stem_groups
from edgewright.training import BlockBatches, TrainConfig, fit
from tests.systems.stem.toys import dense, logits, stem, tokens

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class Slow(RowTable):
    """Rows that come after a random while."""

    def read(self, ids: Tensor) -> Tensor:
        time.sleep(random.random() * 2e-3)
        return super().read(ids)


@pytest.mark.parametrize("device", ["cpu", "disk"])
@pytest.mark.parametrize(("cache", "prefetch"), [(0, 0), (0, 2), (1, 1), (7, 9), (64, 2)])
def test_the_bits_are_those_in_memory(device: str, cache: int, prefetch: int, tmp_path: Path) -> None:
    model, ids = stem(layers="all"), tokens()
    expected, made = logits(model, ids), model.generate(ids, **OPTIONS)
    path = tmp_path if device == "disk" else None
    store = offload_(model, device, path, cache_rows=cache, prefetch=prefetch)
    if device == "cpu":
        store.tables = {layer: Slow(rows.parts, rows.format) for layer, rows in store.tables.items()}
    assert not any("table" in name for name in model.state_dict())
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(model.generate(ids, **OPTIONS), made)
    stats = store.stats()
    assert stats["bytes"] == stats["misses"] * 48 * 4
    assert (stats["hits"] > 0) == (cache > 0)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_narrow_rows_are_those_of_the_rounded_model(dtype: str, device: str, tmp_path: Path) -> None:
    model, rounded, ids = stem(), stem(), tokens()
    format = RowFormat(dtype, 48, 16 if dtype == "int4" else None)
    for layer in stem_blocks(rounded).values():
        weight = layer.table.weight  # type: ignore[union-attr]
        weight.data = format.decode(format.encode(weight.data)).float()  # type: ignore[union-attr,arg-type]
    path = tmp_path if device == "disk" else None
    store = offload_(model, device, path, dtype=dtype, group=format.group, cache_rows=5)
    assert torch.equal(logits(model, ids), logits(rounded, ids))
    size = {"fp16": 96, "bf16": 96, "int8": 48 + 4, "int4": 24 + 3 * 4}[dtype]
    assert format.row_bytes == size and store.stats()["bytes"] == store.stats()["misses"] * size


def test_packed_tables_keep_their_codes() -> None:
    model, ids = stem(), tokens()
    quantize_(model, QuantConfig(rules=(Rule("*.mlp.table", WeightConfig("int8", scale="absmax")),)))
    convert_(model)
    expected = logits(model, ids)
    assert isinstance(stem_blocks(model)[1].table, PackedEmbedding)
    offload_(model)
    assert torch.equal(logits(model, ids), expected)


def test_the_cache_is_the_reference_simulator() -> None:
    """The policy again, one id after the other over lists; tokens by Zipf's law."""
    generator = np.random.default_rng(0)
    capacity, count = 6, 40
    cache = RowCache(capacity, count, 1, torch.float32, "cpu")
    slots, counts, requests = [-1] * capacity, Counter[int](), 0
    for _ in range(300):
        ids = np.unique(np.minimum(generator.zipf(1.3, size=int(generator.integers(1, 9))) - 1, count - 1))
        counts.update(ids.tolist())
        requests += len(ids)
        if requests >= SAMPLE * capacity:
            counts, requests = Counter({key: times // 2 for key, times in counts.items()}), requests // 2
        expected = [slots.index(key) if key in slots else -1 for key in ids.tolist()]
        assert cache.request(ids).tolist() == expected
        missing = np.array([key for key in ids.tolist() if key not in slots], np.int64)
        cache.offer(missing, torch.tensor(missing, dtype=torch.float32).unsqueeze(1))
        fresh: set[int] = set()
        for key in sorted(missing.tolist(), key=lambda key: -counts[key]):
            held = [counts[other] if other >= 0 else -1 for other in slots]
            old = [slot for slot in range(capacity) if slot not in fresh]
            slot = min(old, key=lambda slot: held[slot], default=None)
            if slot is not None and counts[key] > held[slot]:
                slots[slot] = key
                fresh.add(slot)
        assert cache.id_in.tolist() == slots
        assert cache.rows[: cache.used, 0].tolist() == slots[: cache.used]


def test_a_cache_finds_frequent_tokens() -> None:
    """The paper's > 80 % of hits, on Zipf's law, with a tenth of the rows."""
    rows = RowTable({"weight": torch.randn(4096, 2)}, RowFormat("fp32", 2))
    store = EmbeddingStore({1: rows}, cache_rows=410, prefetch=0)
    ranks = 1 / np.arange(1, 4097) ** 1.1
    drawn = np.random.default_rng(0).choice(4096, 2500, p=ranks / ranks.sum())
    for token in drawn:
        store.fetch(1, torch.tensor([token]))
    stats = store.stats()
    assert stats["hits"] / (stats["hits"] + stats["misses"]) > 0.7


def test_a_row_written_while_it_was_read_ahead_is_read_again() -> None:
    rows = Slow({"weight": torch.zeros(8, 2)}, RowFormat("fp32", 2))
    store = EmbeddingStore({1: rows}, cache_rows=2, optimizer=RowAdamW())
    ids = torch.tensor([2, 5])
    store.fetch(1, ids)
    store.request(1, ids)
    store.replace(1, ids, torch.ones(2, 2))
    assert torch.equal(store.fetch(1, ids), torch.ones(2, 2))


def test_lazy_adamw_is_adamw_where_every_row_is_touched() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    ours = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    options: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, **options)
    made = [
        StemAdamW([{"params": [p], "lr": 0.01, "weight_decay": 0.1, "lazy": lazy}], **options)
        for p, lazy in zip(ours, (True, False), strict=True)
    ]
    store = EmbeddingStore(
        {0: RowTable({"weight": start.clone()}, RowFormat("fp32", 4))},
        optimizer=RowAdamW(0.01, weight_decay=0.1, clip_norm=None, **options),
    )
    for _ in range(5):
        gradient = torch.randn(6, 4, generator=generator)
        theirs.grad = gradient.clone()
        for p in ours:
            p.grad = gradient.clone()
        store.scatter_grad(0, torch.arange(6), gradient / 2)
        store.scatter_grad(0, torch.arange(6), gradient / 2)
        for optimizer in (reference, *made):
            optimizer.step()
        store.step()
    for values in (*ours, store.fetch(0, torch.arange(6))):
        torch.testing.assert_close(values.data, theirs.data, rtol=1e-5, atol=1e-6)  # the same sums in another order


def test_lazy_rows_without_a_token_stay() -> None:
    p = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = StemAdamW([{"params": [p], "lr": 0.1, "weight_decay": 0.5, "lazy": True}])
    p.grad = torch.zeros(4, 2)
    p.grad[1] = 1.0
    optimizer.step()
    assert torch.equal(p.data[[0, 2, 3]], torch.ones(3, 2)) and float(p.data[1, 0]) < 1


def test_parts_are_clipped_by_norms_of_their_own() -> None:
    model = stem()
    groups = stem_groups(model, 0.1, clip_norm=0.5)
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    optimizer = StemAdamW(groups)
    model(tokens(), labels=tokens()).loss.backward()
    held = {id(layer.table.weight) for layer in stem_blocks(model).values()}  # type: ignore[union-attr]
    norms = {
        part: torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if (id(p) in held) == inside])
        for part, inside in (("backbone", False), ("tables", True))
    }  # fmt: skip
    optimizer.step()
    for part, norm in norms.items():
        assert optimizer.norms[part] == pytest.approx(float(norm), rel=1e-5)


def blocks() -> Tensor:
    return tokens(16, 12, seed=5)


def next_token(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


class WithStore:
    """A loss whose state is what the store learned, so that `fit` keeps it in its checkpoints."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store

    def __call__(self, model: Any, ids: Tensor) -> Tensor:
        return next_token(model, ids)

    def state_dict(self) -> dict[str, Any]:
        return self.store.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.store.load_state_dict(state)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_training_through_the_store_is_training_in_memory(place: str, tmp_path: Path) -> None:
    config = TrainConfig(4, clip_norm=None, schedule="constant")
    ours, theirs = stem(), stem()
    fit(
        theirs,
        next_token,
        BlockBatches(blocks(), 4),
        config,
        optimizer=StemAdamW(stem_groups(theirs, 1e-2)),
        progress=False,
    )
    adam = RowAdamW(weight_decay=0.1)
    store = offload_(ours, place, tmp_path if place == "disk" else None, cache_rows=9, trainable=adam)
    optimizer = StemAdamW(stem_groups(ours, 1e-2))
    store.attach(optimizer)
    fit(ours, WithStore(store), BlockBatches(blocks(), 4), config, optimizer=optimizer, progress=False)
    store.flush()
    for layer, block in stem_blocks(theirs).items():
        table = block.table.weight.data  # type: ignore[union-attr]
        rows = store.fetch(layer, torch.arange(64))
        # gradients of a row come in another order, which Adam's first steps enlarge
        torch.testing.assert_close(rows, table, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]
        assert not torch.equal(rows, stem_blocks(stem())[layer].table.weight.data)  # type: ignore[union-attr,arg-type]


def test_a_store_s_state_puts_training_back() -> None:
    def run(steps: int, store: EmbeddingStore, first: int = 0) -> None:
        for step in range(first, steps):
            ids = torch.tensor([step % 3, 5])
            store.scatter_grad(1, ids, torch.full((2, 48), 1.0 + step))
            store.step()

    whole, cut, again = (offload_(stem(), trainable=True) for _ in range(3))
    run(6, whole)
    run(3, cut)
    again.load_state_dict(cut.state_dict())
    run(6, again, 3)
    assert torch.equal(again.fetch(1, torch.arange(64)), whole.fetch(1, torch.arange(64)))


def test_a_folder_with_tables_in_shards_of_their_own(tmp_path: Path) -> None:
    model, ids = stem(), tokens()
    expected = logits(model, ids)
    save_stem(model, tmp_path / "m")
    assert table_file(tmp_path / "m", 3).is_file()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), ids), expected)
    backbone, store = load_offloaded(tmp_path / "m", cache_rows=4)
    assert torch.equal(logits(backbone, ids), expected)
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in model.parameters()) - 2 * 64 * 48
    report = capacity_report(backbone, ids, store)
    assert report.hit_rate is not None and report.table_bytes == 2 * 64 * 48 * 4
    save_stem(backbone, tmp_path / "again", store=store)
    for block in (1, 3):
        assert table_file(tmp_path / "m", block).read_bytes() == table_file(tmp_path / "again", block).read_bytes()


def test_missing_and_broken_shards_are_named(tmp_path: Path) -> None:
    save_stem(stem(), tmp_path / "m")
    table_file(tmp_path / "m", 3).rename(tmp_path / "kept")
    with pytest.raises(FormatError, match=r"stem-layer-3\.safetensors is missing; the rows of model.layers.3"):
        load_offloaded(tmp_path / "m")
    data = (tmp_path / "kept").read_bytes()
    table_file(tmp_path / "m", 3).write_bytes(data[:-7])
    with pytest.raises(FormatError, match=r"stem-layer-3\.safetensors"):
        load_offloaded(tmp_path / "m")
    write_table(table_file(tmp_path / "m", 3), 3, {"weight": torch.zeros(5, 48)})
    with pytest.raises(UsageError, match="holds 5 rows of 48; layer 3 has 64 of 48"):
        load_offloaded(tmp_path / "m")
    with pytest.raises(UsageError, match="no folder that save_stem wrote"):
        load_offloaded(tmp_path)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = stem()
    for arguments, message in (
        ({"device": "flash"}, "device='flash'"),
        ({"device": "disk"}, "give device='cpu', or device='disk' with path=FOLDER"),
        ({"dtype": "fp8"}, "dtype='fp8'; it must be one of fp32, fp16, bf16, int8, int4"),
        ({"dtype": "int4", "group": 7}, "group=7 does not divide rows of 48"),
        ({"cache_rows": -1}, "cache_rows=-1"),
    ):
        with pytest.raises(UsageError, match=message):
            offload_(model, **arguments)  # type: ignore[arg-type]
    store = offload_(model)
    with pytest.raises(UsageError, match="elsewhere already"):
        offload_(model)
    with pytest.raises(UsageError, match="row of the table=64; it must be a whole number from 0 to 63"):
        store.fetch(1, torch.tensor([3, 64]))
    with pytest.raises(UsageError, match="row of the table=-1"):
        store.request(1, torch.tensor([-1]))
    with pytest.raises(UsageError, match="layer of the store=2; it must be one of 1, 3"):
        store.fetch(2, torch.tensor([0]))
    for call in (lambda: store.step(), lambda: store.scatter_grad(1, torch.tensor([0]), torch.zeros(1, 48))):
        with pytest.raises(UsageError, match="this store is read-only; make it with trainable=True"):
            call()
    with pytest.raises(UsageError, match="the table is read-only; open the store with trainable=True"):
        store.replace(1, torch.tensor([0]), torch.zeros(1, 48))
    with pytest.raises(UsageError, match="has no STEM layers"):
        offload_(dense())
    with pytest.raises(UsageError, match="cannot be int4"):
        RowFormat("int4", 7)
    with pytest.raises(FormatError, match="is missing"):
        RowTable.open(tmp_path / "nowhere", "x")
    assert not list(tmp_path.glob("*.part"))
