"""Click logs of users, read row by row, and the hashing vocabulary that makes arrays on disk of them.

    TSV without a header, 40 columns, as published by Criteo (label, 13 numbers, 26 categories); also .gz
    CSV or TSV with a header that names the columns: label (or click), I1.. for numbers, C1.. for categories
    Parquet with such columns (needs pyarrow)

Nothing is skipped: a row that cannot be read stops everything, named by its number. Missing numbers and negative ones
become 0, others log(1 + x); a missing category is a category of its own.

A category is hashed to one of `hash_rows` buckets, by hashes that are the same on every machine. Buckets seen fewer
than `min_count` times in the training part share row 0 with everything never seen, a missing category has row 1, and
the others are numbered from 2: tables are as long as what the training part holds. Training reads the arrays without
loading them.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from edgewright.checks import check, number, whole
from edgewright.errors import FormatError, MissingPackage, UsageError
from edgewright.io.atomic import atomic_directory
from edgewright.io.decode import open_text
from edgewright.io.foreign import reading
from edgewright.io.hashing import crc32_each, splitmix64
from edgewright.io.json_file import read_object
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.systems.dlrm.clicks import ClickData, Schema


def hash_ids(ids: np.ndarray, rows: int, salt: int = 0) -> np.ndarray:
    """Ids (integers of any size) to rows 0 .. rows - 1, int64; another salt is another hash."""
    salted = splitmix64(np.array([salt], np.int64).view(np.uint64))
    return (splitmix64(_unsigned(ids) ^ salted) % np.uint64(rows)).astype(np.int64)


def cross(first: np.ndarray, second: np.ndarray, rows: int, salt: int = 0) -> np.ndarray:
    """Rows for pairs of ids: the pair is one feature of its own, hashed to `rows` rows."""
    pair = splitmix64(_unsigned(first)) ^ _unsigned(second)
    return hash_ids(splitmix64(pair).view(np.int64), rows, salt)


def hash_texts(texts: Iterable[str], rows: int, salt: int = 0) -> np.ndarray:
    """Texts to rows 0 .. rows - 1, int64, by the CRC-32 of their UTF-8 bytes."""
    codes = np.fromiter(crc32_each(texts), np.int64)
    return hash_ids(codes, rows, salt)


def _unsigned(ids: np.ndarray) -> np.ndarray:
    return np.asarray(ids).astype(np.int64).view(np.uint64)


CHUNK = 20_000  # rows held as texts
NUMBERS, CATEGORIES = 13, 26
LABELS = ("label", "click", "clicked", "target")
MOST_CELL = 1 << 16  # characters; longer is no category


@dataclass(frozen=True)
class Layout:
    """Columns by name: the label, the numbers, the categories. `header`: whether the file's first row names them."""

    label: str
    dense: tuple[str, ...]
    categorical: tuple[str, ...]
    header: bool = True

    @classmethod
    def criteo(cls) -> Layout:
        """The published files."""
        dense = tuple(f"I{i}" for i in range(1, NUMBERS + 1))
        return cls("label", dense, tuple(f"C{i}" for i in range(1, CATEGORIES + 1)), header=False)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.label, *self.dense, *self.categorical)


@dataclass(frozen=True)
class Chunk:
    """Rows `first` and on (the first of the data is 1): labels [n], numbers [n, dense], texts by category."""

    first: int
    labels: np.ndarray
    dense: np.ndarray
    categories: tuple[Sequence[str], ...]


def read_layout(
    path: str | Path,
    label: str | None = None,
    dense: Sequence[str] | None = None,
    categorical: Sequence[str] | None = None,
) -> Layout:
    """The layout of a file: from its header and the names given, or the published one where 40 columns have no header.

    Raises UsageError naming the columns that are missing, FormatError for a file that is no table.
    """
    path = Path(path)
    names, headless = _columns(path)
    if headless:
        if label or dense or categorical:
            raise UsageError(
                f"{path.name} has no header, so columns cannot be named; without names it is read as Criteo"
            )
        return Layout.criteo()
    lower = {name.lower(): name for name in names}
    found = label or next((lower[name] for name in LABELS if name in lower), None)
    if found is None:
        raise UsageError(
            f"{path.name} has no column {' or '.join(LABELS)}; its columns are {_some(names)}: name the one with 0 and "
            "1, e.g. --label bought"
        )
    numbers = tuple(dense) if dense is not None else _by_letter(names, "I")
    texts = tuple(categorical) if categorical is not None else _by_letter(names, "C")
    if missing := [name for name in (found, *numbers, *texts) if name not in names]:
        raise UsageError(f"{path.name} has no column {missing[0]!r}; its columns are {_some(names)}")
    for columns, letter, kind, option in (
        (texts, "C", "categories", "--categorical user,item"),
        (numbers, "I", "numbers", "--dense price,age"),
    ):
        if not columns:
            raise UsageError(
                f"{path.name} has no columns {letter}1, {letter}2, ... with {kind}; its columns are {_some(names)}: "
                f"name some, e.g. {option}"
            )
    twice = [name for name, group in itertools.groupby(sorted((found, *numbers, *texts))) if len(list(group)) > 1]
    if twice:
        raise UsageError(f"column {twice[0]!r} is named twice; the label, numbers and categories are different columns")
    return Layout(found, numbers, texts)


def read_chunks(path: str | Path, layout: Layout, limit: int | None = None) -> Iterator[Chunk]:
    """The rows of a file, some at a time. limit: no more than so many.

    Raises FormatError naming the row and the column of the first cell that cannot be.
    """
    path = Path(path)
    source = _parquet_rows(path, layout) if _is_parquet(path) else _text_rows(path, layout)
    source = source if limit is None else itertools.islice(source, limit)
    first = 1
    while rows := list(itertools.islice(source, CHUNK)):
        yield _chunk(path.name, first, rows, layout)
        first += len(rows)


