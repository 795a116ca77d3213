"""The catalogue: one row for every published system of this line of research.

`catalogue.csv` holds the rows; `measured.json` holds the headline figure and the claims of each row that is not
planned, written from `results/*.csv` by `benchmarks/headlines.py` and never by hand. Standard library only: listing
takes no time.
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

STATES = ("planned", "built", "reproduced")
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class System:
    """One published system: its row of the catalogue, and what was measured.

    slug: its name; its folder is the same with underscores. arxiv: "" when there is no preprint. area: of research.
    state: "planned"; "built" where some claims of its recipe do not hold here; "reproduced" where all do. requires: the
    systems whose code it uses. summary: what it does. headline: our own figure, empty while planned. claims: how many
    hold, and how many there are.
    """

    slug: str
    title: str
    arxiv: str
    area: str
    state: str
    requires: tuple[str, ...]
    summary: str
    headline: str = ""
    claims: tuple[int, int] = (0, 0)

    @property
    def year(self) -> int | None:
        """Year of the first preprint, which its identifier tells."""
        return 2000 + int(self.arxiv[:2]) if self.arxiv else None

    @property
    def standing(self) -> str:
        """The state in words, as in "built (9 of 10 claims reproduced)"."""
        held, total = self.claims
        return f"{self.state} ({held} of {total} claims reproduced)" if self.state == "built" else self.state

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, with its year."""
        return {**asdict(self), "year": self.year}


@cache
def systems() -> tuple[System, ...]:
    """Every row, grouped by area, within an area by year."""
    measured = json.loads((HERE / "measured.json").read_text(encoding="utf-8"))
    with (HERE / "catalogue.csv").open(encoding="utf-8", newline="") as file:
        return tuple(_system(row, measured.get(row["slug"], {})) for row in csv.DictReader(file))


def _system(row: dict[str, str], measured: dict[str, Any]) -> System:
    requires = tuple(row.pop("requires").split())
    held, total = measured.get("claims", (0, 0))
    return System(**row, requires=requires, headline=measured.get("headline", ""), claims=(held, total))


def areas() -> list[str]:
    """The areas of research, in the order of the catalogue."""
    return list(dict.fromkeys(row.area for row in systems()))


def folder_of(slug: str) -> Path:
    """Where the code of a system is, or will be."""
    return HERE / slug.replace("-", "_")


def find(slug: str) -> System:
    """The row of one system; UsageError, with the nearest slug, when there is none."""
    by_slug = {row.slug: row for row in systems()}
    if slug not in by_slug:
        raise UsageError(
            f"no system is called {slug!r}{did_you_mean(slug, by_slug)}; `edgewright systems` lists them all"
        )
    return by_slug[slug]


def select(area: str | None = None, state: str | None = None) -> list[System]:
    """The rows of one area and one state, None for any; UsageError names what is allowed."""
    if area is not None and area not in areas():
        raise UsageError(f"no system is of the area {area!r}; areas: {', '.join(areas())}")
    if state is not None and state not in STATES:
        raise UsageError(f"no system is {state!r}; states: {', '.join(STATES)}")
    return [row for row in systems() if area in (None, row.area) and state in (None, row.state)]


def page(slug: str) -> str:
    """The system's page as Markdown: the README.md of its folder, or its row in full while it has none."""
    row = find(slug)
    path = folder_of(slug) / "README.md"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if row.state != "planned":
        raise EdgewrightError(f"the page of {slug} is missing from this installation; reinstall edgewright")
    source = f"arXiv {row.arxiv}, first of {row.year}" if row.arxiv else "no preprint"
    return (
        f"# {row.title}\n\n{row.summary[:1].upper()}{row.summary[1:]}.\n\n"
        f"- slug: {row.slug}\n- source: {source}\n- area: {row.area}\n- state: {row.state}\n"
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` when a known word is near, else nothing."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
