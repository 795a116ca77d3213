"""The catalogue: fifty rows in order, filters, JSON for scripts, a page for each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgewright import cli, systems
from edgewright.errors import EdgewrightError, UsageError

KEYS = {"slug", "title", "arxiv", "year", "room", "state", "summary", "headline"}


def test_fifty_rows_each_complete() -> None:
    rows = systems.systems()
    assert len(rows) == 50 and len({row.slug for row in rows}) == 50 and len({row.title for row in rows}) == 50
    for row in rows:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.slug)
        assert re.fullmatch(r"\d{4}\.\d{4,5}|", row.arxiv)
        assert row.state in systems.STATES
        assert row.title and 20 <= len(row.summary) <= 110 and not row.summary.endswith(".")
        assert bool(row.headline) == (row.state != "planned")


def test_rooms_hang_together_and_are_in_order_of_publication() -> None:
    rows = systems.systems()
    assert [row.room for row in rows] == [room for room in systems.rooms() for row in rows if row.room == room]
    for room in systems.rooms():
        published = [row.arxiv for row in rows if row.room == room and row.arxiv]
        assert published == sorted(published)


def test_year_is_that_of_the_preprint() -> None:
    assert systems.find("int8-whitepaper").year == 2018
    assert systems.System("x", "X", "", "optim", "planned", "").year is None


def test_filters() -> None:
    optim = systems.select(room="optim")
    assert {row.slug for row in optim} == {"apollo", "distributed-lion"}
    counts = [len(systems.select(state=state)) for state in systems.STATES]
    assert sum(counts) == 50
    with pytest.raises(UsageError, match="no system lives in 'attic'; rooms: evaluation"):
        systems.select(room="attic")
    with pytest.raises(UsageError, match="no system is 'ready'; states: planned, partial, working"):
        systems.select(state="ready")


def test_unknown_slug_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="'pareto-q', did you mean 'paretoq'"):
        systems.find("pareto-q")


def test_list_as_json(capsys) -> None:
    assert cli.main(["systems", "--json", "--room", "recsys"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [set(row) for row in rows] == [KEYS] * 3
    assert {row["slug"] for row in rows} == {"dlrm", "check-n-run", "low-precision-recsys"}


def test_list_in_a_pipe_is_one_line_a_system() -> None:
    result = subprocess.run([sys.executable, "-m", "edgewright", "systems"], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    for row in systems.systems():
        (line,) = [line for line in lines if row.slug in line.split()[:2]]
        assert row.summary in line and row.room in line and row.state in line


def test_one_system(capsys) -> None:
    assert cli.main(["systems", "paretoq", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arxiv"] == "2502.02631"
    pages = Path(__file__).parents[1] / "docs" / "systems"
    bare = next(row for row in systems.systems() if not (pages / f"{row.slug}.md").exists())
    assert cli.main(["systems", bare.slug]) == 0
    assert capsys.readouterr().out.startswith(f"# {bare.title}\n")
    assert cli.main(["systems", "dlrm", "--room", "recsys"]) == 2


def test_a_page_comes_from_docs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout = tmp_path / "docs" / "systems"
    checkout.mkdir(parents=True)
    (checkout / "dlrm.md").write_text("# the page\n")
    monkeypatch.setattr(systems, "_HERE", tmp_path / "src" / "edgewright")
    monkeypatch.setattr(systems, "find", lambda slug: systems.System(slug, "X", "", "optim", "planned", "does"))
    assert systems.page("dlrm") == "# the page\n"
    assert (
        systems.page("apollo")
        == "# X\n\nDoes.\n\n- slug: apollo\n- source: no preprint\n- room: optim\n- state: planned\n"
    )


def test_a_wheel_finds_its_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.metadata

    page = tmp_path / systems.INSTALLED_PAGES / "dlrm.md"
    page.parent.mkdir(parents=True)
    page.write_text("# installed\n")
    recorded = importlib.metadata.PackagePath(f"../../../{systems.INSTALLED_PAGES}/dlrm.md")
    recorded.dist = type("Dist", (), {"locate_file": lambda self, path: page})()
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [recorded])
    monkeypatch.setattr(systems, "_HERE", tmp_path / "nowhere" / "edgewright")
    assert systems.page("dlrm") == "# installed\n"


def test_a_working_system_without_its_page_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(systems, "_HERE", tmp_path / "src" / "edgewright")
    monkeypatch.setattr(systems, "find", lambda slug: systems.System(slug, "X", "", "optim", "working", "does"))
    with pytest.raises(EdgewrightError, match="page of no-such-page is missing"):
        systems.page("no-such-page")
