"""Rows from shards: every token predicted once an epoch, any place at once, whatever the number of processes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as some

from edgewright.errors import FormatError, UsageError
from edgewright.io.shards import TokenShards, open_shards, write_shards
from edgewright.training import ResumableBatches
from edgewright.training.token_stream import TokenStream, permuted


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    texts = [f"{number} {'x' * (number % 40)}" for number in range(60)]
    folder = tmp_path_factory.mktemp("shards")
    common = {"tokenizer": "bytes", "vocab_size": 257, "end_token": 256, "shard_bytes": 400}
    return write_shards(folder, texts, lambda batch: [list(text.encode()) for text in batch], **common)  # type: ignore


@settings(deadline=None, max_examples=40)
@given(size=some.integers(1, 3000), seed=some.integers(0, 2**32))
def test_a_permutation_of_any_size(size: int, seed: int) -> None:
    found = permuted(np.arange(size), size, (seed, 1))
    assert np.array_equal(np.sort(found), np.arange(size))
    part = np.arange(size)[:: max(1, size // 7)]
    assert np.array_equal(permuted(part, size, (seed, 1)), found[part])  # each place by itself


def test_a_permutation_looks_random() -> None:
    """Correlation of neighbours and of place with value: for a random order both have a spread of 1 / sqrt(size)."""
    size = 5000
    order = permuted(np.arange(size), size, (3, 0)).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / size**0.5
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 4 / size**0.5
    assert abs(float((order == np.arange(size)).sum()) - 1) < 6


def test_each_row_once_an_epoch_and_each_token_predicted_once(shards: TokenShards) -> None:
    stream = TokenStream(shards, "training", 9, 1, seed=2)
    first, second = (torch.cat([next(stream) for _ in range(stream.rows)]) for _ in range(2))
    assert first.dtype == torch.int64 and first.shape == (stream.rows, 9)
    in_order = stream.read(np.arange(stream.rows))
    assert not torch.equal(first, second) and not torch.equal(first, in_order)
    for epoch in (first, second):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, in_order.tolist()))
    start = 0
    for shard in shards.of("training"):
        count = (shard.tokens - 1) // 8
        rows = in_order[start : start + count]
        assert torch.equal(rows[:, 1:].flatten(), torch.from_numpy(shards.tokens(shard)[1 : 1 + 8 * count].astype(int)))
        assert torch.equal(rows[1:, 0], rows[:-1, -1])
        start += count
    assert start == stream.rows


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_the_rows_of_an_update_do_not_depend_on_the_processes(shards: TokenShards, processes: int) -> None:
    whole = TokenStream(shards, "training", 9, 6)
    expected = torch.cat([next(whole) for _ in range(5)])
    ranks = [TokenStream(shards, "training", 9, 6 // processes) for _ in range(processes)]
    parts = []
    for _ in range(5):
        for rank, stream in enumerate(ranks):  # as the loop takes its batches
            stream.skip(rank)
            parts.append(next(stream))
            stream.skip(processes - 1 - rank)
    assert torch.equal(torch.cat(parts), expected)


def test_state_is_the_place(shards: TokenShards) -> None:
    walked, restored = (TokenStream(shards, "training", 9, 4) for _ in range(2))
    for _ in range(30):
        next(walked)
    restored.load_state_dict(json.loads(json.dumps(walked.state_dict())))
    assert torch.equal(next(walked), next(restored)) and isinstance(walked, ResumableBatches)
    for other in (TokenStream(shards, "training", 9, 4, 1), TokenStream(shards, "training", 8, 4)):
        with pytest.raises(UsageError, match="cannot resume"):
            other.load_state_dict(walked.state_dict())


def test_bad_sizes_and_damaged_rows(shards: TokenShards) -> None:
    for length, size in ((1, 1), (9, 0), (10**6, 1)):
        with pytest.raises(UsageError):
            TokenStream(shards, "validation", length, size)
    shard = shards.of("training")[0]
    path = shards.folder / shard.name
    good = path.read_bytes()
    path.write_bytes(b"\xff\xff" * shard.tokens)
    try:
        stream = TokenStream(open_shards(shards.folder, verify=False), "training", 9, 1)
        with pytest.raises(FormatError, match=f"{shard.name} holds the id 65535"):
            stream.read(np.array([0]))
    finally:
        path.write_bytes(good)
