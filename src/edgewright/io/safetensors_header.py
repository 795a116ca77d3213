"""The header of a safetensors file, checked before any library reads the file.

Layout: 8 bytes of header length, that many bytes of JSON, then the data. Every tensor's bytes must follow from its
shape, and all tensors together must cover the data without overlap or hole.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgewright.errors import FormatError, UsageError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
MAX_DIMENSION = 2**63 - 1

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True)
class SafetensorsEntry:
    """One tensor of the header. start, end: bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_safetensors(path: str | Path) -> dict[str, SafetensorsEntry]:
    """Check the header of one safetensors file and return its tensors by name, in file order.

    Raises UsageError for a file that cannot be read, FormatError, naming file and field, for a broken one.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            return read_header(handle, size, path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def read_header(handle: IO[bytes], size: int, path: str | Path) -> dict[str, SafetensorsEntry]:
    """As `check_safetensors`, of an open stream at its start that has `size` bytes; `path` is its name in messages."""
    path = Path(path)
    prefix = handle.read(8)
    if len(prefix) < 8:
        raise _broken(path, f"it has {size} bytes, the header length alone takes 8")
    (length,) = struct.unpack("<Q", prefix)
    if length > size - 8:
        raise _broken(path, f"the header claims {length} bytes, but {size - 8} are left (truncated?)")
    if length > MAX_HEADER_BYTES:
        raise _broken(path, f"the header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    header = _parse(path, handle.read(length))
    entries = {
        name: _entry(path, name, fields, 8 + length) for name, fields in header.items() if name != "__metadata__"
    }
    _check_cover(path, entries, 8 + length, size)
    return entries


def _broken(path: Path, what: str) -> FormatError:
    return FormatError(f"{path} is not a usable safetensors file: {what}")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _broken(path, "its header does not start with '{'")
    # An entry is at least 50 bytes with three brackets; many more mean nested JSON, which grows twentyfold in memory.
    if text.count(b"[") + text.count(b"{") > len(text) // 8 + 16:
        raise _broken(path, "its header is nested more deeply than any list of tensors")

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise _broken(path, f"the key {key[:80]!r} occurs twice in its header")
            result[key] = value
        return result

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON in UTF-8 ({str(error)[:80]})") from error
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "__metadata__ is not a table of strings")
    return header


def _entry(path: Path, name: str, fields: Any, data_start: int) -> SafetensorsEntry:
    shown = repr(name[:80])
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {shown} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(path, f"tensor {shown} has the unknown dtype {str(dtype)[:40]!r}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise _broken(path, f"tensor {shown} has a shape that is not a list of at most {MAX_DIMENSIONS} sizes")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"tensor {shown} has data_offsets that are not [start, end] with start <= end")
    bits = DTYPE_BITS[dtype]
    for dimension in shape:
        bits *= dimension
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _broken(
            path, f"tensor {shown} spans {offsets[1] - offsets[0]} bytes, but {dtype} {shape} takes {-(-bits // 8)}"
        )
    return SafetensorsEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_DIMENSION for v in value)


def _check_cover(path: Path, entries: dict[str, SafetensorsEntry], start: int, size: int) -> None:
    reached = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != reached:
            fault = "overlaps the tensor before it" if entry.start < reached else "leaves a hole before it"
            raise _broken(path, f"tensor {name[:80]!r} {fault} (starts at byte {entry.start}, expected {reached})")
        reached = entry.end
    if reached != size:
        raise _broken(path, f"its tensors end at byte {reached}, but the file has {size} (truncated or padded?)")
