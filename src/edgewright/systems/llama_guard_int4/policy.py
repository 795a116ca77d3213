"""What a guard forbids, how it is asked, and every answer that it may give, as texts and as a tree of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import TYPE_CHECKING

from edgewright.errors import UsageError
from edgewright.pruning.unembedding import answer_ids, output_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
ROLES = {"user": "User", "assistant": "Agent"}
MOST_LISTED = 13  # categories whose combinations are all listed: 8191 answers


@dataclass(frozen=True)
class GuardPolicy:
    """What is forbidden, code -> text, and how the model is asked. most: categories named in one answer at most."""

    categories: Mapping[str, str]
    task: str = "Does the last message break this policy?"
    question: str = "Verdict:"
    most: int | None = None

    def __post_init__(self) -> None:
        if not self.categories or not all(self.categories):
            raise UsageError("a policy needs categories, such as GuardPolicy({'S1': 'card numbers'})")
        if any(set(code) & set(", \n") for code in self.categories):
            raise UsageError(f"category codes are single words without commas: {', '.join(self.categories)}")
        if self.most is not None and not 1 <= self.most <= len(self.categories):
            raise UsageError(f"most={self.most}: from 1 to {len(self.categories)} categories fit into an answer")
        if self.most is None and len(self.categories) > MOST_LISTED:
            raise UsageError(
                f"{len(self.categories)} categories have too many combinations to list; GuardPolicy(..., most=3)"
            )

    def prompt(self, messages: Sequence[Message]) -> str:
        """Task, categories, conversation, question; the answer begins with the space that is missing at its end."""
        if not messages or not any(message.get("content", "").strip() for message in messages):
            raise UsageError("there is nothing to moderate; pass messages such as [{'role': 'user', 'content': '...'}]")
        lines = [self.task, *(f"{code}: {text}" for code, text in self.categories.items())]
        for message in messages:
            if message.get("role") not in ROLES:
                raise UsageError(f"unknown role {message.get('role')!r}; roles are {', '.join(ROLES)}")
            lines.append(f"{ROLES[message['role']]}: {message['content'].strip()}")
        return "\n".join([*lines, self.question])

    def answer(self, codes: Sequence[str] = ()) -> str:
        """The text of a verdict; no codes: safe."""
        unknown = [code for code in codes if code not in self.categories]
        if unknown:
            raise UsageError(f"unknown category {unknown[0]!r}; the policy has {', '.join(self.categories)}")
        ordered = [code for code in self.categories if code in codes]
        return " unsafe\n" + ",".join(ordered) if ordered else " safe"

    def answers(self) -> dict[str, tuple[str, ...]]:
        """Every legal answer -> its categories."""
        codes = tuple(self.categories)
        sizes = range((self.most or len(codes)) + 1)
        return {self.answer(chosen): chosen for chosen in chain.from_iterable(combinations(codes, n) for n in sizes)}

    def output_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The token ids that a legal answer can hold, end of text included."""
        return output_vocabulary(tokenizer, [self._example()], self.answers())

    def automaton(self, tokenizer: PreTrainedTokenizerBase) -> AnswerAutomaton:
        """The legal answers as a tree of tokens, for constrained decoding."""
        answers = self.answers()
        ids = answer_ids(tokenizer, self._example(), list(answers), end=tokenizer.eos_token_id)[1]
        return AnswerAutomaton(dict(zip(map(tuple, ids), answers.values(), strict=True)))

    def _example(self) -> str:
        return self.prompt([{"role": "user", "content": "Hello."}])


class AnswerAutomaton:
    """Legal answers as a tree: a state is the tuple of tokens written so far."""

    def __init__(self, answers: Mapping[tuple[int, ...], tuple[str, ...]]) -> None:
        self.answers = dict(answers)
        tree: dict[tuple[int, ...], set[int]] = {}
        for ids in self.answers:
            for length in range(len(ids)):
                tree.setdefault(ids[:length], set()).add(ids[length])
        self._tree = {state: tuple(sorted(ids)) for state, ids in tree.items()}
        self.safe = {ids[0] for ids, codes in self.answers.items() if not codes}
        self.unsafe = {ids[0] for ids, codes in self.answers.items() if codes}
        if self.safe & self.unsafe:
            raise UsageError("safe and unsafe answers begin with the same token, so one forward pass cannot tell them")

    def legal(self, state: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens that may follow; empty after the end."""
        return self._tree.get(state, ())
