"""Text is read the same everywhere: marks are honoured and left out, other encodings are named, rows are not prose."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from edgewright.errors import UsageError
from edgewright.io.decode import open_text, read_text
from edgewright.io.text import TextFiles, load_texts
from edgewright.systems.dlrm.click_log import read_chunks, read_layout

TEXT = "naïve 東京 🙂\r\nline, two\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    ],
    ids=["UTF-8", "UTF-8 with mark", "UTF-16 LE", "UTF-16 BE", "UTF-32"],
)
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_every_marked_encoding_gives_the_same_text(data: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert read_text(path) == TEXT
    assert load_texts(path) == [TEXT.replace("\r\n", "\n")]
    with open_text(path) as file:
        assert file.readline() == "naïve 東京 🙂\r\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("Zürich".encode("latin-1"), r"not UTF-8 text \(byte 1 is 0xfc\); save it as UTF-8, .*iconv -f"),
        (codecs.BOM_UTF16_LE + b"a\0b", r"not UTF-16-?(LE)? text"),
        ("ab".encode("utf-16-le"), "zero bytes: it is no text, or UTF-16 without a byte-order mark"),
    ],
)
def test_other_encodings_are_named(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UsageError, match=words):
        load_texts(tmp_path / "a.txt")


ROWS = ["one, two", 'a "quoted"\nline', "naïve"]


def written(kind: str) -> tuple[str, str]:
    """(file name, content) of ROWS."""
    if kind == "messages":
        rows = [{"id": 1, "messages": [{"role": "user", "content": row}]} for row in ROWS]
        return "a.jsonl", "\n".join(json.dumps(row) for row in rows)
    if kind == "json":
        return "a.json", json.dumps([{"content": row} for row in ROWS], indent=1)
    if kind == "json object":
        return "a.JSON", json.dumps({"version": 1, "data": [{"text": row} for row in ROWS]})
    if kind == "jsonl of strings":
        return "a.ndjson", "\n".join(json.dumps(row) for row in ROWS)
    table = io.StringIO(newline="")
    writer = csv.writer(table, delimiter="\t" if kind == "tsv" else ",")
    writer.writerows([["id", "Text"], *[[i, row] for i, row in enumerate(ROWS)]])
    return ("a.tsv" if kind == "tsv" else "a.csv"), table.getvalue()


@pytest.mark.parametrize("kind", ["messages", "json", "json object", "jsonl of strings", "csv", "tsv"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "mark"])
def test_rows_give_their_texts_alone(kind: str, mark: bytes, tmp_path: Path) -> None:
    name, content = written(kind)
    (tmp_path / name).write_bytes(mark + content.encode())
    assert load_texts(tmp_path / name) == ROWS
    assert list(TextFiles([tmp_path / name])) == ROWS
    parts = load_texts(tmp_path / name, "calibration"), load_texts(tmp_path / name, "evaluation")
    assert parts == (ROWS[:2], ROWS[2:])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "id,body\n1,x\n", "no column text or content; its columns are id, body: name the column"),
        ("a.csv", "id;text\n1;x\n", "parted by ';', save it with commas"),
        ("a.csv", "id,text\n1\n", "row 1: 1 columns instead of 2"),
        ("a.csv", "id,text\n1,\n", "every text in .* is empty"),
        ("a.csv", 'id,text\n1,"a\n', "is no table"),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', "not JSON .*a file of lines of JSON ends in .jsonl"),
        ("a.json", '[{"body": "a"}]', r'row 1: no "text" string \(it has body\)'),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 3}]}', 'line 1: no "messages" string'),
        ("a.json", "[" * 100_000, "not JSON"),
    ],
)
def test_rows_without_texts_are_refused(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=words) as caught:
        load_texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_log_with_a_mark_is_the_same_log(tmp_path: Path) -> None:
    rows = "label,I1,C1\r\n" + "".join(f'{i % 2},{i},"Kraków, {i % 3}"\r\n' for i in range(20))
    found: list[Any] = []
    for name, data in {
        "plain": rows.encode(),
        "bom": codecs.BOM_UTF8 + rows.encode(),
        "wide": codecs.BOM_UTF16_LE + rows.encode("utf-16-le"),
    }.items():
        path = tmp_path / f"{name}.csv"
        path.write_bytes(data)
        layout = read_layout(path)
        found.append([(c.labels.tolist(), c.dense.tolist(), c.categories) for c in read_chunks(path, layout)])
    assert found[0] == found[1] == found[2]
    (tmp_path / "latin.csv").write_bytes(rows.encode("latin-1", "replace").replace(b"?", b"\xf3"))
    with pytest.raises(UsageError, match="not UTF-8 text"):
        list(read_chunks(tmp_path / "latin.csv", layout))
