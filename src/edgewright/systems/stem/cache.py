"""A cache of rows that keeps the frequent ones: least frequently used goes out, and only for something more frequent.

TinyLFU (Einziger, Friedman & Manes, arXiv 1512.00727): a count-min sketch remembers how often each id was asked for,
also of ids that are not in the cache, and forgets by halving. Tokens follow Zipf's law, which is what it is made for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgewright.errors import UsageError

HASHES = 4
MOST = 15  # counters have four bits
SAMPLE = 10  # times the capacity: requests after which all counts are halved
MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)  # odd 32-bit constants

Ids = np.ndarray[Any, Any]


class FrequencySketch:
    """Count-min sketch of requests. width: the next power of two above 8 x capacity, a row of counters each hash."""

    def __init__(self, capacity: int) -> None:
        self.bits = max(4, (8 * capacity - 1).bit_length())
        self.counters = np.zeros((HASHES, 1 << self.bits), np.uint8)
        self.requests, self.sample = 0, SAMPLE * capacity

    def _places(self, ids: Ids) -> Ids:
        """[HASHES, n]: multiplicative hashing, the highest bits of id * constant mod 2^32."""
        products = (ids.astype(np.uint64) + np.uint64(1)) * np.array(MULTIPLIERS, np.uint64)[:, None]
        return ((products & np.uint64(0xFFFFFFFF)) >> np.uint64(32 - self.bits)).astype(np.int64)

    def estimate(self, ids: Ids) -> Ids:
        """Requests of each id, [n]: never too few since the last halving, up to MOST."""
        places = self._places(ids)
        return np.min(np.stack([row[place] for row, place in zip(self.counters, places, strict=True)]), axis=0)

    def add(self, ids: Ids) -> bool:
        """Count a request of each of some distinct ids; True when the counts were halved after it."""
        for row, place in zip(self.counters, self._places(ids), strict=True):
            touched, times = np.unique(place, return_counts=True)
            row[touched] = np.minimum(row[touched] + times, MOST)
        self.requests += len(ids)
        if self.requests < self.sample:
            return False
        self.counters >>= 1
        self.requests //= 2
        return True


class RowCache:
    """`capacity` rows of width `width`, on a device. Not for several threads; the store calls it from one alone.

    A resident's frequency is its estimate at its latest request. A row that is not resident comes in while there is
    room, or for the resident of least frequency (of several, the one in the lowest slot) if that is strictly less.
    """

    def __init__(self, capacity: int, count: int, width: int, dtype: torch.dtype, device: str | torch.device) -> None:
        if capacity < 1:
            raise UsageError(f"a cache of {capacity} rows; give 1 or more")
        self.capacity = min(capacity, count)
        self.rows = torch.empty(self.capacity, width, dtype=dtype, device=device)
        self.sketch = FrequencySketch(self.capacity)
        self.slot_of = np.full(count, -1, np.int64)  # by id
        self.id_in = np.full(self.capacity, -1, np.int64)
        self.frequency = np.zeros(self.capacity, np.uint8)
        self.used = 0

    def request(self, ids: Ids) -> Ids:
        """Count a request of distinct ids; their slots [n], -1 where a row is not here."""
        if self.sketch.add(ids):
            self.frequency >>= 1
        slots = self.slot_of[ids]
        here = slots >= 0
        self.frequency[slots[here]] = self.sketch.estimate(ids[here])
        return slots

    def offer(self, ids: Ids, rows: Tensor) -> None:
        """Rows [n, width] of distinct ids that were requested and not here; they are admitted in order, or not."""
        estimates = self.sketch.estimate(ids)
        taken: dict[int, int] = {}  # slot -> which of the offered rows
        for i, (key, estimate) in enumerate(zip(ids.tolist(), estimates.tolist(), strict=True)):
            if self.slot_of[key] >= 0:
                continue
            if self.used < self.capacity:
                slot, self.used = self.used, self.used + 1
            else:
                slot = int(self.frequency.argmin())
                if estimate <= self.frequency[slot]:
                    continue
                self.slot_of[self.id_in[slot]] = -1
            self.slot_of[key], self.id_in[slot], self.frequency[slot] = slot, key, estimate
            taken[slot] = i
        if taken:
            slots, chosen = list(taken), list(taken.values())
            self.rows[torch.tensor(slots, device=self.rows.device)] = rows[torch.tensor(chosen, device=rows.device)]

    def update(self, ids: Ids, rows: Tensor) -> None:
        """New values of ids, for those that are here."""
        slots = self.slot_of[ids]
        here = np.flatnonzero(slots >= 0)
        if len(here):
            self.rows[torch.from_numpy(slots[here])] = rows[torch.from_numpy(here)].to(self.rows.dtype)

    def clear(self) -> None:
        """Forget the rows and keep the counts."""
        self.slot_of.fill(-1)
        self.id_in.fill(-1)
        self.frequency.fill(0)
        self.used = 0
