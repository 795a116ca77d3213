"""Click logs of users: the public Criteo layout (label, 13 numbers, 26 categories), read row by row.

    TSV without a header, 40 columns, as published; also .gz
    CSV or TSV with a header that names the columns: label (or click), I1.. for numbers, C1.. for categories
    Parquet with such columns (needs pyarrow)

Nothing is skipped: a row that cannot be read stops everything, named by its number. Missing numbers and negative ones
become 0, others log(1 + x); a missing category is a category of its own.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from edgewright.errors import FormatError, MissingPackage, UsageError
from edgewright.io.decode import open_text
from edgewright.io.foreign import reading

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
    if not texts:
        raise UsageError(
            f"{path.name} has no columns C1, C2, ... with categories; its columns are {_some(names)}: name some, e.g. "
            "--categorical user,item"
        )
    if not numbers:
        raise UsageError(
            f"{path.name} has no columns I1, I2, ... with numbers; its columns are {_some(names)}: name some, e.g. "
            "--dense price,age"
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
    width = len(layout.names)
    for number, cells in enumerate(rows, first):
        if len(cells) != width:
            raise FormatError(f"{name}, row {number}: {len(cells)} columns instead of {width}")
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
            raise FormatError(
                f"{name}, row {first + place}: column {column} is {cell[:40]!r}; a number is needed, or nothing"
            ) from None
        if math.isinf(value):
            raise FormatError(f"{name}, row {first + place}: column {column} is infinite")
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
        if not layout.header:
            yield from (row for row in reader if row)
            return
        names = [name.strip() for name in next(reader)]
        places = [names.index(name) for name in layout.names]
        for number, row in enumerate((row for row in reader if row), 1):
            if len(row) != len(names):
                raise FormatError(f"{path.name}, row {number}: {len(row)} columns instead of {len(names)}")
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
