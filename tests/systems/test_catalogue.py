"""The catalogue: fifty rows in order, filters, JSON for scripts, a page for each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgewright import cli
from edgewright.errors import EdgewrightError, UsageError
from edgewright.systems import catalogue

KEYS = {"slug", "title", "arxiv", "year", "area", "state", "requires", "summary", "headline", "claims"}


def system(slug: str, state: str) -> catalogue.System:
    return catalogue.System(slug, "X", "", "optim", state, (), "does")


def test_fifty_rows_each_complete() -> None:
    rows = catalogue.systems()
    slugs = {row.slug for row in rows}
    assert len(rows) == 50 and len(slugs) == 50 and len({row.title for row in rows}) == 50
    for row in rows:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.slug)
        assert re.fullmatch(r"\d{4}\.\d{4,5}|", row.arxiv)
        assert row.state in catalogue.STATES
        assert set(row.requires) <= slugs - {row.slug}
        assert row.title and 20 <= len(row.summary) <= 110 and not row.summary.endswith(".")
        assert bool(row.headline) == (row.state != "planned")


def test_the_state_is_what_the_claims_say() -> None:
    for row in catalogue.systems():
        held, total = row.claims
        assert row.state == ("planned" if not total else "reproduced" if held == total else "built"), row.slug
    assert re.fullmatch(r"built \(\d+ of \d+ claims reproduced\)", catalogue.find("dlrm").standing)
    assert catalogue.find("bit").standing == "reproduced"


def test_areas_hang_together_and_are_in_order_of_publication() -> None:
    rows = catalogue.systems()
    assert [row.area for row in rows] == [area for area in catalogue.areas() for row in rows if row.area == area]
    for area in catalogue.areas():
        published = [row.arxiv for row in rows if row.area == area and row.arxiv]
        assert published == sorted(published)


def test_year_is_that_of_the_preprint() -> None:
    assert catalogue.find("int8-whitepaper").year == 2018
    assert system("x", "planned").year is None


def test_filters() -> None:
    assert {row.slug for row in catalogue.select(area="optim")} == {"apollo", "distributed-lion"}
    assert sum(len(catalogue.select(state=state)) for state in catalogue.STATES) == 50
    with pytest.raises(UsageError, match="no system is of the area 'attic'; areas: evaluation"):
        catalogue.select(area="attic")
    with pytest.raises(UsageError, match="no system is 'ready'; states: planned, built, reproduced"):
        catalogue.select(state="ready")


def test_unknown_slug_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="'pareto-q', did you mean 'paretoq'"):
        catalogue.find("pareto-q")


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["systems", "--json", "--area", "recsys"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [set(row) for row in rows] == [KEYS] * 3
    assert {row["slug"] for row in rows} == {"dlrm", "check-n-run", "low-precision-recsys"}


def test_list_in_a_pipe_is_one_line_a_system() -> None:
    result = subprocess.run([sys.executable, "-m", "edgewright", "systems"], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    for row in catalogue.systems():
        (line,) = [line for line in lines if row.slug in line.split()[:2]]
        assert row.summary in line and row.area in line and row.state in line


def test_one_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["systems", "paretoq", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arxiv"] == "2502.02631"
    planned = next(row for row in catalogue.systems() if row.state == "planned")
    for row in (planned, catalogue.find("dlrm")):
        assert cli.main(["systems", row.slug]) == 0
        assert capsys.readouterr().out.startswith("# ")
    assert cli.main(["systems", "dlrm", "--area", "recsys"]) == 2


def test_a_page_is_the_readme_of_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "check_n_run").mkdir()
    (tmp_path / "check_n_run" / "README.md").write_text("# the page\n")
    monkeypatch.setattr(catalogue, "HERE", tmp_path)
    monkeypatch.setattr(catalogue, "find", lambda slug: system(slug, "planned"))
    assert catalogue.page("check-n-run") == "# the page\n"
    expected = "# X\n\nDoes.\n\n- slug: apollo\n- source: no preprint\n- area: optim\n- state: planned\n"
    assert catalogue.page("apollo") == expected
    monkeypatch.setattr(catalogue, "find", lambda slug: system(slug, "reproduced"))
    with pytest.raises(EdgewrightError, match="page of no-such-page is missing"):
        catalogue.page("no-such-page")
