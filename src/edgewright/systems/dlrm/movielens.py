"""MovieLens 100k as clicks: 100,000 ratings in the order of time; four stars or more are a click (55.4 %).

The files lie inside the package recbole, which is read and never imported. Counts are of earlier samples of the
training part alone: what comes later must not leak into what a model sees, and a user who is new in the test looks
like one who was new in training.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from edgewright.checks import check, number, one_of
from edgewright.errors import FormatError, UsageError
from edgewright.io.bundled import bundled_data
from edgewright.systems.dlrm.click_log import cross
from edgewright.systems.dlrm.clicks import ClickData, Schema

CLICK = 4.0  # stars
CROSS_ROWS = 20_000
SPLITS = ("time", "random")
DENSE = ("age", "year", "user_count", "item_count")
CROSSES = ("user_genre", "user_item")
TABLES = ("user", "item", "gender", "occupation", "zip3", "year", "genres", *CROSSES)


class Split(NamedTuple):
    """Samples to train on, to stop by, and to judge by."""

    train: ClickData
    valid: ClickData
    test: ClickData


@dataclass(frozen=True)
class _Features:
    """dense [2]: age and year, scaled; ids of the tables but the crosses; genres: up to six each."""

    users: dict[str, tuple[float, tuple[int, ...]]]
    items: dict[str, tuple[float, int, tuple[int, ...]]]
    sizes: dict[str, int]
    most_genres: int


def movielens_100k(
    split: str = "time",
    seed: int = 0,
    train: float = 0.8,
    valid: float = 0.1,
    folder: str | Path | None = None,
) -> Split:
    """MovieLens 100k in three parts: to train on, to stop by, and to judge by.

    Dense: age, year of release, logarithms of how often user and item occurred in the training part until then.
    Tables: user, item, gender, occupation, first three digits of the zip code, year, genres (a bag), and hashed pairs
    of user and genre (a bag) and of user and item.

    Args:
        split: "time" (the test is what came last) or "random" (an order drawn from `seed`; each part stays in the order
            of time).
        seed: of the random order.
        train: share of all samples before the test.
        valid: share of those, the last ones, to stop by.
        folder: of RecBole's files, by default those inside the package recbole.

    Returns:
        (train, valid, test).

    Raises:
        UsageError: an argument breaks its rule, or the files are missing.
        FormatError: a line that cannot be read, by its number.
    """
    check("split", split, one_of(*SPLITS))
    for name, share in (("train", train), ("valid", valid)):
        check(name, share, number(above=0, below=1))
    folder = bundled_data("ml-100k") if folder is None else Path(folder)
    features = _features(folder)
    events = sorted(_events(folder / "ml-100k.inter", features), key=lambda event: event[3])  # stable
    order = np.arange(len(events))
    if split == "random":
        order = torch.randperm(len(events), generator=torch.Generator().manual_seed(seed)).numpy()
    cut = round(train * len(events))
    inner = round((1 - valid) * cut)
    parts = [np.sort(order[:inner]), np.sort(order[inner:cut]), np.sort(order[cut:])]
    return Split(*_encode(events, features, parts))


def _features(folder: Path) -> _Features:
    def index(values: list[str]) -> dict[str, int]:
        return {value: place for place, value in enumerate(sorted(set(values)))}

    people = {row["user_id"]: row for row in _table(folder / "ml-100k.user")}
    films = {row["item_id"]: row for row in _table(folder / "ml-100k.item")}
    gender = index([p["gender"] for p in people.values()])
    occupation = index([p["occupation"] for p in people.values()])
    zip3 = index([p["zip_code"][:3] for p in people.values()])
    year = index([f["release_year"] for f in films.values()])
    genre = index([name for f in films.values() for name in f["class"].split()])
    user = {name: place for place, name in enumerate(people)}
    item = {name: place for place, name in enumerate(films)}
    users: dict[str, tuple[float, tuple[int, ...]]] = {
        name: (
            (float(p["age"]) - 34.0) / 12.0,  # near mean 0 and deviation 1 among the users
            (user[name], gender[p["gender"]], occupation[p["occupation"]], zip3[p["zip_code"][:3]]),
        )
        for name, p in people.items()
    }
    items = {}
    for name, film in films.items():
        when = film["release_year"]
        age = (float(when) - 1990.0) / 10.0 if when.strip().isdigit() else 0.0
        genres = tuple(dict.fromkeys(genre[part] for part in film["class"].split()))
        items[name] = (age, year[when], (item[name], *genres))
    sizes = {
        "user": len(user), "item": len(item), "gender": len(gender), "occupation": len(occupation), "zip3": len(zip3),
        "year": len(year), "genres": len(genre), "user_genre": CROSS_ROWS, "user_item": CROSS_ROWS,
    }  # fmt: skip
    return _Features(users, items, sizes, max(len(ids) - 1 for _, _, ids in items.values()))


def _events(path: Path, features: _Features) -> Iterator[tuple[str, str, float, float]]:
    """(user, item, stars, seconds) of every rating."""
    for line, row in enumerate(_table(path), 2):
        try:
            event = row["user_id"], row["item_id"], float(row["rating"]), float(row["timestamp"])
            features.users[event[0]], features.items[event[1]]  # both are in their tables
        except (KeyError, ValueError) as error:
            raise FormatError(
                f"{path.name}, line {line}: {error}; a rating is of a user and an item of the tables, in numbers"
            ) from error
        yield event


def _encode(events: list[tuple[str, str, float, float]], features: _Features, parts: list[np.ndarray]) -> list:
    width = features.most_genres
    slots = tuple(width if name in ("genres", "user_genre") else 1 for name in TABLES)
    schema = Schema(DENSE, TABLES, tuple(features.sizes[name] for name in TABLES), slots)
    persons = [features.users[user] for user, *_ in events]
    films = [features.items[item] for _, item, *_ in events]
    users = np.array([ids for _, ids in persons])  # [N, 4]
    years = np.array([year for _, year, _ in films])
    items = np.array([ids[0] for _, _, ids in films])
    genres = np.full((len(events), width), -1)
    for row, (_, _, held) in zip(genres, films, strict=True):
        row[: len(held) - 1] = held[1:]
    user = users[:, 0]
    pairs = np.where(genres >= 0, cross(np.repeat(user[:, None], width, 1), genres, CROSS_ROWS, salt=1), -1)
    both = cross(user, items, CROSS_ROWS, salt=2)
    ids = np.column_stack([user, items, users[:, 1:], years, genres, pairs, both]).astype(np.int32)

    trained = np.isin(np.arange(len(events)), parts[0])
    counts = np.column_stack([_earlier(user, trained), _earlier(items, trained)])
    stated = np.array([[person[0], film[0]] for person, film in zip(persons, films, strict=True)])
    dense = np.column_stack([stated, np.log1p(counts) / 3.0 - 1.0]).astype(np.float32)
    labels = np.array([stars >= CLICK for _, _, stars, _ in events], dtype=np.float32)
    whole = ClickData(schema, *map(torch.from_numpy, (dense, ids, labels, user)))
    return [whole.rows(torch.from_numpy(part)) for part in parts]


def _earlier(ids: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """How many of the `counted` events before each event (the order is that of time) have its id."""
    order = np.argsort(ids, kind="stable")
    before = np.cumsum(counted[order]) - counted[order]
    _, first, lengths = np.unique(ids[order], return_index=True, return_counts=True)
    found = np.empty_like(before)
    found[order] = before - np.repeat(before[first], lengths)
    return found


def _table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of one of RecBole's files: tab-separated, with a header of name:type. Raises FormatError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            names = [name.partition(":")[0] for name in next(reader, [])]
            for line, row in enumerate(reader, 2):
                if len(row) != len(names):
                    raise FormatError(f"{path.name}, line {line}: {len(row)} columns instead of {len(names)}")
                yield dict(zip(names, row, strict=True))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8: {error.reason}") from error
