"""Ways to damage a file: flipped bits and cuts for any, changed values for JSON, safetensors headers and GGUF keys."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz_runs import hostile_pickles

CODE_RAN = "code-ran"  # a file that hostile pickles make where they are believed
HUGE = (2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64, 10**30, 20_000_000, 3_000, 100_000)
NUMBERS = (*HUGE, 0, -1, 1, 2, 3, 7, -(2**63), 0.5, 1e308, -1e-308, 0.1)
LITERALS = ("NaN", "Infinity", "-Infinity", "1e999", "-0", "0x10", "null", "tru")
TEXTS = (
    "",
    "\0",
    "../../etc/passwd",
    "/etc/passwd",
    "[/red] [bold",
    "\ud7ff\U0001f600",
    "%s{}{0}",
    "a" * 100_000,
    "..",
)


def damage(path: Path, chance: random.Random) -> str:
    """Change one file in one to three ways; what was done."""
    data = path.read_bytes()
    packed = path.suffix == ".gz" and chance.random() < 0.6
    if packed:
        data = gzip.decompress(data)
    done = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        structured = _structured(path, data)
        if structured is not None and chance.random() < 0.75:
            name, data = structured(data, chance)
        else:
            name, data = chance.choice(BYTES)(data, chance)
        done.append(name)
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return f"{path.name}: {', '.join(done)}"


Change = Callable[[bytes, random.Random], tuple[str, bytes]]


def _structured(path: Path, data: bytes) -> Change | None:
    if data[:1] in (b"{", b"[") and path.suffix in (".json", ".jsonl", ""):
        return change_json
    if path.suffix in (".safetensors", ".bin") and len(data) > 9 and data[8:9] == b"{":
        return change_header
    if data[:4] == b"GGUF":
        return change_gguf
    if data[:4] == b"PK\3\4":
        return change_zip
    return None


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _flip(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    if not data:
        return "nothing", data
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        out[_place(out, chance)] ^= 1 << chance.randrange(8)
    return "bits flipped", bytes(out)


def _cut(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    return "cut short", data[
        : chance.choice((0, 1, 8, 16, len(data) // 2, max(len(data) - 1, 0), _place(data, chance)))
    ]


def _overwrite(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    place = _place(data, chance)
    new = struct.pack(
        "<Q", chance.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, chance.getrandbits(64)))
    )
    new = new[: chance.choice((1, 4, 8))]
    return "number overwritten", data[:place] + new + data[place + len(new) :]


def _insert(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    place = _place(data, chance)
    new = chance.choice((b"\0" * 64, b"\xff", b"[" * 3000, chance.randbytes(16), b"\xef\xbb\xbf", b'"', b",", b"\n"))
    return "bytes inserted", data[:place] + new + data[place:]


def _repeat(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    place = _place(data, chance)
    part = data[place : place + chance.choice((1, 16, 200))]
    return "part repeated", data[:place] + part * chance.choice((2, 50)) + data[place:]


def _remove(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    place = _place(data, chance)
    return "part removed", data[:place] + data[place + chance.choice((1, 4, 100)) :]


BYTES: tuple[Change, ...] = (_flip, _cut, _overwrite, _insert, _repeat, _remove)


def _place(data: bytes | bytearray, chance: random.Random) -> int:
    """Half of them near the start, where headers are."""
    if not data:
        return 0
    return chance.randrange(min(len(data), 512)) if chance.random() < 0.5 else chance.randrange(len(data))


# ---- JSON ------------------------------------------------------------------------------------------------------------


class _Literal(float):
    """A number that is written as a given text."""

    def __new__(cls, text: str) -> _Literal:
        made = super().__new__(cls, 0.0)
        made.text = text
        return made

    text: str

    def __repr__(self) -> str:
        return self.text


def change_json(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _flip(data, chance)
    return change_tree(tree, chance)


def change_tree(tree: Any, chance: random.Random) -> tuple[str, bytes]:
    """One value anywhere in a JSON tree becomes another; the text."""
    places: list[tuple[Any, Any]] = []
    _walk(tree, places)
    if not places:
        return "JSON replaced", json.dumps(_value(None, chance)).encode()
    # places near the top as likely as all those deep in a vocabulary
    parent, key = chance.choice(places[:60]) if chance.random() < 0.7 else chance.choice(places)
    kind = chance.randrange(10)
    if kind == 0:
        del parent[key]
        return f"{key!r:.40} removed", _text(tree)
    if kind == 1 and isinstance(parent, dict):
        return f"{key!r:.40} twice", _twice(_text(tree), key, _value(parent[key], chance), chance)
    if kind == 2 and isinstance(parent, dict):
        parent[chance.choice(TEXTS)] = parent.pop(key)
        return f"{key!r:.40} renamed", _text(tree)
    if kind == 3 and isinstance(parent, list):
        parent.extend([parent[key]] * chance.choice((1, 1000)))
        return "list longer", _text(tree)
    parent[key] = _value(parent[key], chance)
    return f"{key!r:.40} = {parent[key]!r:.40}", _text(tree)


def _walk(tree: Any, places: list[tuple[Any, Any]]) -> None:
    level = [tree]
    while level and len(places) < 20_000:
        below = []
        for node in level:
            keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            for key in keys:
                places.append((node, key))
                below.append(node[key])
        level = below


def _value(old: Any, chance: random.Random) -> Any:
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: chance.choice(NUMBERS),
        lambda: chance.choice(NUMBERS),
        lambda: chance.choice(TEXTS),
        lambda: _Literal(chance.choice(LITERALS)),
        lambda: None,
        lambda: chance.choice((True, False)),
        lambda: [],
        lambda: {},
        lambda: [old],
        lambda: {"a": old},
        lambda: [old] * chance.choice((2, 1000)),
        lambda: _deep(chance.choice((50, 400, 900))),
        lambda: -old if isinstance(old, int | float) else str(old)[::-1],
        lambda: old * 2 + 1 if isinstance(old, int | float) else str(old) + " ",
    )
    return chance.choice(kinds)()


def _deep(levels: int) -> Any:
    value: Any = 1
    for k in range(levels):
        value = [value] if k % 2 else {"a": value}
    return value


def _text(tree: Any) -> bytes:
    try:
        return json.dumps(tree, ensure_ascii=False).encode("utf-8", "replace")
    except (RecursionError, ValueError):
        return b"[" * 5000


def _twice(text: bytes, key: Any, value: Any, chance: random.Random) -> bytes:
    start = text.find(json.dumps(key).encode())
    return text[:start] + json.dumps(key).encode() + b":" + _text(value) + b"," + text[start:] if start > 0 else text


# ---- safetensors and GGUF --------------------------------------------------------------------------------------------


def change_header(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The header's JSON, or a JSON text in its metadata, changed; its length put right most of the time."""
    (length,) = struct.unpack("<Q", data[:8])
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return _flip(data, chance)
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    texts = texts if isinstance(texts, dict) else {}
    inner = [key for key, value in texts.items() if isinstance(value, str) and value[:1] in "{["]
    if inner and chance.random() < 0.7:
        key = chance.choice(inner)
        name, new = change_json(texts[key].encode(), chance)
        texts[key] = new.decode("utf-8", "replace")
        text = _text(header)
    else:
        name, text = change_tree(header, chance)
    text += b" " * (-len(text) % 8)
    size = len(text) if chance.random() < 0.9 else length
    return f"header: {name}", struct.pack("<Q", size) + text + data[8 + length :]


