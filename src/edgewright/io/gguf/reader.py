"""GGUF files, versions 2 and 3: a reader that believes nothing the header says until it has been checked.

Every count, length and offset is compared with what is left of the file before anything is allocated for it, so a
hostile header costs at most a fixed multiple of its own size. Layout: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import FormatError, UsageError
from edgewright.io.gguf.types import GGML_TYPES, Array, decode

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Limits far above any published model (the largest vocabularies need about 1.3 million array elements).
MAX_HEADER_BYTES = 256 << 20
MAX_ARRAY_ELEMENTS = 4 << 20  # over all arrays of one file
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 48
MAX_ALIGNMENT = 1 << 20
MAX_PARTS = 4096
SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

# Value type id -> struct code. 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies. shape: torch order (rows first). offset: bytes from the start of the file, or of the part
    (counted from 0) of a split one.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    offset: int
    nbytes: int
    part: int = 0


class GGUFFile:
    """A checked GGUF file; tensor data stays on disk until it is asked for. The first part of a split file stands for
    all of them, which are opened by llama.cpp's naming (-00001-of-00003).

    metadata: key -> int, float, bool, str, or a list of one of them. value_types: key -> (type id, element type id or
    None) as the file wrote them. tensors: name -> GGUFTensor in file order. alignment, data_start: bytes. parts: the
    files, one where it is not split; size: their bytes together.
    Raises UsageError for a file that cannot be opened, FormatError for one that breaks a rule of the format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        first = _parse(self.path)
        self.version = first.version
        self.metadata: dict[str, Any] = first.metadata
        self.value_types: dict[str, tuple[int, int | None]] = first.value_types
        self.alignment = first.alignment
        self.data_start = first.data_start
        self.tensors: dict[str, GGUFTensor] = first.tensors
        self.parts: tuple[Path, ...] = (self.path, *self._add_parts())
        self.size = sum(part.stat().st_size for part in self.parts)
        self._bytes: list[Array] = [np.memmap(part, dtype=np.uint8, mode="r") for part in self.parts]

    def _add_parts(self) -> list[Path]:
        """Take in the tensors of the other parts where this is the first part of a split file."""
        place, count = split_place(self.path, self.metadata)
        if count == 1:
            return []
        named = SPLIT_NAME.fullmatch(self.path.name)
        if named is None or (int(named[2]), int(named[3])) != (place + 1, count):
            raise FormatError(
                f"{self.path} is part {place + 1} of {count} of a split GGUF file, but not named as one; llama.cpp "
                f"finds the others by the name NAME-{place + 1:05d}-of-{count:05d}.gguf"
            )
        paths = [self.path.with_name(f"{named[1]}-{number + 1:05d}-of-{count:05d}.gguf") for number in range(count)]
        if place:
            raise FormatError(
                f"{self.path} is part {place + 1} of {count} of a split GGUF file; pass the first, {paths[0]}"
            )
        for number, path in enumerate(paths[1:], 1):
            if not path.is_file():
                raise FormatError(
                    f"{self.path} is part 1 of {count} of a split GGUF file, and part {number + 1} is missing: {path}"
                )
            other = _parse(path)
            if split_place(path, other.metadata) != (number, count):
                raise FormatError(f"{path} does not say that it is part {number + 1} of {count} of {self.path}")
            for name, tensor in other.tensors.items():
                if name in self.tensors:
                    raise FormatError(f"{path} holds the tensor {name!r}, which another part of {self.path} holds too")
                self.tensors[name] = replace(tensor, part=number)
        total = self.metadata.get("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise FormatError(f"the parts of {self.path} hold {len(self.tensors)} tensors, the first names {total}")
        return paths[1:]

    def raw(self, name: str) -> Array:
        """The stored bytes of a tensor, uint8 [nbytes], a read-only view of the file."""
        tensor = self._tensor(name)
        return self._bytes[tensor.part][tensor.offset : tensor.offset + tensor.nbytes]

    def dequantize(self, name: str) -> Array:
        """The tensor's values, float32 in torch order. Raises Unsupported for a type without a decoder."""
        tensor = self._tensor(name)
        # memmap's own slicing costs more than small tensors do, hence the plain array.
        return decode(np.asarray(self.raw(name)), tensor.type_id).reshape(tensor.shape)

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise FormatError(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]


def split_place(path: Path, metadata: dict[str, Any]) -> tuple[int, int]:
    """(number from 0, parts in all) of a file that may be one part of a split one."""
    count, place = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if count == 0:  # llama.cpp takes it for not split
        return 0, 1
    if type(count) is not int or type(place) is not int or not 0 <= place < count <= MAX_PARTS:
        raise FormatError(f"{path} is not a usable GGUF file: split.no {place!r} of split.count {count!r}")
    return place, count


def _parse(path: Path) -> _Header:
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot read the GGUF file {path}: it is not a file")
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            header = mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ) if size else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the GGUF file {path}: {reason}") from error
    if header is None:
        raise FormatError(f"{path} is not a usable GGUF file: it is empty")
    with header:
        return _Header(path, header, size)


