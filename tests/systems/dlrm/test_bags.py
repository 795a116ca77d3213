"""Bags: what is refused, and that the padded and the jagged form are the same."""

from __future__ import annotations

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.systems.dlrm.clicks import JaggedBatch, OutOfRangeId, check_ids, jagged, padded


def batch(offsets: list[int], values: list[int] | None = None) -> JaggedBatch:
    ids = torch.tensor([5, 1, 2] if values is None else values, dtype=torch.int64)
    return JaggedBatch((ids,), (torch.tensor(offsets),))


def test_padded_and_jagged_are_the_same_bags() -> None:
    ids = torch.tensor([[4, -1, 7], [2, 3, -1], [0, -1, -1]], dtype=torch.int32)
    bags = jagged(ids, (1, 2))
    assert [v.tolist() for v in bags.values] == [[4, 2, 0], [7, 3]]
    assert [o.tolist() for o in bags.offsets] == [[0, 1, 2, 3], [0, 1, 2, 2]]
    there, weights = padded(bags, (1, 2))
    assert there.tolist() == [[4, 7, 0], [2, 3, 0], [0, 0, 0]]
    assert weights.tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0]]


def test_a_bag_longer_than_its_room_is_refused() -> None:
    with pytest.raises(UsageError, match=r"row 1 of the batch has a bag of 2 ids, .* max_bag=2"):
        padded(batch([0, 1, 3]), (1,))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 3], "must begin with 0"),
        ([0, 3, 2, 3], "never fall"),
        ([0, 1, 2], "end with 3"),
        ([0.0, 3.0], "one row of int64"),
    ],
)
def test_offsets_that_cannot_be_are_refused(offsets: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        batch(offsets).check(1, ("item",))


def test_lengths_and_types_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="bags for 1 tables .* the model has 2"):
        batch([0, 3]).check(2)
    floats = JaggedBatch((torch.tensor([1.5]),), (torch.tensor([0, 1]),))
    with pytest.raises(UsageError, match=r"table item: values are float32\[1\]"):
        floats.check(1, ("item",))
    ids, ends = torch.tensor([0]), torch.tensor([0, 1])
    with pytest.raises(UsageError, match="3 offsets, 2 expected"):
        JaggedBatch((ids, ids), (ends, torch.tensor([0, 1, 1]))).check(2)
    with pytest.raises(UsageError, match="2 weights for 1 values"):
        JaggedBatch((ids,), (ends,), (torch.ones(2),)).check(1)


@pytest.mark.parametrize("wrong", [9, -1])
def test_an_id_without_a_row_names_table_id_and_sample(wrong: int) -> None:
    values, offsets = torch.tensor([5, 1, wrong]), torch.tensor([0, 2, 2, 3])
    with pytest.raises(IndexError, match=rf"table item has rows 0 to 8; row 2 of the batch asks for id {wrong}"):
        check_ids(values, 9, "item", offsets)
    assert issubclass(OutOfRangeId, UsageError)