def change_zip(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """One file of an archive, most often the pickle in it, its checksum put right; or a hostile pickle instead."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, OSError, EOFError):
        return _flip(data, chance)
    if not entries:
        return _flip(data, chance)
    pickles = [name for name in entries if name.endswith(".pkl")]
    name = chance.choice(pickles) if pickles and chance.random() < 0.8 else chance.choice(list(entries))
    if chance.random() < 0.3:
        what, entries[name] = chance.choice(sorted(hostile_pickles(Path(tempfile.gettempdir(), CODE_RAN)).items()))
    else:
        what, entries[name] = chance.choice(BYTES)(entries[name], chance)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED if chance.random() < 0.9 else zipfile.ZIP_DEFLATED) as archive:
        for key, content in entries.items():
            archive.writestr(key, content)
    return f"{name}: {what}", out.getvalue()


def change_gguf(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The value of one key of the header."""
    places = []
    try:
        position, (count,) = 24, struct.unpack("<Q", data[16:24])
        for _ in range(min(count, 1000)):
            (size,) = struct.unpack_from("<Q", data, position)
            key = data[position + 8 : position + 8 + size].decode()
            position += 8 + size
            (kind,) = struct.unpack_from("<I", data, position)
            position += 4
            start = position
            position += _gguf_size(data, kind, position)
            places.append((key, kind, start, position))
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError):
        return _flip(data, chance)
    if not places:
        return _flip(data, chance)
    key, kind, start, end = chance.choice(places)
    if kind == 8:
        text = chance.choice((*TEXTS, "yarn", "longrope", "linear", "llama", "gpt2", "none", "bert", "t5")).encode()
        return f"{key} = {text[:20]!r}", data[:start] + struct.pack("<Q", len(text)) + text + data[end:]
    new = bytearray(data[start:end])
    if kind == 9:
        place = chance.choice((0, 4, chance.randrange(len(new))))
        new[place : place + 1] = bytes([chance.randrange(256)])
    else:
        width = len(new)
        values = (
            0,
            1,
            2,
            3,
            255,
            2**16,
            2**31 - 1,
            2**32 - 1,
            2**64 - 1,
            0x7FC00000,
            0xFF800000,
            chance.getrandbits(64),
        )
        new[:] = struct.pack("<Q", chance.choice(values))[:width]
    return f"{key} changed", data[:start] + bytes(new) + data[end:]


WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _gguf_size(data: bytes, kind: int, position: int) -> int:
    if kind == 8:
        return 8 + int(struct.unpack_from("<Q", data, position)[0])
    if kind != 9:
        return WIDTHS[kind]
    element, count = struct.unpack_from("<IQ", data, position)
    if element in WIDTHS:
        return 12 + WIDTHS[element] * int(count)
    size = 12
    for _ in range(count):
        size += 8 + int(struct.unpack_from("<Q", data, position + size)[0])
    return size
