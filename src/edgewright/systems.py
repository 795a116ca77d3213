"""The catalogue: one row for every published system of this line of research: planned, partial or working.

`systems.csv` holds the rows; `systems_headlines.json` holds the headline figure of each row that is not planned,
written from `results/*.csv` by `benchmarks/headlines.py` and never by hand. Standard library only: listing takes no
time.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgewright.errors import EdgewrightError, UsageError

STATES = ("planned", "partial", "working")
DISTRIBUTION = "edgewright"
INSTALLED_PAGES = "share/edgewright/systems"  # where a wheel puts docs/systems (pyproject's data-files)
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class System:
    """One published system: `room` is where it lives in the house, `summary` what it does, in our words."""

    slug: str
    title: str
    arxiv: str  # "" when there is no preprint
    room: str
    state: str  # "planned"; "working" once its recipe passes its claims, "partial" where some of them do not hold
    summary: str
    headline: str = ""  # our own figure; empty while planned

    @property
    def year(self) -> int | None:
        """Year of the first preprint, which its identifier tells."""
        return 2000 + int(self.arxiv[:2]) if self.arxiv else None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, with its year."""
        return {**asdict(self), "year": self.year}


@cache
def systems() -> tuple[System, ...]:
    """Every row, grouped by room, within a room by year."""
    headlines = json.loads((_HERE / "systems_headlines.json").read_text(encoding="utf-8"))
    with (_HERE / "systems.csv").open(encoding="utf-8", newline="") as file:
        return tuple(System(**row, headline=headlines.get(row["slug"], "")) for row in csv.DictReader(file))


def rooms() -> list[str]:
    """The rooms that the catalogue's systems live in, in the order of the catalogue."""
    return list(dict.fromkeys(row.room for row in systems()))


def find(slug: str) -> System:
    """The row of one system; UsageError, with the nearest slug, when there is none."""
    by_slug = {row.slug: row for row in systems()}
    if slug not in by_slug:
        raise UsageError(
            f"no system is called {slug!r}{did_you_mean(slug, by_slug)}; `edgewright systems` lists them all"
        )
    return by_slug[slug]


def select(room: str | None = None, state: str | None = None) -> list[System]:
    """The rows of one room and one state, None for any; UsageError names what is allowed."""
    if room is not None and room not in rooms():
        raise UsageError(f"no system lives in {room!r}; rooms: {', '.join(rooms())}")
    if state is not None and state not in STATES:
        raise UsageError(f"no system is {state!r}; states: {', '.join(STATES)}")
    return [row for row in systems() if room in (None, row.room) and state in (None, row.state)]


def page(slug: str) -> str:
    """The system's page as Markdown: `docs/systems/<slug>.md`, or its row in full while it has none.

    The pages have one source, `docs/systems`: a checkout reads them there, a wheel carries them as data files.
    """
    row = find(slug)
    for path in (_HERE.parents[1] / "docs" / "systems" / f"{slug}.md", _installed_page(slug)):
        if path is not None and path.is_file():
            return path.read_text(encoding="utf-8")
    if row.state != "planned":
        raise EdgewrightError(f"the page of {slug} is missing from this installation; reinstall edgewright")
    source = f"arXiv {row.arxiv}, first of {row.year}" if row.arxiv else "no preprint"
    return (
        f"# {row.title}\n\n{row.summary[:1].upper()}{row.summary[1:]}.\n\n"
        f"- slug: {row.slug}\n- source: {source}\n- room: {row.room}\n- state: {row.state}\n"
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` when a known word is near, else nothing."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _installed_page(slug: str) -> Path | None:
    from importlib import metadata

    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.as_posix().endswith(f"{INSTALLED_PAGES}/{slug}.md"):
            return Path(str(file.locate()))
    return None
