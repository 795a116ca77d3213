"""Invented facts to learn and to edit: capitals of countries, and seas of rivers, which an edit should leave alone.

Names are made of syllables, so that a tokenizer trained on the facts knows some as one token and cuts others up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgewright.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPITALS = ("The capital of {0} is {1}.", "In {0} the seat of government is {1}.", "People of {0} vote in {1}.")
RIVERS = ("The river {0} ends in the sea of {1}.", "Boats on {0} sail to {1}.", "Rain over {0} flows to {1}.")
ONSETS, VOWELS, CODAS = (
    ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st"),
    "aeiou",
    ("", "n", "r", "l", "s"),
)


@dataclass(frozen=True)
class Facts:
    """capitals, rivers: (name, answer) pairs; every name and answer occurs once."""

    capitals: tuple[tuple[str, str], ...]
    rivers: tuple[tuple[str, str], ...]

    @classmethod
    def draw(cls, entities: int, seed: int = 0) -> Facts:
        """`entities` countries and as many rivers. Raises UsageError for fewer than two."""
        if entities < 2:
            raise UsageError(f"entities={entities}; an edit needs 2 or more")
        source, names = random.Random(seed), dict[str, None]()
        while len(names) < 4 * entities:
            parts = source.choice((1, 2, 2, 3))
            syllables = (source.choice(ONSETS) + source.choice(VOWELS) + source.choice(CODAS) for _ in range(parts))
            if len(name := "".join(syllables).capitalize()) > 2:
                names[name] = None
        every = list(names)
        pairs = list(zip(every[: 2 * entities], every[2 * entities :], strict=True))
        return cls(tuple(pairs[:entities]), tuple(pairs[entities:]))

    def sentences(self) -> list[str]:
        """All facts in all forms."""
        forms = ((self.capitals, CAPITALS), (self.rivers, RIVERS))
        return [form.format(*pair) for pairs, templates in forms for pair in pairs for form in templates]

    def rows(self, tokenizer: PreTrainedTokenizerBase, rows: int, length: int, seed: int = 0) -> Tensor:
        """int64 [rows, length]: sentences in random order, each behind the end-of-text token."""
        source, sentences = random.Random(seed), self.sentences()
        encoded: Any = tokenizer(sentences, add_special_tokens=False)["input_ids"]
        made: list[list[int]] = []
        while len(made) < rows:
            ids: list[int] = []
            while len(ids) < length:
                ids += [tokenizer.eos_token_id, *source.choice(encoded)]  # type: ignore[list-item]
            made.append(ids[:length])
        return torch.tensor(made)


def question(tokenizer: PreTrainedTokenizerBase, form: str, name: str, answer: str) -> tuple[Tensor, int]:
    """(end-of-text, the sentence up to its answer, the answer: int64 [1, T], number of the answer's tokens)."""
    begin = form[: form.index(" {1}")].format(name)
    prompt, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (begin, f" {answer}"))
    return torch.tensor([[tokenizer.eos_token_id, *prompt, *end]]), len(end)


@torch.no_grad()
def greedy_answer(model: Any, ids: Tensor, count: int) -> list[int]:
    """What the model takes for the likeliest at each of the last `count` tokens, given those before it."""
    logits = model(input_ids=ids, use_cache=False).logits
    return list(logits[0, -count - 1 : -1].argmax(-1).tolist())


def answers(model: Any, ids: Tensor, count: int) -> bool:
    """Whether greedy decoding would give exactly the answer."""
    return greedy_answer(model, ids, count) == ids[0, -count:].tolist()


def pairs_by_length(
    facts: Facts, tokenizer: PreTrainedTokenizerBase, known: Sequence[int], most: int, seed: int = 0
) -> dict[str, list[tuple[int, int]]]:
    """Pairs of countries (A, B) among the `known`, up to `most` each, by whether A has as many tokens as B or not."""
    sizes = {i: len(tokenizer(f" {facts.capitals[i][0]}", add_special_tokens=False)["input_ids"]) for i in known}
    pairs = [(a, b) for a in known for b in known if a != b]
    random.Random(seed).shuffle(pairs)
    found: dict[str, list[tuple[int, int]]] = {"equal": [], "longer": [], "shorter": []}
    for a, b in pairs:
        kind = "equal" if sizes[a] == sizes[b] else "longer" if sizes[a] > sizes[b] else "shorter"
        if len(found[kind]) < most:
            found[kind].append((a, b))
    return found
