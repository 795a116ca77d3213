"""A GGUF v3 writer: metadata and tensors as plain data; bytes are streamed, so one tensor is in memory at a time.

Own writer because the block types 41 and 42 are younger than the type table of the `gguf` package, whose writer refuses
what its table lacks. Layout: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgewright.io.gguf.types import GGML_TYPES

Array = np.ndarray[Any, Any]

ALIGNMENT = 32
VERSION = 3

# Kind -> (GGUF value type id, struct code). "[kind]" is an array of that kind.
KINDS: dict[str, tuple[int, str]] = {
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "str": (8, ""),
    "u64": (10, "<Q"),
}
ARRAY = 9

# key -> (kind, value), for example "llama.block_count": ("u32", 30).
Metadata = Mapping[str, tuple[str, Any]]


@dataclass(frozen=True)
class TensorSource:
    """One tensor to write. shape: torch order (rows first). data: called once, gives its bytes as uint8."""

    name: str
    shape: Sequence[int]
    type_id: int
    data: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        kind = GGML_TYPES[self.type_id]
        return int(np.prod(self.shape)) // kind.block * kind.bytes


def write_gguf(
    path: str | Path,
    metadata: Metadata,
    tensors: Sequence[TensorSource],
    on_tensor: Callable[[TensorSource], None] | None = None,
) -> None:
    """Write a GGUF file; `on_tensor` is called after each tensor. Raises OSError when the disk is full."""
    with Path(path).open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
        for key, (kind, value) in metadata.items():
            file.write(_string(key) + _value(kind, value))
        offset = 0
        for tensor in tensors:
            dimensions = tuple(reversed(tensor.shape))
            file.write(_string(tensor.name) + struct.pack("<I", len(dimensions)))
            file.write(struct.pack(f"<{len(dimensions)}QIQ", *dimensions, tensor.type_id, offset))
            offset += _padded(tensor.nbytes)
        _pad(file)
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.data()).reshape(-1).view(np.uint8)
            if len(data) != tensor.nbytes:
                raise AssertionError(f"{tensor.name}: {len(data)} bytes instead of {tensor.nbytes}")
            file.write(data.data)
            _pad(file)
            if on_tensor is not None:
                on_tensor(tensor)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad(file: BinaryIO) -> None:
    position = file.tell()
    file.write(b"\0" * (_padded(position) - position))


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _scalars(kind: str, values: Iterable[Any]) -> bytes:
    if kind == "str":
        return b"".join(_string(value) for value in values)
    code = KINDS[kind][1]
    return b"".join(struct.pack(code, value) for value in values)


def _value(kind: str, value: Any) -> bytes:
    if kind.startswith("["):
        element = kind[1:-1]
        return struct.pack("<IIQ", ARRAY, KINDS[element][0], len(value)) + _scalars(element, value)
    return struct.pack("<I", KINDS[kind][0]) + _scalars(kind, [value])
