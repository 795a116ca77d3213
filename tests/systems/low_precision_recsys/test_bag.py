"""Lookups equal dequantise-then-EmbeddingBag, fused and not, for empty bags, weights and padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgewright.errors import Unsupported, UsageError
from edgewright.systems.dlrm.model import QREmbeddingBag
from edgewright.systems.low_precision_recsys import RowwiseQuantEmbeddingBag, quantize_rows, tables as module
from edgewright.systems.low_precision_recsys.tables import (
    Float16Rows,
    RowwiseQuantEmbedding,
    RowwiseQuantQRBag,
    StoredRows,
)

VALUES = torch.tensor([3, 9, 9, 0, 1, 2, 29, 4])
OFFSETS = torch.tensor([0, 0, 3, 3, 7, 8])  # bags of 0, 3, 0, 4 and 1
WEIGHTS = torch.linspace(-1.0, 1.0, 8)


def bag(dim: int = 12, **kinds: object) -> nn.EmbeddingBag:
    generator = torch.Generator().manual_seed(dim)
    weight = torch.randn(30, dim, generator=generator)
    kinds = {"mode": "sum", "include_last_offset": True, **kinds}
    return nn.EmbeddingBag(30, dim, _weight=weight, **kinds)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [12, 7])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_it_equals_dequantise_then_bag(bits: int, dim: int, mode: str) -> None:
    low = RowwiseQuantEmbeddingBag.from_float(bag(dim, mode=mode), bits, "minmax")
    table = low.stored.weight
    for weights in (None, WEIGHTS) if mode == "sum" else (None,):
        expected = F.embedding_bag(
            VALUES, table, OFFSETS, mode=mode, per_sample_weights=weights, include_last_offset=True
        )
        for fused in (None, False):
            low.fused = fused
            # sums in another order
            torch.testing.assert_close(low(VALUES, OFFSETS, weights), expected, rtol=1e-6, atol=1e-6)
    assert not low(VALUES, OFFSETS)[[0, 2]].any()
    without = RowwiseQuantEmbeddingBag(low.stored, mode)  # the last bag ends where the ids do
    assert torch.equal(without(VALUES, OFFSETS[:-1]), low(VALUES, OFFSETS)) or mode != "max"
    square = VALUES.reshape(2, 4)
    torch.testing.assert_close(low(square), low(VALUES, torch.tensor([0, 4, 8])), rtol=0, atol=0)
    assert low(square[:, :0]).shape == (2, dim) and not low(square[:, :0]).any()


def test_without_torchs_operators_plain_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    low = RowwiseQuantEmbeddingBag.from_float(bag(), 4)
    fused = low(VALUES, OFFSETS, WEIGHTS)
    monkeypatch.setattr(module, "fused_operator", lambda bits: None)
    torch.testing.assert_close(low(VALUES, OFFSETS, WEIGHTS), fused, rtol=1e-6, atol=1e-6)  # another order of adding


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_padding_is_left_out_and_exactly_zero(mode: str, bits: int) -> None:
    full = bag(padding_idx=9, mode=mode)
    with torch.no_grad():
        full.weight[9] = 3.0  # whatever stands there, a bag leaves it out
    if bits == 16:
        low = RowwiseQuantEmbeddingBag.like(full, StoredRows(Float16Rows(module.bag_weight(full).half())))
    else:
        low = RowwiseQuantEmbeddingBag.from_float(full, bits, "greedy", 25, 0.6)
    assert not low.stored.weight[9].any()
    with torch.no_grad():
        full.weight.copy_(low.stored.weight)
    torch.testing.assert_close(low(VALUES, OFFSETS), full(VALUES, OFFSETS), rtol=1e-6, atol=1e-6)
    assert not low(torch.tensor([9, 9]), torch.tensor([0, 2])).any()


def test_sums_in_half_precision_are_rounded_after_each_id() -> None:
    low = RowwiseQuantEmbeddingBag.from_float(bag(), 8, "minmax")
    low.accumulate = "fp16"
    found = low(VALUES, OFFSETS, WEIGHTS)
    rows = low.stored.weight
    for place in range(5):
        total = torch.zeros(12)
        for at in range(int(OFFSETS[place]), int(OFFSETS[place + 1])):
            total = (total + rows[VALUES[at]] * WEIGHTS[at]).half().float()
        assert torch.equal(found[place], total)
    low.accumulate = "fp32"
    assert not torch.equal(found, low(VALUES, OFFSETS, WEIGHTS))


def test_single_ids_and_quotients() -> None:
    rows = StoredRows(quantize_rows(bag().weight, 4))
    ids = torch.tensor([[1, 2], [3, 1]])
    assert torch.equal(RowwiseQuantEmbedding(rows)(ids), rows.weight[ids])
    for combine in ("mult", "add", "concat"):
        table = QREmbeddingBag(30, 12, 4, combine, torch.Generator().manual_seed(0))
        low = [StoredRows(quantize_rows(w, 8, "minmax")) for w in (table.quotient, table.remainder)]
        found = RowwiseQuantQRBag(table, *low)
        with torch.no_grad():
            table.quotient.copy_(low[0].weight)
            table.remainder.copy_(low[1].weight)
            assert torch.equal(found(VALUES, OFFSETS, WEIGHTS), table(VALUES, OFFSETS, WEIGHTS))


def test_bad_ids_and_arguments() -> None:
    low = RowwiseQuantEmbeddingBag.from_float(bag(), 4)
    for fused in (None, False):
        low.fused = fused
        with pytest.raises(IndexError, match="row 1 of the batch asks for id 30"):
            low(torch.tensor([3, 30]), torch.tensor([0, 1, 2]))
        with pytest.raises(IndexError, match="asks for id -1"):
            low(torch.tensor([-1]), torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="need offsets"):
        low(VALUES)
    with pytest.raises(UsageError, match="mode='mean'"):
        RowwiseQuantEmbeddingBag(low.stored, "mean")(VALUES, OFFSETS, WEIGHTS)
    with pytest.raises(UsageError, match="accumulate='fp8'"):
        RowwiseQuantEmbeddingBag(low.stored, accumulate="fp8")
    with pytest.raises(Unsupported, match="max_norm"):
        RowwiseQuantEmbeddingBag.from_float(bag(max_norm=1.0))
