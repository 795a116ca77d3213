"""Rows unpacked by arithmetic are the rows; files answer as the model; symmetric rows only where the gate lets them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgewright.errors import Unsupported, UsageError
from edgewright.runtime.program import open_program
from edgewright.systems.dlrm.clicks import ClickData, predict
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.dlrm.serving import DLRMProgram, requests
from edgewright.systems.low_precision_recsys import AccuracyGate, apply_recipe, quantize_rows, uniform_recipe
from edgewright.systems.low_precision_recsys.export import (
    Float16Decode,
    export_quantized,
    gathered,
    half_bytes,
    judge_symmetric,
    portable,
    symmetric,
    with_symmetric_rows,
)
from edgewright.systems.low_precision_recsys.precision_search import calibrated_recipe
from edgewright.systems.low_precision_recsys.tables import Float16Rows, StoredRows

SLOTS = (1, 3, 1)


def test_halves_from_bytes_exactly() -> None:
    every = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    assert torch.equal(Float16Decode()(half_bytes(every).float()), every.float())


@pytest.mark.parametrize("dim", [7, 8])
def test_gathered_rows_are_the_rows_bit_for_bit(dim: int) -> None:
    weight = torch.randn(40, dim, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 39], [7, 7]])
    forms = [quantize_rows(weight, bits, "minmax") for bits in (2, 4, 8)]
    forms += [quantize_rows(weight, 4, "kmeans"), quantize_rows(weight, 4, "kmeans", block=16)]
    for rows in (*forms, Float16Rows(weight.half())):
        stored = StoredRows(rows)
        assert torch.equal(gathered(stored)(ids), stored.vectors(ids))
    weight[0, 0] = torch.inf
    with pytest.raises(Unsupported, match="rows kept in float16"):
        gathered(StoredRows(quantize_rows(weight, 4, keep="fp16")))


def test_symmetric_rows_and_their_gate(model: DLRM, clicks: ClickData) -> None:
    low = apply_recipe(model, uniform_recipe(model, "int8", "fp16"))
    table = low.module.tables[0].stored
    values = symmetric(table)(torch.arange(40))
    assert float((values - table.weight).abs().max()) <= float(table.weight.abs().max()) / 127
    found = judge_symmetric(low, AccuracyGate(resamples=50), model, clicks)
    assert 0 < found.max_logit_difference < 0.3
    coarse = apply_recipe(model, uniform_recipe(model, "int2-greedy"))
    assert judge_symmetric(coarse, AccuracyGate(resamples=50), model, clicks).delta > found.delta
    assert not torch.equal(predict(with_symmetric_rows(coarse.module), clicks), predict(coarse, clicks))


@pytest.mark.parametrize("linear", ["int8-static", "int8-dynamic"])
def test_portable_models_compute_the_same(model: DLRM, clicks: ClickData, linear: str) -> None:
    few = clicks.rows(slice(0, 200))
    low = apply_recipe(model, uniform_recipe(model, "int4-greedy", linear), clicks)
    arrays = [torch.from_numpy(a) for a in requests(low.module, few.dense, few.bags(), SLOTS)]
    with torch.no_grad():
        found = DLRMProgram(portable(low.module, gathered), SLOTS)(*arrays)
    # sums in another order, which may move a rounded input by one code
    torch.testing.assert_close(found, predict(low, few).sigmoid(), rtol=0, atol=2e-3)


def test_narrow_and_quotient_tables() -> None:
    config = DLRMConfig(3, (50, 20, 10), 8, (8,), (4, 1), qr_threshold=40, table_dims=(8, 2, 8))
    model = DLRM(config).eval()
    for table in ("int8", "fp32"):
        low = apply_recipe(model, uniform_recipe(model, table, "fp16"))
        program = DLRMProgram(portable(low.module, gathered), [1, 1, 1])
        ids = torch.tensor([[49, 3, 9], [0, 19, 1]])
        dense = torch.randn(2, 3)
        from edgewright.systems.dlrm.clicks import jagged

        with torch.no_grad():
            expected = low(dense, jagged(ids, (1, 1, 1))).sigmoid()
            torch.testing.assert_close(program(dense, ids, torch.ones(2, 3)), expected, rtol=1e-5, atol=1e-6)


def test_an_onnx_file_answers_as_the_model(model: DLRM, clicks: ClickData, tmp_path: Path) -> None:
    options = {"table": "int4-greedy", "linear": "int8-static", "tables.0": "fp16", "tables.1": "int8"}
    low = apply_recipe(model, calibrated_recipe(model, options, clicks))
    done = export_quantized(low, tmp_path / "m.onnx", "onnx", slots=SLOTS)
    assert done.operators["QuantizeLinear"] > 0 and "rows are unpacked" in done.notes[-1]
    few = clicks.rows(slice(0, 100))
    with open_program(tmp_path / "m.onnx", check=False) as program:
        (found,) = program.run(requests(low.module, few.dense, few.bags(), SLOTS))
    # sums in another order, which moves a rounded input by one code now and then
    assert np.mean(np.abs(found - predict(low, few).sigmoid().numpy()) > 1e-4) <= 0.03


def test_an_executorch_file_with_symmetric_rows(clicks: ClickData, tmp_path: Path) -> None:
    data = clicks.tables(
        ("user", "tags")
    )  # one table of single ids, one of bags; one layer a network: lowering is slow
    model = DLRM(DLRMConfig(6, data.schema.sizes, 8, (8,), (1,), table_names=data.schema.tables)).eval()
    low = apply_recipe(model, uniform_recipe(model, "int8", "int8-dynamic"))
    gate = AccuracyGate(budget=1.0, resamples=50)
    slots = data.schema.slots
    done = export_quantized(low, tmp_path / "m.pte", "executorch", slots=slots, gate=gate, reference=model, data=data)
    assert "symmetric" in done.notes[-1]
    few = data.rows(slice(0, 100))
    with open_program(tmp_path / "m.pte", check=False) as program:
        (found,) = program.run(requests(low.module, few.dense, few.bags(), slots))
    expected = predict(with_symmetric_rows(low.module), few).sigmoid().numpy()
    # rounded inputs may move by one code
    assert np.mean(np.abs(found - expected) > 1e-4) <= 0.05


def test_any_module_with_ids_in_a_square(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.word = nn.EmbeddingBag(20, 8, mode="mean", padding_idx=0), nn.Embedding(9, 8)
            self.head = nn.Linear(8, 1)

        def forward(self, tags: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.bag(tags) * self.word(word)))

    torch.manual_seed(0)
    model = Small().eval()
    low = apply_recipe(model, uniform_recipe(model, "int4-minmax", "fp16"))
    inputs = (torch.tensor([[1, 0, 19], [0, 0, 0], [3, 3, 4]]), torch.tensor([8, 0, 1]))
    with torch.no_grad():
        torch.testing.assert_close(portable(low.module)(*inputs), low(*inputs), rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="no DLRM: give example arguments"):
        export_quantized(low, tmp_path / "m.onnx", "onnx")
    with pytest.raises(UsageError, match="with format 'onnx'"):
        export_quantized(low, tmp_path / "m.pte", "onnx", inputs=inputs)
