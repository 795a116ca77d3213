"""DLRM against a NumPy version written below, its variants, its files and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgewright.errors import FormatError, UsageError
from edgewright.systems.dlrm.clicks import JaggedBatch
from edgewright.systems.dlrm.model import DLRM, DLRMConfig, pair_indices

CONFIG = DLRMConfig(3, (10, 7, 20), dim=4, bottom=(6, 4), top=(5, 1))


def bags(weights: bool = False) -> JaggedBatch:
    """Four samples; bags of 0 to 3 ids."""
    values = (torch.tensor([3, 9, 0, 0]), torch.tensor([6]), torch.tensor([19, 1, 1, 4, 5]))
    offsets = (torch.tensor([0, 2, 2, 3, 4]), torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 4, 4, 5]))
    given = tuple(torch.linspace(0.5, 2.0, len(v)) for v in values) if weights else None
    return JaggedBatch(values, offsets, given)


def dense() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def numpy_dlrm(model: DLRM, x: np.ndarray, batch: JaggedBatch) -> np.ndarray:
    """One sample, one bag, one pair after the other, in float64."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def mlp(v: np.ndarray, name: str, last_relu: bool) -> np.ndarray:
        places = sorted({int(k.split(".")[1]) for k in state if k.startswith(name)})
        for place in places:
            v = state[f"{name}.{place}.weight"] @ v + state[f"{name}.{place}.bias"]
            v = np.maximum(v, 0) if last_relu or place != places[-1] else v
        return v

    logits = []
    for i in range(len(x)):
        vectors = [mlp(x[i], "bottom", True)]
        for k in range(len(batch.values)):
            total = np.zeros(model.config.dim)
            for j in range(int(batch.offsets[k][i]), int(batch.offsets[k][i + 1])):
                weight = batch.weight(k)
                total += state[f"tables.{k}.weight"][batch.values[k][j]] * (1 if weight is None else float(weight[j]))
            vectors.append(total)
        pairs = []
        for a in range(len(vectors)):
            for b in range(a + model.config.interaction_itself):
                pairs.append(vectors[a] @ vectors[b])
        joined = np.concatenate(vectors if model.config.interaction == "cat" else [vectors[0], pairs])
        logits.append(mlp(joined, "top", False)[0])
    return np.array(logits)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("change", [{}, {"interaction_itself": True}, {"interaction": "cat"}])
