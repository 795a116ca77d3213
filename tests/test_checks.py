"""Rules for values, and their sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from edgewright.checks import Allowed, check, check_fields, number, one_of, optional, whole
from edgewright.errors import UsageError


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (whole(1), (1, 10**30), (0, True, 1.0, "1", None, math.inf)),
        (whole(2, 16), (2, 16), (1, 17)),
        (number(), (0, -1.5), (math.inf, math.nan, True, "0", None, [1])),
        (number(0, 1), (0, 1, 0.5), (-0.1, 1.1)),
        (number(above=0), (1e-300, 3), (0, -1)),
        (number(0, below=1), (0, 0.99), (1, -0.01)),
        (one_of("row", "tensor", 32), ("row", 32), ("Row", 32.0, [], {}, None)),
        (one_of(1, 2), (1,), (True,)),
        (optional(whole(1)), (None, 1), (0, "None")),
    ],
)
def test_what_a_rule_allows(rule: Allowed, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    for value in good:
        check("x", value, rule)
    for value in bad:
        with pytest.raises(UsageError, match="x="):
            check("x", value, rule)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (whole(1), "a whole number from 1 up"),
        (whole(2, 16), "a whole number from 2 to 16"),
        (number(), "a number"),
        (number(0, below=1), "a number at least 0 and below 1"),
        (number(0, 1), "a number from 0 to 1"),
        (optional(one_of("a", "b")), "one of a, b, or None"),
    ],
)
def test_the_words_of_a_rule(rule: Allowed, words: str) -> None:
    assert rule.words == words


def test_the_sentence_names_value_rule_and_way_out() -> None:
    with pytest.raises(UsageError) as caught:
        check("rank", 0, whole(1), "the paper uses 128")
    assert str(caught.value) == "rank=0; it must be a whole number from 1 up; the paper uses 128"
    with pytest.raises(UsageError) as caught:
        check("name", "x" * 10**6, one_of("a"))
    assert len(str(caught.value)) < 150


def test_fields_are_named_with_their_class() -> None:
    @dataclass(frozen=True)
    class Settings:
        steps: int = 1

        def __post_init__(self) -> None:
            check_fields(self, {"steps": whole(1)})

    assert Settings().steps == 1
    with pytest.raises(UsageError, match="Settings steps=-1; it must be a whole number from 1 up"):
        Settings(-1)