class _Header:
    """One pass over the header with a cursor that cannot leave the file."""

    def __init__(self, path: Path, buffer: mmap.mmap, size: int) -> None:
        self.path, self.buffer, self.size = path, buffer, size
        self.limit = min(size, MAX_HEADER_BYTES)
        self.position = 0
        self.elements_left = MAX_ARRAY_ELEMENTS
        self.metadata: dict[str, Any] = {}
        self.value_types: dict[str, tuple[int, int | None]] = {}

        if buffer[:4] != b"GGUF":
            raise self._broken(f"it starts with {buffer[:4]!r} instead of b'GGUF'")
        self.position = 4
        self.version = self._unpack("I", "version")
        if self.version not in VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", self.version))[0]
            hint = "; it is big-endian, which is not read here" if swapped in VERSIONS else ""
            raise self._broken(f"version is {self.version}, allowed are {VERSIONS[0]} and {VERSIONS[1]}{hint}")
        # The smallest key/value takes 8 + 1 + 4 + 1 bytes, the smallest tensor entry 8 + 1 + 4 + 8 + 4 + 8.
        tensor_count = self._count("tensor_count", 33, MAX_TENSORS)
        key_count = self._count("metadata_kv_count", 14, MAX_KEYS)
        for _ in range(key_count):
            self._read_key_value()
        self.alignment = self._read_alignment()
        entries = [self._read_tensor() for _ in range(tensor_count)]
        self.data_start = -(-self.position // self.alignment) * self.alignment
        self.tensors = self._place(entries)

    def _broken(self, what: str) -> FormatError:
        return FormatError(f"{self.path} is not a usable GGUF file: {what}")

    def _need(self, count: int, what: str) -> None:
        if count > self.limit - self.position:
            if self.limit < self.size:
                raise self._broken(f"{what} lies beyond the largest header read here ({MAX_HEADER_BYTES} bytes)")
            left = self.size - self.position
            raise self._broken(f"{what} needs {count} bytes at offset {self.position}, but only {left} are left")

    def _unpack(self, code: str, what: str) -> Any:
        width = struct.calcsize("<" + code)
        self._need(width, what)
        (value,) = struct.unpack_from("<" + code, self.buffer, self.position)
        self.position += width
        return value

    def _count(self, what: str, smallest: int, most: int) -> int:
        value = self._unpack("Q", what)
        if value > most:
            raise self._broken(f"{what} is {value}, at most {most} are allowed")
        self._need(value * smallest, f"{what} = {value}")
        return int(value)

    def _string(self, what: str, most: int | None = None) -> str:
        length = self._unpack("Q", f"the length of {what}")
        if most is not None and not 1 <= length <= most:
            raise self._broken(f"{what} is {length} bytes long, allowed are 1 to {most}")
        self._need(length, what)
        data = self.buffer[self.position : self.position + length]
        self.position += length
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._broken(f"{what} is not UTF-8") from error

    def _read_key_value(self) -> None:
        key = self._string("a metadata key", MAX_KEY_BYTES)
        shown = repr(key[:80])
        if key in self.metadata:
            raise self._broken(f"the metadata key {shown} occurs twice")
        kind = self._unpack("I", f"the type of {shown}")
        element: int | None = None
        value: Any
        if kind == ARRAY:
            element, value = self._array(shown)
        elif kind == STRING:
            value = self._string(f"the value of {shown}")
        elif kind in SCALARS:
            value = self._scalar(kind, shown)
        else:
            raise self._broken(f"{shown} has value type {kind}, allowed are 0 to 12")
        self.metadata[key] = value
        self.value_types[key] = (kind, element)

    def _scalar(self, kind: int, shown: str) -> Any:
        if kind == 7:
            byte = self._unpack("B", shown)
            if byte > 1:
                raise self._broken(f"{shown} is a boolean with the value {byte}")
            return bool(byte)
        return self._unpack(SCALARS[kind], shown)

    def _array(self, shown: str) -> tuple[int, list[Any]]:
        element = self._unpack("I", f"the element type of {shown}")
        length = self._unpack("Q", f"the length of {shown}")
        if element == ARRAY:
            raise self._broken(f"{shown} is an array of arrays, which no reader accepts")
        if element != STRING and element not in SCALARS:
            raise self._broken(f"{shown} has element type {element}, allowed are 0 to 8 and 10 to 12")
        if length > self.elements_left:
            raise self._broken(f"{shown} has {length} elements, at most {self.elements_left} are allowed here")
        self.elements_left -= length
        if element == STRING:
            self._need(8 * length, f"{shown} with {length} strings")
            return element, self._strings(length, shown)
        code = SCALARS[element]
        width = struct.calcsize("<" + code)
        self._need(width * length, f"{shown} with {length} elements")
        values = np.frombuffer(self.buffer[self.position : self.position + width * length], "<" + code).tolist()
        self.position += width * length
        return element, values

    def _strings(self, length: int, shown: str) -> list[str]:
        # The same checks as _string, inlined: a vocabulary and its merges are some hundred thousand strings.
        strings: list[str] = []
        position, limit, buffer = self.position, self.limit, self.buffer
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(length):
                if position + 8 > limit:
                    break
                end = position + 8 + unpack(buffer, position)[0]
                if end > limit:
                    break
                strings.append(buffer[position + 8 : end].decode("utf-8"))
                position = end
        except UnicodeDecodeError as error:
            raise self._broken(f"string {len(strings)} of {shown} is not UTF-8") from error
        if len(strings) < length:
            raise self._broken(f"string {len(strings)} of {shown} ends beyond the file or the header limit")
        self.position = position
        return strings

    def _read_alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._broken(
                f"general.alignment is {str(value)[:40]}, allowed is a power of two up to {MAX_ALIGNMENT}"
            )
        return value

    def _read_tensor(self) -> GGUFTensor:
        name = self._string("a tensor name", MAX_NAME_BYTES)
        rank = self._unpack("I", f"the number of dimensions of {name!r}")
        if not 1 <= rank <= MAX_DIMENSIONS:
            raise self._broken(f"tensor {name!r} has {rank} dimensions, allowed are 1 to {MAX_DIMENSIONS}")
        sizes = tuple(self._unpack("Q", f"a dimension of {name!r}") for _ in range(rank))
        type_id = self._unpack("I", f"the type of {name!r}")
        offset = self._unpack("Q", f"the offset of {name!r}")
        if type_id not in GGML_TYPES:
            raise self._broken(f"tensor {name!r} has the unknown type {type_id}")
        kind = GGML_TYPES[type_id]
        elements = math.prod(sizes)
        if not 1 <= elements <= MAX_ELEMENTS:
            raise self._broken(f"tensor {name!r} has dimensions {sizes}, allowed are 1 to 2^48 values in all")
        if sizes[0] % kind.block:
            raise self._broken(
                f"tensor {name!r} has rows of {sizes[0]} values, not a multiple of {kind.name}'s {kind.block}"
            )
        return GGUFTensor(name, sizes[::-1], type_id, kind.name, offset, elements // kind.block * kind.bytes)

    def _place(self, entries: list[GGUFTensor]) -> dict[str, GGUFTensor]:
        tensors: dict[str, GGUFTensor] = {}
        for entry in entries:
            if entry.name in tensors:
                raise self._broken(f"the tensor {entry.name!r} occurs twice")
            if entry.offset % self.alignment:
                raise self._broken(
                    f"tensor {entry.name!r} has offset {entry.offset}, not a multiple of {self.alignment}"
                )
            start = self.data_start + entry.offset
            end = start + entry.nbytes
            if end > self.size:
                raise self._broken(f"tensor {entry.name!r} ends at byte {end}, the file at {self.size} (truncated?)")
            tensors[entry.name] = GGUFTensor(
                entry.name, entry.shape, entry.type_id, entry.type_name, start, entry.nbytes
            )
        before: GGUFTensor | None = None
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if before is not None and tensor.offset < before.offset + before.nbytes:
                raise self._broken(f"tensors {before.name!r} and {tensor.name!r} overlap")
            before = tensor
        return tensors
