"""A generative guard: policy in the prompt, a verdict from one forward pass, categories by constrained decoding.

Answers are "safe" or "unsafe" and, on the next line, the broken categories ("S1,S4"). The score
    p(unsafe) / (p(unsafe) + p(safe))
compares the first tokens of the two after the prompt, so it needs no generation; recalibrate a threshold after any
change of the model. Source: Llama Guard 3-1B-INT4, arXiv 2411.17713.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from edgewright.checks import check, number, one_of
from edgewright.errors import UsageError
from edgewright.export.executorch.exporter import export_executorch
from edgewright.io.foreign import load_tokenizer
from edgewright.io.models import load
from edgewright.io.transformers_names import cache_of, with_cache
from edgewright.pruning.cut_folder import is_cut, load_cut, save_checkpoint, save_cut
from edgewright.pruning.unembedding import PrunedHead
from edgewright.quantization.packed_inputs import attach_input_quantizers_
from edgewright.runtime.executorch import ExecuTorchEngine
from edgewright.systems.llama_guard_int4.policy import (
    GuardPolicy,
    GuardSettings,
    Message,
    read_settings,
    write_settings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROGRAM = "guard.pte"
# control tokens written by a user are read as plain text
PLAIN: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}


@dataclass(frozen=True)
class Verdict:
    """What the guard says of a conversation.

    Args:
        safe: whether the score is below the threshold.
        score: probability of "unsafe" among the two answers.
        categories: that the conversation breaks, by their codes.
        dropped_messages: oldest messages that were left out to fit the context.
    """

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


class ProgramPredictor:
    """Reads on in a .pte file whose cache is inside; what the file says about its outputs and context holds."""

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.engine = ExecuTorchEngine(path, threads=threads)
        self.columns: Sequence[int] | None = self.engine.kept_ids
        self.context = self.engine.context
        self._ids: list[int] = []

    def start(self, ids: Sequence[int]) -> Tensor:
        self._ids = []
        return self._read(ids, reuse=False)

    def follow(self, ids: Sequence[int]) -> Tensor:
        return self._read(ids, reuse=True)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._ids = self._ids[:length]

    def _read(self, ids: Sequence[int], reuse: bool) -> Tensor:
        if not ids or len(self._ids) + len(ids) > self.context:
            raise UsageError(f"{len(ids)} tokens after {len(self._ids)} do not fit into a context of {self.context}")
        self._ids = [*self._ids, *ids]
        return torch.from_numpy(self.engine.next_logits(self._ids, reuse=reuse))


class GuardModel:
    """`moderate(messages)` with any predictor: a model in memory, a saved folder, or an exported file.

    Args:
        predictor: the model.
        tokenizer: its own.
        policy: what is forbidden.
        threshold: scores from here on are unsafe.
        truncation: "refuse" a conversation longer than the context, or drop the "oldest" messages until it fits (their
            number is in the verdict); the last message is never cut.

    Raises:
        UsageError: an option outside these, or a cut head that cannot write the policy's answers.
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
        check("truncation", truncation, one_of("refuse", "oldest"))
        check("threshold", threshold, number(above=0, below=1))
        self.predictor, self.tokenizer, self.policy = predictor, tokenizer, policy
        self.threshold, self.truncation = threshold, truncation
        self.automaton = policy.automaton(tokenizer)
        columns = predictor.columns
        self._place = None if columns is None else {token: place for place, token in enumerate(columns)}
        needed = {token for ids in self.automaton.answers for token in ids}
        if self._place is not None and (missing := sorted(needed - set(self._place))):
            shown = ", ".join(repr(tokenizer.decode([token])) for token in missing[:8])
            raise UsageError(f"the model's cut head cannot write {shown}, which answers of this policy need")
        self._longest = max(map(len, self.automaton.answers))

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any, policy: GuardPolicy, **settings: Any) -> GuardModel:
        """A guard around a model in memory, with a whole or a cut head.

        Args:
            model: put into evaluation mode.
            tokenizer: its tokenizer.
            policy: categories and prompt.
            settings: threshold and truncation.
        """
        model.eval()
        return cls(ModelPredictor(model), tokenizer, policy, **settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> GuardModel:
        """The guard that `save_guard` or `export_guard` wrote.

        Args:
            folder: with guard.json and the model or the exported file.
            settings: threshold, in place of the stored one, and truncation.

        Raises:
            UsageError: the folder holds no guard.
            FormatError: what it holds is broken.
        """
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
        """The verdict on the last message of a conversation.

        Args:
            messages: dicts with "role" (user or assistant) and "content".
            categories: name what an unsafe message breaks; without them one forward pass is enough.

        Raises:
            UsageError: no content, another role, or a conversation that does not fit.
        """
        ids, dropped = self._fit(messages)
        logits = self.predictor.start(ids)
        firsts = (sorted(self.automaton.unsafe), sorted(self.automaton.safe))
        unsafe, safe = (torch.logsumexp(self._logits_of(logits, first), 0) for first in firsts)
        score = float(torch.sigmoid(unsafe - safe))
        if score < self.threshold:
            return Verdict(True, score, (), dropped)
        return Verdict(False, score, self._categories(logits) if categories else (), dropped)

    def _categories(self, logits: Tensor) -> tuple[str, ...]:
        """Greedy among the legal continuations of "unsafe"; tokens without alternative cost no forward pass."""
        state: tuple[int, ...] = ()
        pending: list[int] = []
        legal: tuple[int, ...] = tuple(sorted(self.automaton.unsafe))
        while legal:
            choice = legal[0]
            if len(legal) > 1:
                logits, pending = self.predictor.follow(pending) if pending else logits, []
                choice = legal[int(self._logits_of(logits, legal).argmax())]
            state, pending = (*state, choice), [*pending, choice]
            legal = self.automaton.legal(state)
        return self.automaton.answers[state]

    def _logits_of(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        return logits[list(ids) if self._place is None else [self._place[token] for token in ids]]

    def _fit(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        room, dropped = self.predictor.context - self._longest, 0
        while True:
            ids = self.tokenizer(self.policy.prompt(messages[dropped:]), **PLAIN)["input_ids"]
            if len(ids) <= room:
                return ids, dropped
            if self.truncation == "refuse" or dropped == len(messages) - 1:
                raise UsageError(
                    f"the conversation takes {len(ids)} tokens, {room} fit beside the answer; shorten it"
                    + ("" if self.truncation == "oldest" else ", or drop old messages with truncation='oldest'")
                )
            dropped += 1


def save_guard(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path, settings: GuardSettings
) -> Path:
    """Write model, tokenizer and policy; a cut head, packed codes and quantised inputs come back as they were.

    Args:
        model: whole, or with a cut head.
        tokenizer: its own.
        folder: new or empty.
        settings: what `GuardModel.from_pretrained` reads.

    Returns:
        The folder.
    """
    write = save_cut if isinstance(getattr(model, "lm_head", None), PrunedHead) else save_checkpoint
    write(model, tokenizer, folder)
    write_settings(settings, folder)
    return Path(folder)


def export_guard(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    settings: GuardSettings,
    *,
    context: int = 256,
) -> Path:
    """Write a guard as one program with its cache, whose outputs are the logits of the legal words alone.

    Args:
        model: with a cut head, converted.
        tokenizer: its own.
        folder: gets guard.pte, tokenizer and policy, for `GuardModel.from_pretrained`.
        settings: policy and threshold.
        context: tokens of policy, conversation and answer.

    Returns:
        The path of guard.pte.

    Raises:
        UsageError: a whole head; and what `export_executorch` raises.
    """
    head: Any = getattr(model, "lm_head", None)
    if not isinstance(head, PrunedHead) or head.expand:
        raise UsageError("export_guard takes a model after prune_unembedding_(model, ids), not expanded")
    path = Path(folder) / PROGRAM
    export_executorch(model, tokenizer, path, context=context)
    tokenizer.save_pretrained(folder)
    write_settings(replace(settings, program=PROGRAM), folder)
    return path
