"""A real rewriting task that needs no data: numbers and dates between their written and their digital form.

    <digits> four hundred and twelve thousand and five      ->  4 1 2 0 0 5
    <words> 4 1 2 0 0 5                                     ->  four hundred and twelve thousand and five
    <date> the third of march nineteen oh seven             ->  1 9 0 7 - 0 3 - 0 3

Speech recognition ends and speech synthesis begins with it. Every answer is unique, so that greedy decoding can be
judged by exact match, and one wrong step spoils the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta

import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.io.hashing import crc32

SMALL = (
    *[
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
    ],
    *["sixteen", "seventeen", "eighteen", "nineteen"],
)
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ORDINALS = (
    *[
        "first",
        "second",
        "third",
        "fourth",
        "fifth",
        "sixth",
        "seventh",
        "eighth",
        "ninth",
        "tenth",
        "eleventh",
        "twelfth",
        "thirteenth",
    ],
    *["fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth", "twentieth"],
)
MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
TASKS = ("<digits>", "<words>", "<date>")
PADDING, START, END = 0, 1, 2
TOKENS: tuple[str, ...] = (
    *("<pad>", "<start>", "<end>"),
    *TASKS,
    *"0123456789-",
    *SMALL,
    *TENS,
    *("hundred", "thousand", "and", "the", "of", "oh"),
    *ORDINALS,
    "thirtieth",
    *MONTHS,
)
INDEX = {token: index for index, token in enumerate(TOKENS)}
LARGEST = 999_999
FIRST_DAY, DAYS = date(1901, 1, 1), (date(2099, 12, 31) - date(1901, 1, 1)).days + 1
SOURCE_LENGTH = TARGET_LENGTH = 13  # twelve tokens at most, and one for the task or the end
HELD_OUT_SHARE = 8  # one source in so many is kept for evaluation, by its checksum


def number_words(number: int) -> list[str]:
    """A number from 0 to 999999 in British words. Raises UsageError outside that range."""
    if not 0 <= number <= LARGEST:
        raise UsageError(f"{number} is not from 0 to {LARGEST}")
    if number < 20:
        return [SMALL[number]]
    if number < 100:
        return [TENS[number // 10 - 2], *([SMALL[number % 10]] if number % 10 else [])]
    if number < 1000:
        return [SMALL[number // 100], "hundred", *(["and", *number_words(number % 100)] if number % 100 else [])]
    rest = number % 1000
    link = ["and"] if 0 < rest < 100 else []
    return [*number_words(number // 1000), "thousand", *link, *(number_words(rest) if rest else [])]


def date_words(day: date) -> list[str]:
    """A date of the years 1901 to 2099: the third of march nineteen oh seven."""
    if day.day <= 20:
        ordinal = [ORDINALS[day.day - 1]]
    elif day.day == 30:
        ordinal = ["thirtieth"]
    else:
        ordinal = [TENS[day.day // 10 - 2], ORDINALS[day.day % 10 - 1]]
    century, year = divmod(day.year, 100)
    if 2000 <= day.year < 2010:
        spoken = number_words(day.year)
    elif year < 10:
        spoken = [*number_words(century), "oh", SMALL[year]]
    else:
        spoken = [*number_words(century), *number_words(year)]
    return ["the", *ordinal, "of", MONTHS[day.month - 1], *spoken]


def examples(count: int, seed: int, held_out: bool = False) -> list[tuple[list[str], list[str]]]:
    """Pairs (source, target) of tokens, the three tasks in turn; held-out sources never occur among the others.

    Numbers are spread evenly over their lengths from 1 to 6 digits, dates over their days.
    """
    generator = torch.Generator().manual_seed(2 * seed + held_out)
    found: list[tuple[list[str], list[str]]] = []
    while len(found) < count:
        task = TASKS[len(found) % len(TASKS)]
        if task == "<date>":
            day = FIRST_DAY + timedelta(days=_below(DAYS, generator))
            source, target = date_words(day), list(day.isoformat())
        else:
            number = _below(10 ** (1 + _below(6, generator)), generator)
            source, target = number_words(number), list(str(number))
            if task == "<words>":
                source, target = target, source
        if (crc32(" ".join(source)) % HELD_OUT_SHARE == 0) == held_out:
            found.append(([task, *source], target))
    return found


def encode(pairs: Sequence[tuple[list[str], list[str]]]) -> dict[str, Tensor]:
    """Batch of pairs: input_ids and attention_mask [N, 13], labels [N, 13] that end with <end>, then -100."""
    ids = torch.full((len(pairs), SOURCE_LENGTH), PADDING)
    labels = torch.full((len(pairs), TARGET_LENGTH), -100)
    for row, (source, target) in enumerate(pairs):
        ids[row, : len(source)] = torch.tensor([INDEX[token] for token in source])
        labels[row, : len(target) + 1] = torch.tensor([*(INDEX[token] for token in target), END])
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": labels}


def decode(ids: Tensor) -> list[list[str]]:
    """Tokens of each row [N, T] up to its first <end>, without the start; an id beyond the table stays a number."""
    rows = []
    for row in ids.tolist():
        body = row[1:] if row and row[0] == START else row
        body = body[: body.index(END)] if END in body else body
        rows.append([TOKENS[i] if 0 <= i < len(TOKENS) else str(i) for i in body])
    return rows


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