def _chunk(name: str, first: int, rows: list[Sequence[Any]], layout: Layout) -> Chunk:
    columns = list(zip(*rows, strict=True))
    labels = _labels(name, first, columns[0], layout.label)
    count = len(layout.dense)
    dense = np.empty((len(rows), count), np.float32)
    for place, column in enumerate(layout.dense):
        dense[:, place] = _numbers(name, first, columns[1 + place], column)
    texts = []
    for column, column_cells in zip(layout.categorical, columns[1 + count :], strict=True):
        longest = max(map(len, column_cells))
        if longest > MOST_CELL:
            place = first + next(i for i, cell in enumerate(column_cells) if len(cell) > MOST_CELL)
            raise FormatError(f"{name}, row {place}: column {column} holds {longest} characters; at most {MOST_CELL}")
        texts.append(column_cells)
    return Chunk(first, labels, dense, tuple(texts))


def _labels(name: str, first: int, cells: Sequence[str], column: str) -> np.ndarray:
    values = np.empty(len(cells), np.float32)
    known = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}
    for place, cell in enumerate(cells):
        value = known.get(cell) if cell in known else known.get(cell.strip().lower())
        if value is None:
            raise FormatError(
                f"{name}, row {first + place}: column {column} is {cell[:40]!r}; a label is 0 or 1, and no row goes "
                "without"
            )
        values[place] = value
    return values


def _numbers(name: str, first: int, cells: Sequence[str], column: str) -> np.ndarray:
    values = np.zeros(len(cells), np.float64)
    for place, cell in enumerate(cells):
        if not cell:
            continue
        try:
            value = float(cell)
        except ValueError:
            value = math.inf
        if math.isinf(value):
            raise FormatError(
                f"{name}, row {first + place}: column {column} is {cell[:40]!r}; a finite number is needed, or nothing"
            )
        values[place] = value if value > 0 else 0.0  # NaN is a missing one
    return np.log1p(values).astype(np.float32)


def _columns(path: Path) -> tuple[tuple[str, ...], bool]:
    """(column names, whether the file has no header)."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}; --data names a CSV, TSV or Parquet file")
    if _is_parquet(path):
        return tuple(_open_parquet(path).schema_arrow.names), False
    with _opened(path) as (file, delimiter):
        first = next(csv.reader(file, delimiter=delimiter), None)
    if not first:
        raise FormatError(f"{path} is empty")
    if len(first) == 1 and ";" in first[0]:
        raise FormatError(f"the columns of {path} are separated by ';': save it with commas or tabs between them")
    headless = len(first) == 1 + NUMBERS + CATEGORIES and first[0].strip() in ("0", "1")
    return tuple(name.strip() for name in first), headless


def _text_rows(path: Path, layout: Layout) -> Iterator[Sequence[str]]:
    with _opened(path) as (file, delimiter):
        quoting: Any = csv.QUOTE_MINIMAL if layout.header else csv.QUOTE_NONE
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting)
        names = [name.strip() for name in next(reader)] if layout.header else list(layout.names)
        places = [names.index(name) for name in layout.names]
        for place, row in enumerate((row for row in reader if row), 1):
            if len(row) != len(names):
                raise FormatError(f"{path.name}, row {place}: {len(row)} columns instead of {len(names)}")
            yield [row[place] for place in places]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[TextIO, str]]:
    """The text and its delimiter; errors of reading become ours."""
    try:
        with open_text(path) as file:
            start = file.read(1 << 16).split("\n", 1)[0]
        with open_text(path) as file:
            yield file, "\t" if "\t" in start else ","
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except (EOFError, csv.Error, zlib.error) as error:
        raise FormatError(f"{path} is no table: {error}") from error


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage(f"reading {path.name} needs the package pyarrow: pip install pyarrow") from error
    with reading(path):
        return pyarrow.parquet.ParquetFile(path)


def _parquet_rows(path: Path, layout: Layout) -> Iterator[Sequence[str]]:
    batches = _open_parquet(path).iter_batches(batch_size=CHUNK, columns=list(layout.names))
    while True:
        with reading(path):
            batch = next(batches, None)
            if batch is None:
                return
            columns = [[_text(v) for v in batch.column(name).to_pylist()] for name in layout.names]
        yield from zip(*columns, strict=True)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _by_letter(names: Sequence[str], letter: str) -> tuple[str, ...]:
    chosen = [name for name in names if re.fullmatch(rf"{letter}\d+", name, re.IGNORECASE)]
    return tuple(sorted(chosen, key=lambda name: int(name[1:])))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


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
        fields = read_object(folder / FILE)
        if fields.get("format") != FORMAT:
            raise FormatError(f"{folder / FILE} has format {fields.get('format')}; this version reads {FORMAT}")
        arrays = load_tensors(folder / ROWS)
        try:
            held = fields["layout"]
            layout = Layout(held["label"], tuple(held["dense"]), tuple(held["categorical"]), held["header"])
            remap = tuple(arrays[f"{k:03d}"].numpy() for k in range(len(layout.categorical)))
            size, least = int(fields["hash_rows"]), int(fields["min_count"])
            fits = all(rows.shape == (size,) and rows.dtype == np.int32 and rows.min() >= 0 for rows in remap)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{folder} does not hold a vocabulary: {error}") from error
        if not fits:
            raise FormatError(f"{folder / ROWS} does not hold {len(remap)} vocabularies of {size} buckets")
        return cls(layout, size, least, remap)


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
    check("hash_rows", hash_rows, whole(2, MOST_HASH_ROWS))
    check("min_count", min_count, whole(1))
    check("valid", valid, number(above=0, below=1))
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
