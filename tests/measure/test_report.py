"""The report: what goes in comes out, as valid JSON, as a table, and never half."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from edgewright.errors import FormatError, OutputError, UsageError
from edgewright.measure.report import Report, format_value


@dataclass(frozen=True)
class Settings:
    bits: int = 4
    folder: Path = Path("out")


def example() -> Report:
    report = Report("compress", {"config": Settings(), "betas": (0.9, 0.999), "limit": float("inf")})
    report.add("KL", 0.17234, subject="QAT", se=0.0041, n=40, unit="nat")
    report.add("KL", 0.289, subject="RTN", se=0.0052, n=40, unit="nat")
    report.add("file", 78.613, subject="QAT", unit="MB")
    report.add("steps", np.int64(40), subject="QAT")
    report.add("perplexity", float("nan"), subject="RTN")
    report.notes.append("a note with a | and [brackets]")
    return report


def strict(text: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_rows_survive_the_file(tmp_path):
    report = example()
    path = report.save(tmp_path / "new" / "folder")
    assert path.name == "report.json" and {p.name for p in path.parent.iterdir()} == {"report.json", "report.md"}
    again = Report.from_file(path.parent)
    assert [r for r in again.rows if r.metric != "perplexity"] == [r for r in report.rows if r.metric != "perplexity"]
    assert math.isnan(again.value("perplexity", "RTN"))
    assert again.to_dict() == report.to_dict()


def test_json_is_valid_and_has_the_promised_keys():
    data = strict(example().to_json())
    assert set(data) == {"title", "rows", "machine", "versions", "settings", "notes"}
    assert all(list(row) == ["metric", "value", "se", "n", "unit", "subject"] for row in data["rows"])
    assert data["rows"][-1]["value"] is None
    assert data["settings"] == {"config": {"bits": 4, "folder": "out"}, "betas": [0.9, 0.999], "limit": None}
    assert data["versions"]["python"] and data["machine"]["cores"] >= 1
    assert isinstance(data["rows"][3]["value"], int)


def test_a_second_value_replaces_the_first():
    report = Report("x")
    report.add("a", 1, subject="s")
    report.add("a", 2, subject="s")
    assert [row.value for row in report.rows] == [2]


def test_missing_values_are_named():
    with pytest.raises(UsageError, match="no 'speed' for 'QAT'; metrics: KL, file"):
        example().value("speed", "QAT")
    with pytest.raises(UsageError, match="no metric 'speed'"):
        example().table(["speed"])


def test_table_has_subjects_down_and_metrics_across():
    header, lines = example().table(["file", "KL"])
    assert header == ["", "file (MB)", "KL (nat)"]
    assert lines == [["QAT", "78.61", "0.1723 ± 0.0041"], ["RTN", "", "0.2890 ± 0.0052"]]
    assert "| QAT | 0.1723 ± 0.0041 | 78.61 | 40 |  |" in example().markdown()


@pytest.mark.parametrize("width", [60, 200])
def test_screen_shows_every_number_at_any_width(width):
    console = Console(file=io.StringIO(), width=width)
    example().print_table(console)
    shown = console.file.getvalue()
    for text in ("QAT", "RTN", "0.1723 ± 0.0041", "78.61", "[brackets]"):
        assert text in shown


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (0.17234, 0.0041, "0.1723 ± 0.0041"),
        (213.37, 12.3, "213 ± 12"),
        (213.37, 1.23, "213.4 ± 1.2"),
        (78.613, None, "78.61"),
        (78.613, 0.0, "78.61"),
        (3, None, "3"),
        (1.5e-7, None, "1.500e-07"),
        (0.0, None, "0"),
        (math.nan, 0.1, "-"),
        (-math.inf, None, "-inf"),
        (5.0, math.nan, "5"),
    ],
)
def test_numbers_are_rounded_where_their_error_begins(value, se, text):
    assert format_value(value, se) == text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "\xff",
        '{"title": 3, "rows": []}',
        '{"title": "x"}',
        '{"title": "x", "rows": {}}',
        '{"title": "x", "rows": [3]}',
        '{"title": "x", "rows": [{"metric": "a"}]}',
        '{"title": "x", "rows": [{"metric": "a", "value": "1"}]}',
        '{"title": "x", "rows": [{"metric": "a", "value": true}]}',
        '{"title": "x", "rows": [{"metric": "a", "value": 1, "n": 1.5}]}',
        '{"title": "x", "rows": [{"metric": "a", "value": 1, "colour": 1}]}',
        '{"title": "x", "rows": [{"metric": "a", "value": 1' + 400 * "0" + "}]}",
        '{"title": "x", "rows": [], "settings": []}',
        '{"title": "x", "rows": [], "notes": [1]}',
        100_000 * "[",
    ],
)
def test_what_is_no_report_is_refused(tmp_path, content):
    file = tmp_path / "report.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(FormatError):
        Report.from_file(file)


def test_a_missing_file_and_a_blocked_folder_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        Report.from_file(tmp_path / "none.json")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        example().save(tmp_path / "file" / "below")
