"""MovieLens 100k: its published numbers, and nothing of the test in what is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.io.bundled import bundled_data
from edgewright.systems.dlrm.click_log import cross, hash_ids, hash_texts
from edgewright.systems.dlrm.movielens import Split, movielens_100k


@pytest.fixture(scope="module")
def data() -> Split:
    return movielens_100k("time")


def test_the_published_numbers(data: Split) -> None:
    assert [len(part) for part in data] == [72_000, 8_000, 20_000]
    assert data.train.schema.sizes[:4] == (943, 1682, 2, 21)
    labels = torch.cat([part.labels for part in data])
    assert round(100 * float(labels.mean()), 1) == 55.4
    assert all(int(part.ids.max()) < 20_000 and bool(part.dense.isfinite().all()) for part in data)
    parts = [part.bags(slice(0, 50)).check(9) for part in data]
    assert all(int(bags.offsets[6].diff().max()) <= 6 for bags in parts)


def test_counts_are_of_earlier_samples_of_the_training_part(data: Split) -> None:
    users = data.train.users.tolist()
    earlier, seen = [], np.zeros(943, dtype=int)
    for user in users:
        earlier.append(seen[user])
        seen[user] += 1
    for part, counts in ((data.train, np.array(earlier)), (data.test, seen[data.test.users.numpy()])):
        np.testing.assert_allclose(part.dense[:, 2].numpy(), np.log1p(counts) / 3 - 1, rtol=1e-6, atol=1e-7)
    shuffled = movielens_100k("random", seed=1)
    first = {user: place for place, user in reversed(list(enumerate(shuffled.train.users.tolist())))}
    assert all(float(shuffled.train.dense[place, 2]) == -1 for place in first.values())


def test_crosses_are_pairs(data: Split) -> None:
    columns = data.test.schema.columns("user_item")
    ids = data.test.ids[:, columns].reshape(-1)
    user, item = (data.test.ids[:, data.test.schema.columns(name)].reshape(-1) for name in ("user", "item"))
    assert np.array_equal(ids.numpy(), cross(user.numpy(), item.numpy(), 20_000, salt=2))


def test_hashes_are_fixed_and_spread() -> None:
    # written down once: a hash that changes makes every saved model useless
    assert hash_ids(np.array([0, 1, -1]), 1000).tolist() == [55, 430, 696]
    assert hash_texts(["68fd1e64", "", "ä"], 1000, salt=3).tolist() == [277, 615, 966]
    counts = np.bincount(hash_ids(np.arange(100_000), 100), minlength=100)
    assert abs(counts - 1000).max() < 5 * 1000**0.5
    pairs = cross(np.repeat(np.arange(100), 100), np.tile(np.arange(100), 100), 1 << 40)
    assert len(set(pairs.tolist())) == 10_000  # (a, b) is not (b, a)


def test_bad_calls_and_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="split='later'"):
        movielens_100k("later")
    with pytest.raises(UsageError, match="unknown data set 'ml-1m'"):
        bundled_data("ml-1m")
    for file in bundled_data("ml-100k").glob("ml-100k.*e*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t1\tgood\t3\n"
    )
    with pytest.raises(FormatError, match="ml-100k.inter, line 2: could not convert"):
        movielens_100k(folder=tmp_path)
    (tmp_path / "ml-100k.inter").write_text("user_id:token\titem_id:token\n1\n")
    with pytest.raises(FormatError, match="line 2: 1 columns instead of 2"):
        movielens_100k(folder=tmp_path)
