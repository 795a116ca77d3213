"""Rows of tokens drawn from shards: shuffled without memory, each a pure function of seed and place.

The stream is endless; every row comes once an epoch. The order of an epoch is a permutation computed for each place
alone (a Feistel network on the bits of the place, walked until it falls into range; Black & Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002), so that a resume starts anywhere at once, however large the corpus is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.checks import check, whole
from edgewright.errors import FormatError, UsageError
from edgewright.io.hashing import mix64
from edgewright.io.shards import TokenShards

ROUNDS = 6


class TokenStream:
    """Endless batches int64 [batch_size, length] from one split of token shards.

    Neighbouring rows of a shard share one token, so that with `length` = context + 1 every token is predicted once.
    Rows do not cross shards; documents inside a row are parted by the end token alone. The processes of a distributed
    run take batches in turn (`skip`), so the rows of an update do not depend on their number.
    Raises UsageError for sizes that cannot work or a split with less than one row.
    """

    def __init__(self, shards: TokenShards, split: str, length: int, batch_size: int, seed: int = 0) -> None:
        check("length", length, whole(2))
        check("batch_size", batch_size, whole(1))
        check("seed", seed, whole(0))
        self.shards, self.split, self.length = shards, split, length
        self.batch_size, self.seed, self.position = batch_size, seed, 0
        self._parts = shards.of(split)
        counts = [(part.tokens - 1) // (length - 1) for part in self._parts]
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self.rows = int(self._ends[-1]) if counts else 0
        if self.rows < 1:
            raise UsageError(
                f"the {split} split of {shards.folder} has {shards.total(split)} tokens, less than one row of "
                f"{length}; pass more text, or a shorter context"
            )

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        batch = self.read(self.numbers(self.position, self.batch_size))
        self.position += self.batch_size
        return batch

    @property
    def per_epoch(self) -> float:
        """Batches in one pass over the rows."""
        return self.rows / self.batch_size

    def numbers(self, start: int, count: int) -> NDArray[np.int64]:
        """Which rows stand at places start .. start + count of the endless stream. [count]."""
        places = np.arange(start, start + count, dtype=np.int64)
        epochs, inside = places // self.rows, places % self.rows
        parts = [permuted(inside[epochs == e], self.rows, (self.seed, int(e))) for e in np.unique(epochs)]
        return np.concatenate(parts)

    def read(self, numbers: NDArray[np.int64]) -> Tensor:
        """The rows of these numbers, in the order of the text. int64 [len(numbers), length]; FormatError for ids
        beyond the vocabulary.
        """
        batch = np.empty((len(numbers), self.length), dtype=np.int64)
        for place, number in enumerate(numbers):
            part = int(np.searchsorted(self._ends, number, side="right"))
            first = int(number) - (int(self._ends[part - 1]) if part else 0)
            begin = first * (self.length - 1)
            batch[place] = self.shards.tokens(self._parts[part])[begin : begin + self.length]
            if (most := batch[place].max()) >= self.shards.vocab_size:
                path = self.shards.folder / self._parts[part].name
                raise FormatError(
                    f"the shard {path} holds the id {most}; the vocabulary is 0 to {self.shards.vocab_size - 1}"
                )
        return torch.from_numpy(batch)

    def skip(self, count: int = 1) -> None:
        """Pass over `count` batches without reading them."""
        self.position += count * self.batch_size

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "split": self.split,
            "length": self.length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "digest": self.shards.digest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the saved position; raises UsageError when shards, sizes or seed are others."""
        for field, now in self.state_dict().items():
            if field != "position" and state.get(field) != now:
                meaning = "content of the shards (digest)" if field == "digest" else field
                raise UsageError(f"cannot resume: the {meaning} was {state.get(field)}, now {now}")
        position = state["position"]
        if type(position) is not int or not 0 <= position < 2**62:
            raise FormatError(f"cannot resume: the position of the batches is {position!r:.80}, no row that there is")
        self.position = position


def permuted(places: NDArray[np.int64], size: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Where a permutation of range(size), drawn from `seed`, puts each of `places`."""
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    low = np.uint64(2**half - 1)
    keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & low
        for key in keys:
            left, right = right, left ^ (mix64(right ^ key) & low)
        values[outside] = (left << np.uint64(half)) | right
        outside[outside] = values[outside] >= size
    return values.astype(np.int64)
