"""Numbers and dates in words: known phrases, an inverse written the other way round, splits, encoding."""

from __future__ import annotations

from datetime import date, timedelta

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.systems.ternary_binary_nlg.tasks import (
    END,
    FIRST_DAY,
    INDEX,
    MONTHS,
    ORDINALS,
    PADDING,
    SMALL,
    SOURCE_LENGTH,
    START,
    TARGET_LENGTH,
    TENS,
    TOKENS,
    date_words,
    decode,
    encode,
    examples,
    number_words,
)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety nine"),
        (100, "one hundred"),
        (342, "three hundred and forty two"),
        (1000, "one thousand"),
        (1005, "one thousand and five"),
        (1100, "one thousand one hundred"),
        (412005, "four hundred and twelve thousand and five"),
        (999999, "nine hundred and ninety nine thousand nine hundred and ninety nine"),
    ],
)
def test_known_numbers(number: int, words: str) -> None:
    assert " ".join(number_words(number)) == words


def read_number(words: list[str]) -> int:
    """The value of British number words, read from left to right."""
    total = part = 0
    for word in words:
        if word == "hundred":
            part *= 100
        elif word == "thousand":
            total, part = part * 1000, 0
        elif word in TENS:
            part += 10 * (TENS.index(word) + 2)
        elif word != "and":
            part += SMALL.index(word)
    return total + part


def test_every_number_can_be_read_back() -> None:
    for number in [*range(3000), *range(99_000, 102_000), *range(0, 1_000_000, 997), 999_999]:
        assert read_number(number_words(number)) == number
    with pytest.raises(UsageError, match="number=1000000; it must be a whole number from 0 to 999999"):
        number_words(1_000_000)


@pytest.mark.parametrize(
    ("day", "words"),
    [
        (date(1907, 3, 3), "the third of march nineteen oh seven"),
        (date(1985, 12, 20), "the twentieth of december nineteen eighty five"),
        (date(2000, 1, 31), "the thirty first of january two thousand"),
        (date(2005, 2, 28), "the twenty eighth of february two thousand and five"),
        (date(2010, 9, 30), "the thirtieth of september twenty ten"),
    ],
)
def test_known_dates(day: date, words: str) -> None:
    assert " ".join(date_words(day)) == words


def test_every_date_has_words_of_its_own() -> None:
    days = [FIRST_DAY + timedelta(days=k) for k in range(0, 72_000, 7)]
    spoken = {" ".join(date_words(day)) for day in days}
    assert len(spoken) == len(days)
    assert all(set(text.split()) <= set(TOKENS) for text in spoken)
    assert len(MONTHS) == 12 and len(ORDINALS) == 20 and len(set(TOKENS)) == len(TOKENS) == len(INDEX)


def test_examples_repeat_and_do_not_leak() -> None:
    train, held_out = examples(600, 3), examples(90, 3, held_out=True)
    assert train == examples(600, 3) != examples(600, 4)
    assert not {tuple(source) for source, _ in train} & {tuple(source) for source, _ in held_out}
    assert [source[0] for source, _ in held_out[:4]] == ["<digits>", "<words>", "<date>", "<digits>"]
    for (task, *source), target in held_out:
        if task == "<digits>":
            assert read_number(source) == int("".join(target))
        elif task == "<words>":
            assert read_number(target) == int("".join(source))
        else:
            assert date_words(date.fromisoformat("".join(target))) == source


def test_encoding_fits_and_comes_back() -> None:
    pairs = [(["<digits>", *number_words(777777)], list("777777")), (["<words>", *"777777"], number_words(777777))]
    pairs += examples(300, 0)
    batch = encode(pairs)
    assert batch["input_ids"].shape == (302, SOURCE_LENGTH) and batch["labels"].shape == (302, TARGET_LENGTH)
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PADDING).long())
    assert bool((batch["labels"] == END).sum(1).eq(1).all())
    answers = torch.cat([torch.full((302, 1), START), batch["labels"].clamp(min=0)], 1)
    assert decode(answers) == [target for _, target in pairs]
    assert decode(torch.tensor([[START, 500, END]])) == [["500"]]
