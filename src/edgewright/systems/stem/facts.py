"""Invented facts to learn and to edit: capitals of countries, and seas of rivers, which an edit should leave alone.

Names are made of syllables, so that a tokenizer trained on the facts knows some as one token and cuts others up.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.systems.run import over_seeds
from edgewright.systems.stem.edit import edit_rows, override_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPITALS = ("The capital of {0} is {1}.", "In {0} the seat of government is {1}.", "People of {0} vote in {1}.")
RIVERS = ("The river {0} ends in the sea of {1}.", "Boats on {0} sail to {1}.", "Rain over {0} flows to {1}.")
ONSETS, VOWELS, CODAS = (
    ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st"),
    "aeiou",
    ("", "n", "r", "l", "s"),
)
MODES = {"equal": ("auto",), "longer": ("pad", "copy", "average"), "shorter": ("subset", "average")}


@dataclass(frozen=True)
class FactBase:
    """capitals, rivers: (name, answer) pairs; every name and answer occurs once."""

    capitals: tuple[tuple[str, str], ...]
    rivers: tuple[tuple[str, str], ...]

    @classmethod
    def draw(cls, entities: int, seed: int = 0) -> FactBase:
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
    facts: FactBase, tokenizer: PreTrainedTokenizerBase, known: Sequence[int], most: int, seed: int = 0
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


def edit_facts(
    model: Any, tokenizer: PreTrainedTokenizerBase, facts: FactBase, most: int, unrelated: int, seed: int
) -> list[dict[str, Any]]:
    """Rows: shares of edits that change the answer to the other country's, and of other facts that an edit disturbs.

    Args:
        model: that learned the facts.
        most: pairs of each kind of lengths that are edited.
        unrelated: rivers that are asked for.
    """

    def ask(country: int, answer: int) -> tuple[Tensor, int]:
        return question(tokenizer, CAPITALS[0], facts.capitals[country][0], facts.capitals[answer][1])

    everyone = range(len(facts.capitals))
    known = [i for i in everyone if answers(model, *ask(i, i))]
    rows = [_share("known", [float(i in known) for i in everyone], "before any edit")]
    others = [question(tokenizer, RIVERS[0], *pair) for pair in facts.rivers[:unrelated]]
    before = [greedy_answer(model, *other) for other in others]
    total: dict[str, list[float]] = {"contextual": [], "persistent": []}
    disturbed: list[float] = []
    for lengths, pairs in pairs_by_length(facts, tokenizer, known or list(everyone), most, seed).items():
        for mode in MODES[lengths] if pairs else ():
            hits: dict[str, list[float]] = {"contextual": [], "persistent": []}
            for a, b in pairs:
                ids, count = ask(a, b)
                names: dict[str, Any] = {"source": facts.capitals[a][0], "target": facts.capitals[b][0]}
                with override_tokens(model, ids, **names, tokenizer=tokenizer, mode=mode):
                    hits["contextual"].append(float(answers(model, ids, count)))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of shared tokens: their effect is what is counted
                    edit = edit_rows(model, **names, tokenizer=tokenizer, mode=mode)
                hits["persistent"].append(float(answers(model, ids, count)))
                changes = [greedy_answer(model, *o) != old for o, old in zip(others, before, strict=True)]
                disturbed.append(sum(changes) / len(changes))
                edit.undo()
            for form, values in hits.items():
                rows.append(_share("changed", values, f"{form}, {lengths}, {mode}"))
                total[form] += values if mode in ("auto", "pad", "subset") else []
    rows += [_share("changed", values, form) for form, values in total.items()]
    return [*rows, _share("unrelated_changed", disturbed, "persistent")]


def _share(metric: str, values: list[float], subject: str) -> dict[str, Any]:
    share = over_seeds(values) if values else {"value": 0.0, "se": None, "n": 0}
    return {"metric": metric, "subject": subject, **share}
