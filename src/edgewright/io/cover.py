"""Whether boxes of elements make up a whole tensor: memory for it may be reserved only then, with no rest.

Files that hold a tensor in parts name each part's first element and its shape. Both may lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MOST_PARTS = 4096  # of one tensor; each of them is compared with each other


def cover_problem(parts: Sequence[tuple[Sequence[int], Sequence[int]]], shape: Sequence[int]) -> str | None:
    """Why the parts, pairs of (offsets, shape), are not exactly a tensor of `shape`; None where they are.

    Every element must be in one part and no element in two. Sizes and offsets must be whole numbers from 0 on.
    """
    if not parts:
        return "it has no parts"
    if len(parts) > MOST_PARTS:
        return f"it is in {len(parts)} parts, at most {MOST_PARTS} are allowed"
    for offsets, sizes in parts:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"a part has {len(sizes)} axes, the whole has {len(shape)}"
        if any(not 0 <= o <= o + n <= whole for o, n, whole in zip(offsets, sizes, shape, strict=True)):
            return f"the part {list(sizes)} at {list(offsets)} lies outside {list(shape)}"
    filled = [(offsets, sizes) for offsets, sizes in parts if math.prod(sizes)]
    if sum(math.prod(sizes) for _, sizes in filled) != math.prod(shape):
        return f"its parts do not have the {math.prod(shape)} elements of {list(shape)}"
    if len(filled) < 2 or not shape:
        return None if len(filled) < 2 else "it is there twice"
    first = np.array([offsets for offsets, _ in filled], dtype=np.int64)
    last = first + np.array([sizes for _, sizes in filled], dtype=np.int64)
    for k in range(len(filled)):
        if ((first[k] < last[k + 1 :]) & (first[k + 1 :] < last[k])).all(axis=1).any():
            return "two of its parts overlap"
    return None
