"""Settings changed from the command line: typed by their fields, refused in one sentence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from edgewright.errors import UsageError
from edgewright.systems.settings import override, plain


@dataclass(frozen=True)
class Walk:
    steps: int = 400
    scale: float = 1.0


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    walk: Walk = field(default_factory=Walk)
    bits: Literal["4", "1.58"] = "4"
    widths: tuple[float, ...] = (1.0, 2.0)
    pair: tuple[int, str] = (1, "a")
    limit: int | None = None
    data: Path | None = None
    verbose: bool = False


def test_overrides_are_typed_by_their_fields() -> None:
    settings = override(
        Settings(),
        [
            "seed=3",
            "walk.steps=7",
            "walk.scale=1e-1",
            "bits=1.58",
            "widths=1,2.5",
            "pair=2, b",
            "limit=9",
            "data=x.txt",
            "verbose=yes",
        ],
    )
    assert settings == Settings(3, Walk(7, 0.1), "1.58", (1.0, 2.5), (2, "b"), 9, Path("x.txt"), True)
    assert override(settings, ["limit=none", "data=none", "verbose=false", "widths="]) == replace(
        settings, limit=None, data=None, verbose=False, widths=()
    )
    assert plain(settings)["walk"] == {"steps": 7, "scale": 0.1}


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("sead=1", "no setting is called 'sead', did you mean 'seed'?; settings: seed, walk.steps, walk.scale, bits"),
        ("walk.step=1", "no setting is called"),
        ("walk=1", "no setting is called 'walk'"),
        ("seed.x=1", "no setting is called"),
        ("seed", "has no value; write --set seed=VALUE"),
        ("seed=1.5", "'1.5' is no whole number; now seed=0"),
        ("walk.scale=big", "'big' is no number"),
        ("bits=5", "expected one of 4, 1.58"),
        ("verbose=maybe", "expected true or false"),
        ("pair=1", "expected 2 comma-separated values"),
        ("widths=1,x", "'x' is no number"),
    ],
)
def test_bad_overrides_are_one_sentence(assignment: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        override(Settings(), [assignment])
    assert sentence in str(error.value)


def test_a_dataclass_may_refuse_a_value_itself() -> None:
    @dataclass(frozen=True)
    class Strict:
        seed: int = 0

        def __post_init__(self) -> None:
            if self.seed < 0:
                raise UsageError("a seed is not negative")

    with pytest.raises(UsageError, match="^a seed is not negative$"):
        override(Strict(), ["seed=-1"])


def test_settings_that_json_cannot_keep_are_a_bug() -> None:
    @dataclass(frozen=True)
    class Odd:
        thing: object = object()

    with pytest.raises(TypeError, match="only numbers, texts, paths"):
        plain(Odd())
