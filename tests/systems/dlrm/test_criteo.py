"""Click logs of users: the published layout, named columns, a hashing vocabulary, and rows that are named when bad."""

from __future__ import annotations

import builtins
import gzip
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgewright.errors import FormatError, MissingPackage, UsageError
from edgewright.systems.dlrm.click_log import (
    MISSING,
    RARE,
    Layout,
    Vocabulary,
    hash_texts,
    prepare_clicks,
    read_chunks,
    read_layout,
)


def criteo_lines(rows: int) -> list[str]:
    generator = np.random.default_rng(0)
    lines = []
    for row in range(rows):
        numbers = ["" if generator.random() < 0.2 else str(int(n)) for n in generator.integers(-2, 100, 13)]
        texts = ["" if generator.random() < 0.1 else f"{int(n):08x}" for n in generator.integers(0, 9, 26)]
        lines.append("\t".join([str(row % 2), *numbers, *texts]))
    return lines


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "day_0"
    path.write_text("\n".join(criteo_lines(200)) + "\n")
    return path


def table(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_published_layout(log: Path) -> None:
    layout = read_layout(log)
    assert layout == Layout.criteo() and len(layout.names) == 40
    (chunk,) = read_chunks(log, layout)
    cells = [line.split("\t") for line in log.read_text().splitlines()]
    assert chunk.labels.tolist() == [float(row[0]) for row in cells]
    for row in range(20):
        for column in range(13):
            value = float(cells[row][1 + column] or 0)
            assert chunk.dense[row, column] == np.float32(math.log1p(max(value, 0)))
    assert chunk.categories[25][7] == cells[7][39]


def test_compressed_and_limited(log: Path, tmp_path: Path) -> None:
    packed = tmp_path / "day_0.gz"
    packed.write_bytes(gzip.compress(log.read_bytes()))
    whole, first = next(read_chunks(packed, read_layout(packed))), next(read_chunks(log, Layout.criteo(), limit=7))
    assert len(first.labels) == 7 and np.array_equal(whole.dense[:7], first.dense)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(FormatError, match="day_0.gz is no table"):
        list(read_chunks(packed, Layout.criteo()))


def test_columns_by_name(tmp_path: Path) -> None:
    path = table(tmp_path, 'shop,C2,C10,click,I1\n"a, b",x,,1,3\nc,y,z,0,\n')
    layout = read_layout(path)
    assert layout == Layout("click", ("I1",), ("C2", "C10"))
    chosen = read_layout(path, dense=["I1"], categorical=["shop", "C2"])
    (chunk,) = read_chunks(path, chosen)
    assert chunk.categories == (("a, b", "c"), ("x", "y"))


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("a,b\n1,2\n", {}, "has no column label or click or clicked or target; its columns are a, b"),
        ("label,I1,b\n1,2,3\n", {}, "has no columns C1, C2, .* --categorical user,item"),
        ("label,C1,b\n1,2,3\n", {}, "has no columns I1, I2, .* --dense price,age"),
        ("label,I1,C1\n1,2,3\n", {"label": "bought"}, "has no column 'bought'"),
        ("label,I1,C1\n1,2,3\n", {"categorical": ["C1", "I1"]}, "column 'I1' is named twice"),
    ],
)
def test_missing_columns_are_named(tmp_path: Path, text: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_layout(table(tmp_path, text), **given)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nan,1,a", "row 3: column label is 'nan'; a label is 0 or 1"),
        (",1,a", "row 3: column label is ''"),
        ("2,1,a", "row 3: column label is '2'"),
        ("1,tall,a", "row 3: column I1 is 'tall'; a finite number is needed, or nothing"),
        ("1,inf,a", "row 3: column I1 is 'inf'; a finite number"),
        ("1,1", "row 3: 2 columns instead of 3"),
        ("1,1," + "a" * 70_000, "row 3: column C1 holds 70000 characters"),
    ],
)
def test_a_bad_row_is_named_by_its_number(tmp_path: Path, row: str, message: str) -> None:
    path = table(tmp_path, f"label,I1,C1\n0,1,a\n1,,b\n{row}\n0,1,a\n")
    with pytest.raises(FormatError, match=f"log.csv, {message}"):
        list(read_chunks(path, read_layout(path)))


