"""A hashing vocabulary and what it makes of a click log: arrays on disk that training reads without loading them.

A category is hashed to one of `hash_rows` buckets. Buckets seen fewer than `min_count` times in the training part
share row 0 with everything never seen, a missing category has row 1, and the others are numbered from 2: tables are as
long as what the training part holds.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import atomic_directory
from edgewright.io.json_file import read_object
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.systems.dlrm.clicks import ClickData, Schema
from edgewright.systems.dlrm.criteo import Chunk, Layout, read_chunks
from edgewright.systems.dlrm.hashing import hash_texts

RARE, MISSING, FIRST = 0, 1, 2  # rows
FILE, ROWS = "features.json", "vocabulary.safetensors"
DATA = "data.json"
FORMAT = 1
MOST_HASH_ROWS = 1 << 28


@dataclass(frozen=True)
class Vocabulary:
    """layout: the columns. remap: per category the row of every bucket, int32 [hash_rows]."""

    layout: Layout
    hash_rows: int
    min_count: int
    remap: tuple[np.ndarray, ...]

    @property
    def schema(self) -> Schema:
        """Columns of encoded data; the sizes are those of the tables."""
        sizes = tuple(max(int(rows.max()), MISSING) + 1 for rows in self.remap)
        names = self.layout.categorical
        return Schema(self.layout.dense, names, sizes, (1,) * len(names))

    def encode(self, chunk: Chunk) -> ClickData:
        """Rows as a model takes them."""
        return _data(self.schema, chunk.dense, self.rows(buckets(chunk, self.hash_rows)), chunk.labels)

    def rows(self, hashed: np.ndarray) -> np.ndarray:
        """Buckets [n, categories] (-1: missing) to rows of tables, int32."""
        found = np.empty(hashed.shape, np.int32)
        for k, remap in enumerate(self.remap):
            column = hashed[:, k]
            found[:, k] = np.where(column < 0, MISSING, remap[np.maximum(column, 0)])
        return found

    def write_into(self, folder: Path) -> None:
        """features.json and vocabulary.safetensors, into a folder that somebody else finishes."""
        fields = {"format": FORMAT, "hash_rows": self.hash_rows, "min_count": self.min_count}
        text = json.dumps({**fields, "layout": dataclasses.asdict(self.layout)}, indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")
        save_tensors(folder / ROWS, {f"{k:03d}": torch.from_numpy(rows) for k, rows in enumerate(self.remap)})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Vocabulary:
        """A saved vocabulary. Raises UsageError when there is none, FormatError when it is damaged."""
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise UsageError(f"{folder} has no {FILE}; edgewright train dlrm writes one beside the model")
        try:
            fields = read_object(folder / FILE)
            if fields["format"] != FORMAT:
                raise FormatError(f"{folder / FILE} has format {fields['format']}; this version reads {FORMAT}")
            held = fields["layout"]
            layout = Layout(held["label"], tuple(held["dense"]), tuple(held["categorical"]), held["header"])
            arrays = load_tensors(folder / ROWS)
            remap = tuple(arrays[f"{k:03d}"].numpy() for k in range(len(layout.categorical)))
            size = int(fields["hash_rows"])
            if any(rows.shape != (size,) or rows.dtype != np.int32 or rows.min() < 0 for rows in remap):
                raise FormatError(f"{folder / ROWS} does not hold {len(remap)} vocabularies of {size} buckets")
            return cls(layout, size, int(fields["min_count"]), remap)
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{folder} does not hold a vocabulary: {error}") from error


def buckets(chunk: Chunk, hash_rows: int) -> np.ndarray:
    """The bucket of every category of every row, int32 [n, categories], -1 where it is missing."""
    found = np.empty((len(chunk.labels), len(chunk.categories)), np.int32)
    for k, cells in enumerate(chunk.categories):
        hashed = hash_texts(cells, hash_rows, salt=k)
        found[:, k] = np.where(np.fromiter(map(bool, cells), bool, len(cells)), hashed, -1)
    return found


def prepare_clicks(
    path: str | Path,
    layout: Layout,
    folder: str | Path,
    *,
    hash_rows: int = 1 << 18,
    min_count: int = 4,
    valid: float = 0.1,
    limit: int | None = None,
    tick: Callable[[int], None] = lambda rows: None,
) -> tuple[ClickData, ClickData, Vocabulary]:
    """(training part, its last `valid` share, vocabulary) of a click log, kept in `folder` as arrays on disk.

    The file is read once, row by row; a folder that was made from the same file with the same settings is used again.
    Only the training part is counted for the vocabulary. tick(rows read) is called now and then.
    Raises UsageError for settings that cannot be or too few rows, FormatError naming a row that cannot be read.
    """
    path, folder = Path(path), Path(folder)
    if not 2 <= hash_rows <= MOST_HASH_ROWS or min_count < 1 or not 0 < valid < 1:
        raise UsageError(
            f"hash_rows={hash_rows}, min_count={min_count}, valid={valid}: hash_rows is 2 to {MOST_HASH_ROWS}, "
            "min_count at least 1, valid a share between 0 and 1"
        )
    made_from = {
        "format": FORMAT,
        "file": path.name,
        "bytes": path.stat().st_size,
        "modified": path.stat().st_mtime_ns,
        "layout": {**dataclasses.asdict(layout), "dense": list(layout.dense), "categorical": list(layout.categorical)},
        "hash_rows": hash_rows,
        "min_count": min_count,
        "valid": valid,
        "limit": limit,
    }
    if not _is_ready(folder, made_from):
        with atomic_directory(folder, ours=True) as temporary:
            _prepare(path, layout, temporary, made_from, tick)
    vocabulary = Vocabulary.from_pretrained(folder)
    count = read_object(folder / DATA).get("rows")
    if type(count) is not int or count < 1:
        raise FormatError(f"{folder / DATA} does not say how many rows there are; remove {folder} and run again")
    arrays = [_mapped(folder, name, count, *kind) for name, kind in _files(layout).items()]
    return *_data(vocabulary.schema, *arrays).split(1 - valid), vocabulary


def _prepare(
    path: Path, layout: Layout, folder: Path, made_from: Mapping[str, Any], tick: Callable[[int], None]
) -> None:
    count = 0
    names = _files(layout)
    hashed = folder / "hashed.bin"
    with open(folder / "dense", "wb") as dense, open(folder / "labels", "wb") as labels, open(hashed, "wb") as ids:
        for chunk in read_chunks(path, layout, made_from["limit"]):
            dense.write(chunk.dense.tobytes())
            labels.write(chunk.labels.tobytes())
            ids.write(buckets(chunk, made_from["hash_rows"]).tobytes())
            count += len(chunk.labels)
            tick(count)
    cut = round((1 - made_from["valid"]) * count)
    if not 0 < cut < count:
        raise UsageError(f"{path.name} has {count} rows: too few for a training and a validation part")
    columns = len(layout.categorical)
    raw = np.memmap(hashed, np.int32, "r", shape=(count, columns))
    vocabulary = Vocabulary(
        layout, made_from["hash_rows"], made_from["min_count"], _remap(raw[:cut], made_from["hash_rows"], made_from)
    )
    step = max(1, (1 << 22) // columns)
    with open(folder / "ids", "wb") as out:
        for start in range(0, count, step):
            out.write(vocabulary.rows(np.asarray(raw[start : start + step])).tobytes())
    del raw
    os.unlink(hashed)
    assert set(names) == {"dense", "ids", "labels"}
    vocabulary.write_into(folder)
    (folder / DATA).write_text(json.dumps({**made_from, "rows": count}, indent=1) + "\n", encoding="utf-8")


def _remap(trained: np.ndarray, hash_rows: int, made_from: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    found = []
    for k in range(trained.shape[1]):
        column = np.asarray(trained[:, k])
        counts = np.bincount(column[column >= 0], minlength=hash_rows)
        kept = counts >= made_from["min_count"]
        found.append(np.where(kept, np.cumsum(kept) - 1 + FIRST, RARE).astype(np.int32))
    return tuple(found)


def _files(layout: Layout) -> dict[str, tuple[Any, int]]:
    """Name -> (type, columns; 0 for a plain row of numbers)."""
    return {"dense": (np.float32, len(layout.dense)), "ids": (np.int32, len(layout.categorical)),
            "labels": (np.float32, 0)}  # fmt: skip


def _mapped(folder: Path, name: str, count: int, kind: Any, columns: int) -> np.ndarray:
    shape: Sequence[int] = (count, columns) if columns else (count,)
    path = folder / name
    expected = int(np.prod(shape)) * np.dtype(kind).itemsize
    if not path.is_file() or path.stat().st_size != expected:
        raise FormatError(f"{path} does not have the {expected} bytes of {count} rows; remove {folder} and run again")
    # copy-on-write: torch wants memory that it may write to, the file stays as it is
    return np.memmap(path, kind, "c", shape=tuple(shape))


def _is_ready(folder: Path, made_from: Mapping[str, Any]) -> bool:
    try:
        known = read_object(folder / DATA)
    except (UsageError, FormatError):
        return False
    return all(known.get(key) == value for key, value in made_from.items())


def _data(schema: Schema, dense: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> ClickData:
    return ClickData(schema, torch.from_numpy(dense), torch.from_numpy(ids), torch.from_numpy(labels))
