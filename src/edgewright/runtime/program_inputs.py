"""Inputs of exported programs: what a file asks for, arrays checked against it, arrays made up for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import UsageError

MAX_ELEMENTS = 1 << 31  # of one input made up by `stand_in_inputs`: a header that asks for more is not believed


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. shape: an int for a fixed size, None for a free one. dtype: NumPy's name, "float32"."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join('any' if size is None else str(size) for size in self.shape)}]"


def checked_inputs(
    specs: Sequence[TensorSpec], arrays: Sequence[np.ndarray] | Mapping[str, np.ndarray], path: Path
) -> list[np.ndarray]:
    """The arrays in the order of `specs`, each contiguous; UsageError where number, name, type or shape do not fit."""
    if isinstance(arrays, Mapping):
        names = [spec.name for spec in specs]
        if set(arrays) != set(names):
            raise UsageError(f"{path.name} takes the inputs {', '.join(names)}, got {', '.join(map(str, arrays))}")
        arrays = [arrays[name] for name in names]
    if len(arrays) != len(specs):
        raise UsageError(f"{path.name} takes {len(specs)} inputs ({_listed(specs)}), got {len(arrays)}")
    checked = []
    for spec, value in zip(specs, arrays, strict=True):
        array = np.asarray(value)
        fits = len(array.shape) == len(spec.shape) and all(
            wanted is None or wanted == size for wanted, size in zip(spec.shape, array.shape, strict=True)
        )
        if str(array.dtype) != spec.dtype or not fits:
            raise UsageError(f"{path.name} takes {spec}, got {array.dtype} {list(array.shape)}")
        checked.append(np.ascontiguousarray(array).reshape(array.shape))
    return checked


def stand_in_inputs(
    specs: Sequence[TensorSpec], *, batch: int = 1, length: int = 128, seed: int | None = 0
) -> list[np.ndarray]:
    """Inputs to time a program with: normal floats (zeros when `seed` is None), ones for integers and booleans.

    A free first axis gets `batch`, any other free axis `length`. One is a token, a segment and a mask that every model
    knows; the speed of a dense model does not depend on which. Raises UsageError for a type or size out of reason.
    """
    rng = np.random.default_rng(seed)
    arrays = []
    for spec in specs:
        shape = [size if size is not None else (batch if axis == 0 else length) for axis, size in enumerate(spec.shape)]
        count = 1
        for size in shape:
            count *= size
        if not 0 <= count <= MAX_ELEMENTS:
            raise UsageError(f"the input {spec} would have {count} elements; at most {MAX_ELEMENTS} are made up")
        kind: Any = np.dtype(spec.dtype)
        if kind.kind in "iub":
            arrays.append(np.ones(shape, kind))
        elif kind.kind == "f":
            values = np.zeros(shape) if seed is None else rng.standard_normal(shape, np.float32)
            arrays.append(values.astype(kind))
        else:
            raise UsageError(f"the input {spec} is neither numbers nor booleans; nothing can be made up for it")
    return arrays


def _listed(specs: Sequence[TensorSpec]) -> str:
    return "; ".join(map(str, specs))
