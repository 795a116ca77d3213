"""The outside of an ExecuTorch file (.pte): magic, extended header and segments, checked before a runtime sees it.

Layout (ExecuTorch's schema/program.fbs and schema/extended_header.h): bytes 0-3 offset of the flatbuffer's root, 4-7
the identifier "ET12", from byte 8 the extended header: "eh00", its length u32, size of the flatbuffer u64, where the
data segments begin u64 and, in newer files, their size u64. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from edgewright.errors import FormatError

IDENTIFIER = b"ET12"
HEADER = b"eh00"
HEADER_AT = 8
SEGMENTS, CONSTANTS = 4, 5  # fields of the table Program
MAX_SEGMENTS = 1 << 20
DATA_SIZE_AT = HEADER_AT + 24


@dataclass(frozen=True)
class Segment:
    """A block of bytes after the flatbuffer, offset from the first. fields: places of offset and size, or 0."""

    offset: int
    size: int
    fields: tuple[int, int]


@dataclass(frozen=True)
class PTELayout:
    """program: bytes of the flatbuffer. base: where segments begin. constants: (segment, its offsets), or None."""

    program: int
    base: int
    segments: tuple[Segment, ...]
    constants: tuple[int, tuple[int, ...]] | None


def read_layout(path: str | Path) -> PTELayout:
    """Header and segments. Raises FormatError for a file that is foreign, truncated or points outside itself."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(HEADER_AT + 32)
            program, base = _header(start, size, path)
            data = start + file.read(program - len(start))
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    try:
        return _layout(data, program, base, size, path)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is damaged: its flatbuffer points outside itself") from error


def _header(start: bytes, size: int, path: Path) -> tuple[int, int]:
    if len(start) < HEADER_AT + 32 or start[4:8] != IDENTIFIER:
        raise FormatError(f"{path} is no ExecuTorch program: it does not carry the identifier {IDENTIFIER.decode()}")
    if start[HEADER_AT : HEADER_AT + 4] != HEADER:
        raise FormatError(f"{path} has no extended header ({HEADER.decode()}); export it again with executorch >= 1.0")
    length, program, base = struct.unpack_from("<IQQ", start, HEADER_AT + 4)
    end = struct.unpack_from("<Q", start, DATA_SIZE_AT)[0] if length >= 32 else 0
    if length < 24 or not HEADER_AT + 32 <= program <= size:
        raise FormatError(f"{path} is truncated or damaged: it names {program} bytes of program and has {size} in all")
    if (base and not program <= base <= size) or base + end > size:
        raise FormatError(f"{path} is truncated: its data should end at byte {base + end}, the file has {size}")
    return program, base


def _layout(data: bytes, program: int, base: int, size: int, path: Path) -> PTELayout:
    root = _Table(data, _u32(data, 0))
    segments = []
    for table in root.tables(SEGMENTS):
        places = table.field(0), table.field(1)
        offset, length = (struct.unpack_from("<Q", data, place)[0] if place else 0 for place in places)
        if base + offset + length > size:
            raise FormatError(f"{path} is truncated: a segment ends at byte {base + offset + length} of {size}")
        segments.append(Segment(offset, length, places))
    constants = None
    place = root.field(CONSTANTS)
    if place:
        table = _Table(data, place + _u32(data, place))
        index = _u32(data, table.field(0)) if table.field(0) else 0
        offsets: tuple[int, ...] = ()
        if table.field(1):
            vector = table.field(1) + _u32(data, table.field(1))
            count = _u32(data, vector)
            offsets = struct.unpack_from(f"<{count}Q", data, vector + 4)
        if offsets and not (index < len(segments) and max(offsets) <= segments[index].size):
            raise FormatError(f"{path} is damaged: its constants lie outside their segment")
        constants = (index, offsets)
    return PTELayout(program, base, tuple(segments), constants)


class _Table:
    """One flatbuffer table; every access stays inside `data` or raises."""

    def __init__(self, data: bytes, place: int) -> None:
        self.data, self.place = data, place
        self.virtual = place - struct.unpack_from("<i", data, place)[0]
        if self.virtual < 0:
            raise ValueError("table outside the buffer")
        self.entries = (struct.unpack_from("<H", data, self.virtual)[0] - 4) // 2

    def field(self, index: int) -> int:
        """Where the field's value lies; 0 where the field is absent."""
        if index >= self.entries:
            return 0
        offset = struct.unpack_from("<H", self.data, self.virtual + 4 + 2 * index)[0]
        return self.place + offset if offset else 0

    def tables(self, index: int) -> list[_Table]:
        place = self.field(index)
        if not place:
            return []
        vector = place + _u32(self.data, place)
        count = _u32(self.data, vector)
        if count > MAX_SEGMENTS:
            raise ValueError("too many entries")
        places = (vector + 4 + 4 * i for i in range(count))
        return [_Table(self.data, place + _u32(self.data, place)) for place in places]


def _u32(data: bytes, place: int) -> int:
    return int(struct.unpack_from("<I", data, place)[0])


def share_segments(path: str | Path, smallest: int = 4096) -> int:
    """Leave out segments whose bytes the constants hold too, in place; returns how many bytes that saved.

    A tied table is stored by ExecuTorch once for the look-up, among the program's constants, and once for the head,
    inside the delegate. Segments are found by offset, so the second may point into the first.
    """
    path = Path(path)
    layout = read_layout(path)
    if layout.constants is None or not layout.constants[1]:
        return 0
    data = bytearray(path.read_bytes())
    index, offsets = layout.constants
    owner = layout.segments[index]

    def at(place: int, length: int) -> memoryview:
        return memoryview(data)[layout.base + place : layout.base + place + length]

    moved: dict[int, int] = {}
    for number, segment in enumerate(layout.segments):
        if number == index or segment.size < smallest or not segment.fields[0]:
            continue
        for offset in offsets:
            inside = offset + segment.size <= owner.size
            if inside and at(owner.offset + offset, segment.size) == at(segment.offset, segment.size):
                moved[number] = owner.offset + offset
                break
    if not moved:
        return 0
    kept = sorted(set(range(len(layout.segments))) - set(moved), key=lambda i: layout.segments[i].offset)
    limits = sorted({segment.offset for segment in layout.segments} | {len(data) - layout.base})
    pieces, position, places = [], 0, {}
    for number in kept:
        segment = layout.segments[number]
        following = next(limit for limit in limits if limit > segment.offset or limit == limits[-1])
        places[number] = position
        pieces.append(bytes(at(segment.offset, following - segment.offset)))  # with the padding behind it
        position += following - segment.offset
    shift = {owner.offset: places[index]}
    for number, segment in enumerate(layout.segments):
        new = places[number] if number in places else moved[number] - owner.offset + shift[owner.offset]
        if segment.fields[0]:
            struct.pack_into("<Q", data, segment.fields[0], new)
        elif new:
            return 0
    struct.pack_into("<Q", data, DATA_SIZE_AT, position)
    saved = len(data) - layout.base - position
    with path.open("wb") as file:
        file.write(memoryview(data)[: layout.base])
        for piece in pieces:
            file.write(piece)
    return saved
