"""Tables in README and docs are what results/ gives: no number in them was typed by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pages() -> list[Path]:
    return [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("README.md")]


def test_tables_come_from_results():
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_quoted_result_and_picture_exists():
    for page in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "src").rglob("README.md")),
    ]:
        text = page.read_text(encoding="utf-8")
        for link in (part.split(")")[0] for part in text.split("](")[1:]):
            if "://" not in link and not link.startswith("#"):
                assert (page.parent / link.split("#")[0]).exists(), f"{page.name} links to {link}, which is not there"


def test_every_module_that_a_page_names_exists():
    modules = {path.as_posix() for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    for page in pages():
        if page.name != "CONTRIBUTING.md":
            for name in re.findall(r"`([\w/.-]+\.py)`", page.read_text(encoding="utf-8")):
                assert any(module.endswith(f"/{name}") for module in modules), (
                    f"{page} names {name}, which is not there"
                )