def test_it_equals_one_sample_at_a_time(change: dict[str, Any], weights: bool) -> None:
    fields = {name: getattr(CONFIG, name) for name in ("num_dense", "table_sizes", "dim", "bottom", "top")}
    model = DLRM(DLRMConfig(**{**fields, **change}))
    expected = numpy_dlrm(model, dense().double().numpy(), bags(weights))
    np.testing.assert_allclose(model(dense(), bags(weights)).detach().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_the_published_widths() -> None:
    criteo = DLRMConfig(13, (10,) * 26, 16, (512, 256, 64, 16), (512, 256, 1))
    assert criteo.interaction_width == 367
    itself = DLRMConfig(13, (10,) * 26, 16, (512, 16), (512, 1), interaction_itself=True)
    assert itself.interaction_width == 16 + 27 * 28 // 2
    assert pair_indices(4).tolist() == [4, 8, 9, 12, 13, 14]  # (1,0), (2,0), (2,1), (3,0), (3,1), (3,2)


def test_the_official_initialisation() -> None:
    model = DLRM(DLRMConfig(400, (4000, 2), 64, (64,), (1,)))
    assert abs(float(model.bottom[0].weight.detach().std()) / (2 / 464) ** 0.5 - 1) < 0.02
    rows = model.tables[0].weight.detach()
    assert float(rows.abs().max()) <= 4000**-0.5 and abs(float(rows.std()) * (3 * 4000) ** 0.5 - 1) < 0.01
    again = DLRM(DLRMConfig(400, (4000, 2), 64, (64,), (1,)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_sparse_gradients_equal_dense_ones() -> None:
    models = [DLRM(CONFIG), DLRM(CONFIG)]
    for table in models[1].tables:
        table.sparse = False
    for model in models:
        model(dense(), bags(True)).square().sum().backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert one.grad.is_sparse == (one.ndim == 2 and any(one is p for p in models[0].sparse_parameters()))
        # duplicates of one row are summed in another order
        torch.testing.assert_close(one.grad.to_dense(), other.grad, rtol=1.3e-6, atol=1e-7)


@pytest.mark.parametrize("combine", ["mult", "add", "concat"])
def test_quotient_and_remainder_equal_the_table_they_stand_for(combine: str) -> None:
    model = DLRM(DLRMConfig(3, (10, 7, 20), 4, (4,), (1,), qr_threshold=8, qr_collisions=3, qr_combine=combine))
    whole = DLRM(DLRMConfig(3, (10, 7, 20), 4, (4,), (1,)))
    assert [type(table).__name__ for table in model.tables] == ["QREmbeddingBag", "EmbeddingTable", "QREmbeddingBag"]
    assert model.tables[0].quotient.shape[0] == 4 and model.tables[2].quotient.shape[0] == 7
    whole.load_state_dict({k: v for k, v in model.state_dict().items() if "tables" not in k}, strict=False)
    with torch.no_grad():
        for ours, theirs, rows in zip(model.tables, whole.tables, (10, 7, 20), strict=True):
            if hasattr(ours, "vectors"):
                every = ours.vectors(torch.arange(rows))
                assert len(torch.unique(every, dim=0)) == rows  # each id has a vector of its own
                theirs.weight.copy_(every)
            else:
                theirs.weight.copy_(ours.weight)
    torch.testing.assert_close(model(dense(), bags(True)), whole(dense(), bags(True)), rtol=1e-5, atol=1e-6)
    model(dense(), bags()).sum().backward()
    assert all(parameter.grad.is_sparse for parameter in model.sparse_parameters())


def test_a_narrow_table_is_projected() -> None:
    model = DLRM(DLRMConfig(3, (10, 7, 20), 4, (4,), (1,), table_dims=(4, 2, 1)))
    wide = DLRM(DLRMConfig(3, (10, 7, 20), 4, (4,), (1,)))
    wide.load_state_dict({k: v for k, v in model.state_dict().items() if "tables" not in k}, strict=False)
    with torch.no_grad():
        wide.tables[0].weight.copy_(model.tables[0].weight)
        for k in (1, 2):
            wide.tables[k].weight.copy_(model.tables[k].table.weight @ model.tables[k].lift.T)
    torch.testing.assert_close(model(dense(), bags()), wide(dense(), bags()), rtol=1e-5, atol=1e-6)
    assert len(list(model.sparse_parameters())) == 3 and len(list(model.dense_parameters())) == 4 + 2


def test_ids_without_rows() -> None:
    far = JaggedBatch(tuple(v + 100 for v in bags().values), bags().offsets)
    with pytest.raises(IndexError, match="table genre has rows 0 to 9; row 0 of the batch asks for id 103"):
        DLRM(DLRMConfig(3, (10, 7, 20), 4, (4,), (1,), table_names=("genre", "b", "c")))(dense(), far)
    wrapped = DLRM(DLRMConfig(3, (10, 7, 20), 4, (4,), (1,), on_oob="mod"))
    near = JaggedBatch(tuple(v % n for v, n in zip(far.values, (10, 7, 20), strict=True)), far.offsets)
    assert torch.equal(wrapped(dense(), far), wrapped(dense(), near))
    default = DLRM(DLRMConfig(3, (10, 7, 20), 4, (4,), (1,), on_oob="default_row"))
    zeros = JaggedBatch(tuple(torch.zeros_like(v) for v in far.values), far.offsets)
    assert torch.equal(default(dense(), far), default(dense(), zeros))
    negative = JaggedBatch(tuple(-1 - v for v in bags().values), far.offsets)
    assert torch.equal(default(dense(), negative), default(dense(), zeros))


def test_dense_features_are_checked() -> None:
    model = DLRM(CONFIG)
    x = dense()
    x[2, 1] = float("nan")
    with pytest.raises(UsageError, match="dense feature 1 of row 2 is nan; .*nan_to_num"):
        model(x, bags())
    with pytest.raises(UsageError, match=r"dense features are float32\[4, 2\]; the model takes float32 \[samples, 3\]"):
        model(dense()[:, :2], bags())
    with pytest.raises(UsageError, match="3 rows of dense features and bags of 4 samples"):
        model(dense()[:3], bags())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bottom": (6, 5)}, r"ends with 5 units, the vectors have dim=4; e.g. bottom=\(6, 4\)"),
        ({"top": (5, 2)}, "top=.*widths that end in 1"),
        ({"table_sizes": (10, 0, 20)}, "table_sizes=.*each of a row"),
        ({"interaction": "sum"}, "interaction='sum'.*one of dot, cat"),
        ({"table_dims": (4, 5, 4)}, "table_dims=.*from 1 to dim=4"),
        ({"num_dense": 0}, "num_dense=0; it must be a whole number from 1"),
    ],
)
def test_shapes_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    given = {"num_dense": 3, "table_sizes": (10, 7, 20), "dim": 4, "bottom": (6, 4), "top": (5, 1)}
    with pytest.raises(UsageError, match=message):
        DLRMConfig(**{**given, **fields})


def test_saved_and_read_again(tmp_path: Path) -> None:
    model = DLRM(DLRMConfig(3, (10, 7, 20), 4, (4,), (1,), qr_threshold=15, table_names=("a", "b", "c")), seed=3)
    model.save_pretrained(tmp_path / "m")
    again = DLRM.from_pretrained(tmp_path / "m")
    assert again.config == model.config and torch.equal(again(dense(), bags()), model(dense(), bags()))


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read .*config.json"):
        DLRM.from_pretrained(tmp_path)
    DLRM(CONFIG).save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FormatError, match="not a usable safetensors file.*truncated"):
        DLRM.from_pretrained(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "top": [3]}))
    with pytest.raises(FormatError, match="no DLRMConfig: DLRMConfig top"):
        DLRM.from_pretrained(tmp_path / "m")
    config.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(FormatError, match="does not describe a DLRM"):
        DLRM.from_pretrained(tmp_path / "m")
