"""What a guard forbids, how it is asked, every answer that it may give, and what is kept beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.checks import check, one_of, optional, whole
from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.typed import from_json
from edgewright.pruning.unembedding import answer_ids, output_vocabulary
from edgewright.quantization.config import ActivationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
ROLES = {"user": "User", "assistant": "Agent"}
SETTINGS = "guard.json"
MOST_LISTED = 13  # categories whose combinations are all listed: 8191 answers


@dataclass(frozen=True)
class GuardPolicy:
    """What is forbidden and how the model is asked.

    Args:
        categories: code -> text; codes are single words without commas.
        task: the prompt's first line.
        question: its last, which the answer follows.
        most: categories named in one answer at most; all where None, which more than 13 categories do not allow.

    Raises:
        UsageError: no categories, a code that is no word, or a number of them outside these.
    """

    categories: Mapping[str, str]
    task: str = "Does the last message break this policy?"
    question: str = "Verdict:"
    most: int | None = None

    def __post_init__(self) -> None:
        if not self.categories or not all(self.categories):
            raise UsageError("a policy needs categories, such as GuardPolicy({'S1': 'card numbers'})")
        if any(set(code) & set(", \n") for code in self.categories):
            raise UsageError(f"category codes are single words without commas: {', '.join(self.categories)}")
        check("GuardPolicy most", self.most, optional(whole(1, len(self.categories))))
        if self.most is None:
            check("number of categories", len(self.categories), whole(1, MOST_LISTED), "name GuardPolicy(..., most=3)")

    def prompt(self, messages: Sequence[Message]) -> str:
        """Task, categories, conversation, question; the answer begins with the space that is missing at its end.

        Args:
            messages: dicts with "role" (user or assistant) and "content".

        Returns:
            The prompt.

        Raises:
            UsageError: another role, or no content.
        """
        if not messages or not any(message.get("content", "").strip() for message in messages):
            raise UsageError("there is nothing to moderate; pass messages such as [{'role': 'user', 'content': '...'}]")
        lines = [self.task, *(f"{code}: {text}" for code, text in self.categories.items())]
        for message in messages:
            check("role", message.get("role"), one_of(*ROLES))
            lines.append(f"{ROLES[message['role']]}: {message['content'].strip()}")
        return "\n".join([*lines, self.question])

    def answer(self, codes: Sequence[str] = ()) -> str:
        """The text of a verdict on the broken categories `codes`, none: safe. Raises UsageError for other codes."""
        for code in codes:
            check("category", code, one_of(*self.categories))
        ordered = [code for code in self.categories if code in codes]
        return " unsafe\n" + ",".join(ordered) if ordered else " safe"

    def answers(self) -> dict[str, tuple[str, ...]]:
        """Every legal answer -> its categories."""
        codes = tuple(self.categories)
        sizes = range((self.most or len(codes)) + 1)
        return {self.answer(chosen): chosen for chosen in chain.from_iterable(combinations(codes, n) for n in sizes)}

    def output_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The token ids that a legal answer can hold, ascending, end of text included, as `tokenizer` writes them."""
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


@dataclass(frozen=True)
class GuardSettings:
    """What is kept beside a guard's weights.

    Args:
        policy: what it was trained for.
        threshold: scores from here on are unsafe; choose it again after any change of the model.
        activation: how inputs of packed layers are quantised, None: not at all.
        program: name of an exported file in the folder, see `export_guard`.
    """

    policy: GuardPolicy
    threshold: float = 0.5
    activation: ActivationConfig | None = None
    program: str | None = None


def write_settings(settings: GuardSettings, folder: str | Path) -> None:
    """The policy as guard.json."""
    write_text(Path(folder) / SETTINGS, json.dumps(asdict(settings), indent=1, ensure_ascii=False) + "\n")


def read_settings(folder: str | Path) -> GuardSettings:
    """The policy beside a saved guard. Raises UsageError without one, FormatError for a broken one."""
    path = Path(folder) / SETTINGS
    try:
        data = read_object(path)
        activation = data["activation"]
        program = data["program"]
        if program is not None and Path(program).name != program:
            raise ValueError(f"the program {program!r} is not a file of this folder")
        return GuardSettings(
            from_json(GuardPolicy, data["policy"], path),
            float(data["threshold"]),
            None if activation is None else from_json(ActivationConfig, activation, path),
            program,
        )
    except UsageError as error:
        raise UsageError(f"{folder} holds no guard ({error}); save_guard writes one") from error
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} does not describe a guard: {error}") from error