def test_a_short_row_of_the_published_layout(log: Path) -> None:
    log.write_text(log.read_text() + "1\t2\t3\n")
    with pytest.raises(FormatError, match="day_0, row 201: 3 columns instead of 40"):
        list(read_chunks(log, Layout.criteo()))


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        read_layout(tmp_path / "none.csv")
    with pytest.raises(FormatError, match="is empty"):
        read_layout(table(tmp_path, ""))


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    path = tmp_path / "log.parquet"
    columns = {"label": [0, 1, 1], "I1": [1.5, None, 7.0], "C1": ["a", None, "b"], "C2": [-5, 12, 3]}
    parquet.write_table(pyarrow.table(columns), path)
    (chunk,) = read_chunks(path, read_layout(path))
    same = table(tmp_path, "label,I1,C1,C2\n0,1.5,a,-5\n1,,,12\n1,7,b,3\n")
    (other,) = read_chunks(same, read_layout(same))
    assert np.array_equal(chunk.dense, other.dense) and chunk.categories == other.categories
    path.write_bytes(b"PAR1" + path.read_bytes()[4:60])
    with pytest.raises(FormatError, match="log.parquet cannot be read: Parquet magic bytes not found"):
        read_layout(path)


def test_a_missing_package_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackage, match="log.parquet needs the package pyarrow: pip install pyarrow"):
        read_layout(table(tmp_path, "x", "log.parquet"))


def test_the_vocabulary(tmp_path: Path) -> None:
    words = ["often"] * 6 + ["twice", "twice", "once", ""] + ["new", "often", ""]  # the last three are held out
    rows = "".join(f"{i % 2},1,{word}\n" for i, word in enumerate(words))
    path = table(tmp_path, "label,I1,C1\n" + rows)
    layout = read_layout(path)
    options: dict[str, Any] = {"hash_rows": 1000, "min_count": 2, "valid": 3 / 13}
    train, valid, _vocabulary = prepare_clicks(path, layout, tmp_path / "data", **options)
    assert (len(train), len(valid)) == (10, 3) and train.schema.sizes == (4,)
    often, twice = train.ids[0, 0], train.ids[6, 0]
    assert {int(often), int(twice)} == {2, 3} and len(set(hash_texts(["often", "twice", "once", "new"], 1000))) == 4
    assert train.ids[:, 0].tolist() == [often] * 6 + [twice] * 2 + [RARE, MISSING]
    assert valid.ids[:, 0].tolist() == [RARE, often, MISSING]  # "new" was not in the training part

    again = Vocabulary.from_pretrained(tmp_path / "data")
    (chunk,) = read_chunks(path, layout)
    assert torch.equal(again.encode(chunk).ids, torch.cat([train.ids, valid.ids]))
    seen: list[int] = []
    prepare_clicks(path, layout, tmp_path / "data", **options, tick=seen.append)
    assert not seen  # read once
    prepare_clicks(path, layout, tmp_path / "data", **{**options, "min_count": 1}, tick=seen.append)
    assert seen == [13]


def test_a_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, "label,I1,C1\n" + "0,1,a\n1,1,b\n" * 5)
    prepare_clicks(path, read_layout(path), tmp_path / "data", hash_rows=10)
    ids = tmp_path / "data" / "ids"
    ids.write_bytes(ids.read_bytes()[:-4])
    with pytest.raises(FormatError, match="ids does not have the 40 bytes of 10 rows"):
        prepare_clicks(path, read_layout(path), tmp_path / "data", hash_rows=10)
    file = tmp_path / "data" / "features.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "format": 9}))
    with pytest.raises(FormatError, match="has format 9; this version reads 1"):
        Vocabulary.from_pretrained(tmp_path / "data")
    with pytest.raises(UsageError, match="has no features.json"):
        Vocabulary.from_pretrained(tmp_path)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    path = table(tmp_path, "label,I1,C1\n0,1,a\n")
    with pytest.raises(UsageError, match="hash_rows=1; "):
        prepare_clicks(path, read_layout(path), tmp_path / "data", hash_rows=1)
    with pytest.raises(UsageError, match="has 1 rows: too few"):
        prepare_clicks(path, read_layout(path), tmp_path / "data")
    assert not (tmp_path / "data").exists()
