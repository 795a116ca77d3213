"""A generative guard: policy in the prompt, a verdict from one forward pass, categories by constrained decoding.

Answers are "safe" or "unsafe" and, on the next line, the broken categories ("S1,S4"). The score
    p(unsafe) / (p(unsafe) + p(safe))
compares the first tokens of the two after the prompt, so it needs no generation; recalibrate a threshold after any
change of the model. Source: Llama Guard 3-1B-INT4, arXiv 2411.17713.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.io.foreign import load_tokenizer
from edgewright.io.models import load
from edgewright.io.transformers_names import cache_of, with_cache
from edgewright.pruning.cut_folder import is_cut, load_cut, save_checkpoint, save_cut
from edgewright.pruning.unembedding import PrunedHead
from edgewright.quantization.packed_inputs import attach_input_quantizers_
from edgewright.systems.llama_guard_int4.policy import GuardPolicy, Message
from edgewright.systems.llama_guard_int4.program import ProgramPredictor
from edgewright.systems.llama_guard_int4.settings import GuardSettings, read_settings, write_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Verdict:
    """safe, the score (probability of unsafe among the two), the broken categories, and messages left out to fit."""

    safe: bool
    score: float
    categories: tuple[str, ...] = ()
    dropped_messages: int = 0


class Predictor(Protocol):
    """A model that reads on: logits after the last token, one per entry of `columns`, or per token id if that is None.

    context: tokens that fit.
    """

    columns: Sequence[int] | None
    context: int

    def start(self, ids: Sequence[int]) -> Tensor:
        """Forget everything, read the ids."""

    def follow(self, ids: Sequence[int]) -> Tensor:
        """Read on."""


class ModelPredictor:
    """A transformers decoder with its cache, whole or with a cut head."""

    def __init__(self, model: Any) -> None:
        head = getattr(model, "lm_head", None)
        self.columns: Sequence[int] | None = None
        if isinstance(head, PrunedHead) and not head.expand:
            self.columns = head.kept_ids.tolist()
        self.model, self.context = model, int(model.config.max_position_embeddings)
        self._cache: Any = None

    def start(self, ids: Sequence[int]) -> Tensor:
        self._cache = None
        return self.follow(ids)

    @torch.no_grad()
    def follow(self, ids: Sequence[int]) -> Tensor:
        device = next(self.model.parameters()).device
        tokens = torch.tensor([list(ids)], device=device)
        output = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **with_cache(self._cache))
        self._cache = cache_of(output)
        return output.logits[0, -1].float().cpu()

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if excess := self._cache.get_seq_length() - length:
            self._cache.crop(-excess)


class GuardModel:
    """`moderate(messages)` with any predictor: a model in memory, a saved folder, or an exported file.

    threshold: scores from here on are unsafe. truncation: "refuse" a conversation longer than the context, or drop the
    "oldest" messages until it fits (their number is in the verdict); the last message is never cut.
    """

    def __init__(
        self,
        predictor: Predictor,
        tokenizer: PreTrainedTokenizerBase,
        policy: GuardPolicy,
        *,
        threshold: float = 0.5,
        truncation: Literal["refuse", "oldest"] = "refuse",
    ) -> None:
        if truncation not in ("refuse", "oldest"):
            raise UsageError(f"truncation={truncation!r}; choose 'refuse' or 'oldest'")
        if not 0 < threshold < 1:
            raise UsageError(f"threshold={threshold} is not between 0 and 1")
        self.predictor, self.tokenizer, self.policy = predictor, tokenizer, policy
        self.threshold, self.truncation = threshold, truncation
        self.automaton = policy.automaton(tokenizer)
        columns = predictor.columns
        self._place = None if columns is None else {token: place for place, token in enumerate(columns)}
        if self._place is not None:
            missing = {token for ids in self.automaton.answers for token in ids} - set(self._place)
            if missing:
                shown = ", ".join(repr(tokenizer.decode([token])) for token in sorted(missing)[:8])
                raise UsageError(f"the model's cut head cannot write {shown}, which answers of this policy need")
        self._longest = max(map(len, self.automaton.answers))

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any, policy: GuardPolicy, **settings: Any) -> GuardModel:
        """A guard around a model in memory."""
        model.eval()
        return cls(ModelPredictor(model), tokenizer, policy, **settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> GuardModel:
        """The guard that `save_guard` or `export_guard` wrote. Raises UsageError, FormatError."""
        stored = read_settings(folder)
        settings = {"threshold": stored.threshold, **settings}
        if stored.program is not None:
            predictor = ProgramPredictor(Path(folder) / stored.program)
            return cls(predictor, load_tokenizer(Path(folder)), stored.policy, **settings)
        model, tokenizer = load_cut(folder) if is_cut(folder) else load(folder)
        if stored.activation is not None:
            attach_input_quantizers_(model, stored.activation)
        return cls.from_model(model, tokenizer, stored.policy, **settings)

    def moderate(self, messages: Sequence[Message], *, categories: bool = True) -> Verdict:
        """The verdict on the last message of a conversation; categories=False stops after the one forward pass."""
        ids, dropped = self._fit(messages)
        logits = self.predictor.start(ids)
        score = self._score(logits)
        if score < self.threshold:
            return Verdict(True, score, (), dropped)
        return Verdict(False, score, self._categories(logits) if categories else (), dropped)

    def _score(self, logits: Tensor) -> float:
        """p(unsafe) / (p(unsafe) + p(safe)) over the first tokens of the answers."""
        unsafe, safe = (
            torch.logsumexp(self._logits_of(logits, sorted(first)), 0)
            for first in (self.automaton.unsafe, self.automaton.safe)
        )
        return float(torch.sigmoid(unsafe - safe))

    def _categories(self, logits: Tensor) -> tuple[str, ...]:
        """Greedy among the legal continuations of "unsafe"; tokens without alternative cost no forward pass."""
        state: tuple[int, ...] = ()
        pending: list[int] = []
        legal: tuple[int, ...] = tuple(sorted(self.automaton.unsafe))
        while legal:
            if len(legal) > 1:
                logits = self.predictor.follow(pending) if pending else logits
                pending = []
                choice = legal[int(self._logits_of(logits, legal).argmax())]
            else:
                choice = legal[0]
            state, pending = (*state, choice), [*pending, choice]
            legal = self.automaton.legal(state)
        return self.automaton.answers[state]

    def _logits_of(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        return logits[list(ids) if self._place is None else [self._place[token] for token in ids]]

    def _fit(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        room = self.predictor.context - self._longest
        dropped = 0
        while True:
            ids = self._tokens(self.policy.prompt(messages[dropped:]))
            if len(ids) <= room:
                return ids, dropped
            if self.truncation == "refuse" or dropped == len(messages) - 1:
                raise UsageError(
                    f"the conversation takes {len(ids)} tokens, {room} fit beside the answer; shorten it"
                    + ("" if self.truncation == "oldest" else ", or drop old messages with truncation='oldest'")
                )
            dropped += 1

    def _tokens(self, text: str) -> list[int]:
        """Control tokens written by a user are read as plain text."""
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids: list[int] = self.tokenizer(text, **options)["input_ids"]
        return ids


def save_guard(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path, settings: GuardSettings
) -> Path:
    """Write model, tokenizer and policy; a cut head, packed codes and quantised inputs come back as they were."""
    write = save_cut if isinstance(getattr(model, "lm_head", None), PrunedHead) else save_checkpoint
    write(model, tokenizer, folder)
    write_settings(settings, folder)
    return Path(folder)
