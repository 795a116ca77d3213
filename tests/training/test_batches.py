"""BlockBatches: every row once an epoch, position as the whole state."""

from __future__ import annotations

import json

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.training import BlockBatches, ResumableBatches


def rows(count: int) -> torch.Tensor:
    return torch.arange(count).unsqueeze(1).expand(count, 3)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (4, 4), (3, 8), (1, 1)])
def test_each_row_once_an_epoch_in_a_new_order(count: int, size: int) -> None:
    batches = BlockBatches(rows(count), size, seed=5)
    stream = torch.cat([next(batches) for _ in range(4 * count)])
    assert stream.shape == (4 * count * size, 3)
    epochs = stream[: 4 * size * count, 0].split(count)
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    if count == 7:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


def test_seeds_and_structures() -> None:
    plain, again, other = (BlockBatches(rows(50), 5, seed) for seed in (1, 1, 2))
    named = BlockBatches({"a": rows(50), "b": rows(50)[:, 0]}, 5, 1)
    first = next(plain)
    assert torch.equal(first, next(again)) and not torch.equal(first, next(other))
    batch = next(iter(named))
    assert torch.equal(batch["a"], first) and torch.equal(batch["b"], first[:, 0])
    assert plain.per_epoch == 10


def test_state_and_skip_reach_the_same_place() -> None:
    walked, skipped, restored = (BlockBatches(rows(7), 3) for _ in range(3))
    for _ in range(10):
        next(walked)
    skipped.skip(10)
    restored.load_state_dict(json.loads(json.dumps(walked.state_dict())))
    for _ in range(5):
        expected = next(walked)
        assert torch.equal(expected, next(skipped)) and torch.equal(expected, next(restored))
    assert isinstance(walked, ResumableBatches) and not isinstance(iter([]), ResumableBatches)


def test_state_of_other_data_is_refused_by_name() -> None:
    state = BlockBatches(rows(7), 3).state_dict()
    for other, field in [
        (BlockBatches(rows(7), 4), "batch_size"),
        (BlockBatches(rows(7), 3, seed=1), "seed"),
        (BlockBatches(rows(8), 3), "rows"),
        (BlockBatches(rows(7) + 1, 3), "content"),
    ]:
        with pytest.raises(UsageError, match=f"the {field}.* of the batches was"):
            other.load_state_dict(state)


def test_bad_input() -> None:
    for blocks in (rows(0), {}, {"a": rows(2), "b": rows(3)}):
        with pytest.raises(UsageError, match="one row or more"):
            BlockBatches(blocks, 1)
    with pytest.raises(UsageError, match="batch_size=0"):
        BlockBatches(rows(2), 0)
