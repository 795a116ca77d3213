"""The made moderation task: what is in it, that splits never meet, that a seed fixes it."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from edgewright.errors import UsageError
from edgewright.systems.llama_guard_int4.task import (
    CATEGORIES,
    POLICY,
    SPLITS,
    background_sentences,
    guard_examples,
    luhn,
    split_of,
)

DIGITS = re.compile(r"\d(?:[ -]?\d){15}")


def numbers(text: str) -> list[str]:
    return [re.sub(r"\D", "", found) for found in DIGITS.findall(text)]


def naive_luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(digits[::-1]):
        value = int(digit)
        if place % 2:
            value *= 2
        total += sum(int(d) for d in str(value))
    return total % 10 == 0


def test_luhn() -> None:
    assert luhn("4539148803436467") and not luhn("4539148803436468")
    assert luhn("79927398713")
    for number in range(2000):
        assert luhn(str(number)) == naive_luhn(str(number))


def test_cards_pass_the_check_and_their_doubles_do_not() -> None:
    seen = Counter()
    for example in guard_examples(600, "train"):
        for number in numbers(example.text):
            assert luhn(number) == ("S1" in example.categories), example
            seen[luhn(number)] += 1
    assert seen[True] > 30 and seen[False] > 20


def test_every_kind_occurs_in_every_split() -> None:
    for split in SPLITS:
        examples = guard_examples(240, split)
        assert len({example.text for example in examples}) == 240
        kinds = Counter(example.kind for example in examples)
        assert set(kinds) == {"unsafe", "background", *(f"hard {code}" for code in CATEGORIES)}
        assert 0.3 < kinds["unsafe"] / 240 < 0.7
        codes = Counter(code for example in examples for code in example.categories)
        assert set(codes) == set(CATEGORIES) and min(codes.values()) >= 8
        assert any(len(example.categories) == 2 for example in examples)
        for example in examples:
            assert bool(example.categories) == (example.kind == "unsafe")
            assert list(example.categories) == sorted(example.categories)
            assert POLICY.answer(example.categories) in POLICY.answers()


def test_splits_never_meet_whatever_the_seed() -> None:
    texts = {split: {e.text for seed in range(3) for e in guard_examples(150, split, seed)} for split in SPLITS}
    for split, own in texts.items():
        assert all(split_of(text) == split for text in own)
        assert not own & set().union(*(texts[other] for other in SPLITS if other != split))
    sentences = [set(background_sentences(split)) for split in SPLITS]
    assert not sentences[0] & sentences[1] and not sentences[0] & sentences[2] and min(map(len, sentences)) >= 10


def test_a_seed_fixes_the_examples() -> None:
    assert guard_examples(50, "dev", 3) == guard_examples(50, "dev", 3)
    assert guard_examples(50, "dev", 3) != guard_examples(50, "dev", 4)
    assert guard_examples(20, "dev", 3) == guard_examples(50, "dev", 3)[:20]


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError, match="split='tset'; it must be one of"):
        guard_examples(1, "tset")
    with pytest.raises(UsageError, match="count=0; it must be a whole number from 1 up"):
        guard_examples(0, "test")
