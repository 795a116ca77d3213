"""The state of a checkpoint as JSON and tensors: a tree of dicts, lists, tuples, tensors, arrays, numbers and texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgewright.errors import FormatError, UsageError
from edgewright.training.distributed import cuts, is_split, zeros_like_split

TAGS = ("__tensor__", "__part__")  # keys of a whole tensor and of a split one in the JSON of a tree


@dataclass(frozen=True)
class Part:
    """Stands in a saved state for a tensor that is split over processes and lies in the files under `key`.

    shape and dtype of the whole; cuts: for each dimension of the mesh the tensor's dimension that it splits, or None.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    cuts: tuple[int | None, ...]

    @classmethod
    def of(cls, key: str, tensor: Any) -> Part:
        """The stand-in of a split tensor."""
        return cls(key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), cuts(tensor))

    def empty(self, parameter: Tensor) -> Tensor:
        """Zeros for the tensor, on the mesh of the parameter whose state it is; whole where the parameter is whole."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise FormatError(f"the state {self.key!r} is of an unknown type {self.dtype[:20]!r}")
        if not is_split(parameter):
            return torch.zeros(self.shape, dtype=dtype, device=parameter.device)
        mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
        if len(self.cuts) != mesh.ndim:
            raise UsageError(
                f"the state {self.key!r} was split over a mesh of {len(self.cuts)} dimensions, and the model is over "
                f"one of {mesh.ndim}; resume on a mesh of as many dimensions"
            )
        return zeros_like_split(self.shape, dtype, parameter, self.cuts)


def encode_state(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """JSON for a tree; tensors go to `tensors` and leave their key. Tags are dicts whose one key starts with "__"."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise UsageError(f"{place} is a {value.layout} tensor, which a checkpoint cannot hold: make it dense")
        key = f"{len(tensors):05d} {place}"
        tensors[key] = value
        if not is_split(value):
            return {"__tensor__": key}
        part = Part.of(key, value)
        return {"__part__": key, "shape": list(part.shape), "dtype": part.dtype, "cuts": list(part.cuts)}
    if isinstance(value, np.ndarray):
        return {"__array__": encode_state(torch.from_numpy(np.ascontiguousarray(value)), tensors, place)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"__tuple__": [encode_state(part, tensors, f"{place}[{i}]") for i, part in enumerate(value)]}
    if isinstance(value, list):
        return [encode_state(part, tensors, f"{place}[{i}]") for i, part in enumerate(value)]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: encode_state(part, tensors, f"{place}.{key}") for key, part in value.items()}
        pairs = [
            [encode_state(key, tensors, place), encode_state(part, tensors, f"{place}.{key}")]
            for key, part in value.items()
        ]
        return {"__pairs__": pairs}
    kind = type(value).__name__
    raise UsageError(f"{place} is of type {kind}, which a checkpoint cannot hold: use tensors and JSON values")


def decode_state(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree again. A tensor that was split and is not among `tensors` is a `Part`, to be filled by its place."""
    if isinstance(tree, list):
        return [decode_state(part, tensors) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "__tensor__" in tree:
        return tensors[tree["__tensor__"]]
    if "__part__" in tree:
        if (key := tree["__part__"]) in tensors:
            return tensors[key]
        return Part(key, tuple(tree["shape"]), tree["dtype"], tuple(tree["cuts"]))
    if "__array__" in tree:
        return decode_state(tree["__array__"], tensors).numpy()
    if "__tuple__" in tree:
        return tuple(decode_state(part, tensors) for part in tree["__tuple__"])
    if "__pairs__" in tree:
        return {decode_state(key, tensors): decode_state(part, tensors) for key, part in tree["__pairs__"]}
    return {key: decode_state(part, tensors) for key, part in tree.items()}


def check_state(value: Any, place: str) -> None:
    """Raise UsageError now rather than at the first checkpoint when `value` could not be saved."""
    encode_state(value, {}, place)


def describe(tensor: Tensor) -> str:
    """Dtype and shape, as in "float32[64, 128]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
