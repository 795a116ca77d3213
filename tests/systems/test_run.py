"""The run object of recipes: points are measured once, seeds become rows, plots are files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from edgewright.errors import FormatError
from edgewright.systems.run import POINTS, Run, language_rows, over_seeds, row_over_seeds, smoothed


def test_points_are_measured_once_and_come_back_as_json(tmp_path: Path) -> None:
    calls: list[str] = []

    def measure() -> dict[str, object]:
        calls.append("measured")
        return {"value": 0.1, "pair": (1, 2)}

    run = Run(tmp_path, "title")
    first = run.memo("a", measure)
    assert first == {"value": 0.1, "pair": [1, 2]} == run.memo("a", measure)
    assert Run(tmp_path, "title").memo("a", measure) == first and calls == ["measured"]
    assert Run(tmp_path, "title").over_seeds("b", 3, lambda seed: seed * seed) == [0, 1, 4]
    assert set(Run(tmp_path, "title").points) == {"a", "b/0", "b/1", "b/2"}


@pytest.mark.parametrize("text", ['{"a": 1}', "{}", '{"points": [], "sha256": ""}', "[1"])
def test_points_that_no_run_wrote_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / POINTS).write_text(text)
    with pytest.raises(FormatError):
        Run(tmp_path, "title")


def test_a_changed_point_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, "title").memo("a", lambda: 1)
    path = tmp_path / POINTS
    stored = json.loads(path.read_text())
    stored["points"]["a"] = 2
    path.write_text(json.dumps(stored))
    with pytest.raises(FormatError, match="not as the run left it"):
        Run(tmp_path, "title")


def test_seeds_become_a_row_with_its_standard_error(tmp_path: Path) -> None:
    assert over_seeds([3.0]) == {"value": 3.0, "se": None, "n": 1}
    assert over_seeds([1.0, 3.0]) == {"value": 2.0, "se": pytest.approx(math.sqrt(2) / math.sqrt(2)), "n": 2}
    assert row_over_seeds([{"value": 1.0, "unit": "s"}]) == {"value": 1.0, "unit": "s"}
    run = Run(tmp_path, "title")
    run.add("loss", [1.0, 3.0], "ours", "nats")
    run.add("size", 5, "ours", "MB", n=2)
    row, size = run.report.row("loss", "ours"), run.report.row("size", "ours")
    assert (row.value, row.se, row.n, row.unit) == (2.0, pytest.approx(1.0), 2, "nats")
    assert (size.value, size.se, size.n) == (5, None, 2)
    assert smoothed([0.0, 2.0, 4.0], 1) == [0.0, 1.0, 3.0]


def test_rows_of_a_language_model(tmp_path: Path) -> None:
    blocks = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(0))
    rows = language_rows(lambda ids: torch.zeros(*ids.shape, 7), blocks, lambda ids: torch.eye(7)[ids], "flat")
    assert [row["metric"] for row in rows] == ["perplexity", "kl", "top1_agreement"]
    assert rows[0]["value"] == pytest.approx(7.0) and rows[0]["n"] == 12 and rows[1]["value"] > 0
    run = Run(tmp_path, "title")
    run.add_rows(run.memo("flat", lambda: rows))
    assert run.report.row("kl", "flat").unit == "nats/token"


def test_plots(tmp_path: Path) -> None:
    run = Run(tmp_path, "title")
    for width, loss in ((1, 3.0), (2, 2.0)):
        run.add("loss", [loss, loss + 0.1], f"ours {width}")
    run.bars("bars.png", "loss", "nats", ["ours 2", "ours 1"])
    assert run.curve("loss", ["ours 1", "ours 2", "ours 3"], [1, 2, 3])[0] == [1, 2]
    curves = {"ours": run.curve("loss", ["ours 1", "ours 2"], [1, 2]), "theirs": [3.0, 1.0]}
    run.lines("lines.png", curves, "bits", "nats", style="o-", yscale="log")
    for name in ("bars.png", "lines.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
