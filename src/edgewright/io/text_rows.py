"""Texts of files with rows: .jsonl and .json (objects with text, content or messages), .csv and .tsv (such a column).

One column is read, the first of COLUMNS that a row has, never the raw file: keys and quotation marks are no prose.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgewright.errors import UsageError

COLUMNS = ("text", "content", "messages")
EXAMPLE = 'each line must be like {"text": "..."}'
MOST_CELL = 1 << 28  # characters of one cell: a document


def rows_reader(path: Path) -> Callable[[str, Path], list[str]] | None:
    """The function (content, path) -> texts for the suffix of a file; None for plain text."""
    return READERS.get(path.suffix.lower() if path.suffix.lower() != ".gz" else Path(path.stem).suffix.lower())


def _json_lines(content: str, path: Path) -> list[str]:
    texts: list[str] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: not JSON; {EXAMPLE}") from error
        texts.append(_text_of(row, f"{path}, line {number}"))
    return _not_empty(texts, path)


def _json(content: str, path: Path) -> list[str]:
    """A list of rows, one row, or an object with one list of rows (as {"data": [...]})."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({str(error)[:200]}); a file of lines of JSON ends in .jsonl") from error
    if isinstance(value, dict) and not any(name in value for name in COLUMNS):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        value = lists[0] if len(lists) == 1 else value
    rows = value if isinstance(value, list) else [value]
    return _not_empty([_text_of(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)], path)


def _table(content: str, path: Path) -> list[str]:
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    limit = csv.field_size_limit(MOST_CELL)
    try:
        rows = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        names = [name.strip() for name in next(rows, [])]
        lower = [name.lower() for name in names]
        column = next((lower.index(name) for name in COLUMNS[:2] if name in lower), None)
        if column is None:
            hint = "; its cells seem to be parted by ';', save it with commas" if ";" in "".join(names) else ""
            raise UsageError(
                f"{path} has no column {' or '.join(COLUMNS[:2])}; its columns are {', '.join(names)[:300]}{hint}: "
                "name the column to read text in the first line, or save the file as .txt to read all of it as prose"
            )
        texts = []
        for number, row in enumerate((row for row in rows if row), 1):
            if len(row) != len(names):
                raise UsageError(f"{path}, row {number}: {len(row)} columns instead of {len(names)}")
            texts.append(row[column])
    except csv.Error as error:
        raise UsageError(f"{path} is no table: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return _not_empty(texts, path)


def _text_of(row: Any, where: str) -> str:
    """The text of one row: a string, or the first of COLUMNS; of messages, their contents with empty lines between."""
    if isinstance(row, str):
        return row
    given = row if isinstance(row, dict) else {}
    name = next((name for name in COLUMNS if name in given), "text")
    value = given.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        contents = [message.get("content") if isinstance(message, dict) else message for message in value]
        if contents and all(isinstance(content, str) or content is None for content in contents):
            return "\n\n".join(content for content in contents if content)
    keys = f" (it has {', '.join(map(str, given))[:200]})" if given and name not in given else ""
    raise UsageError(f'{where}: no "{name}" string{keys}; {EXAMPLE}, or have {" or ".join(COLUMNS[1:])}')


def _not_empty(texts: list[str], path: Path) -> list[str]:
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"every text in {path} is empty")
    return texts


READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table}
