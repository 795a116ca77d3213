"""Unembedding pruning: a model whose answers come from a short list needs only the output rows of those tokens.

Source: Llama Guard 3-1B-INT4 (arXiv 2411.17713): 20 of 128256 rows stay. Logits of the kept tokens do not change, so a
greedy answer is the same whenever the full model's choice is a kept token; probabilities are renormalised over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.io.packed import PackedLinear, PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 8  # pieces listed in an error


class PrunedHead(nn.Module):
    """An output layer with the rows of a few tokens. Input [..., d], output [..., n kept], or [..., vocabulary].

    rows: the linear layer of the kept rows, float or packed. kept_ids: their token ids, ascending. expand: scatter the
    logits back into the whole vocabulary, `fill` (our choice: -inf) everywhere else.
    """

    kept_ids: Tensor

    def __init__(
        self, rows: nn.Module, kept_ids: Tensor, vocabulary: int, *, fill: float = -math.inf, expand: bool = False
    ) -> None:
        super().__init__()
        self.rows, self.vocabulary, self.fill, self.expand = rows, vocabulary, fill, expand
        self.register_buffer("kept_ids", kept_ids)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.rows(hidden)
        return self.expanded(logits) if self.expand else logits

    def expanded(self, logits: Tensor) -> Tensor:
        """[..., n kept] -> [..., vocabulary]."""
        return logits.new_full((*logits.shape[:-1], self.vocabulary), self.fill).index_copy(-1, self.kept_ids, logits)

    def extra_repr(self) -> str:
        return f"{len(self.kept_ids)} of {self.vocabulary} tokens, expand={self.expand}"


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str], *, end: int | None = None
) -> tuple[list[int], list[list[int]]]:
    """(ids of the prompt, ids of each answer after it with `end` appended), prompt and answer tokenised together.

    Special tokens written in the texts are read as plain text. Raises UsageError where the last piece of the prompt
    and the first of an answer melt into one token: then no position separates the two.
    """
    first, *rest = _ids(tokenizer, [prompt, *(prompt + answer for answer in answers)])
    found = []
    for answer, ids in zip(answers, rest, strict=True):
        if ids[: len(first)] != first or len(ids) == len(first):
            pieces = [tokenizer.decode([i]) for i in ids[len(first) - 1 : len(first) + 2]]
            raise UsageError(
                f"the answer {answer!r} melts into the end of its prompt {prompt[-20:]!r} (pieces {pieces}); "
                "let the prompt end without white space and the answer begin with it, or the other way round"
            )
        found.append(ids[len(first) :] + ([] if end is None else [end]))
    return first, found


def output_vocabulary(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Iterable[str], *, end: int | None = None
) -> tuple[int, ...]:
    """Ids of all tokens that can occur in a legal answer, as really tokenised after the prompts; ascending.

    end: the token that closes an answer, by default the tokenizer's own. Raises UsageError without answers or prompts,
    and where an answer is tokenised in another way after one prompt than after another: the list then depends on the
    prompts at hand, and pieces outside it would never be written.
    """
    answers = list(answers)
    if not answers or not all(answers):
        raise UsageError("there is no answer to keep words for (or an empty one); pass all legal answers as texts")
    if not prompts:
        raise UsageError("answers are tokenised after their prompt; pass at least one prompt")
    end = tokenizer.eos_token_id if end is None else end
    pieces = [answer_ids(tokenizer, prompt, answers, end=end)[1] for prompt in prompts]
    kept = {token for answer in pieces[0] for token in answer}
    escaping = {token for answers_ in pieces[1:] for answer in answers_ for token in answer} - kept
    if escaping:
        shown = ", ".join(repr(tokenizer.decode([token])) for token in sorted(escaping)[:SHOWN])
        raise UsageError(
            f"the tokens of the answers depend on the prompt: {len(escaping)} pieces escape the list that the first "
            f"prompt gives: {shown}; end every prompt with the same words"
        )
    return tuple(sorted(kept))


@torch.no_grad()
def prune_unembedding_(model: nn.Module, kept_ids: Sequence[int], *, expand: bool = False) -> list[str]:
    """Replace the model's output layer, in place, by the rows of `kept_ids`; returns notes on what was done besides.

    A head tied to the embedding is untied first: the embedding keeps all rows. The configuration keeps its vocabulary,
    which is that of the input. Float and packed heads are cut; convert_ a fake-quantised one first, and train before
    the cut: -inf in an expanded output makes label-smoothed losses NaN. Raises UsageError, Unsupported.
    """
    head: Any = getattr(model, "lm_head", None)
    kept = sorted(set(int(token) for token in kept_ids))
    if isinstance(head, PrunedHead):
        raise UsageError(f"the head is cut already, to {len(head.kept_ids)} tokens")
    if type(head) not in (nn.Linear, PackedLinear):
        raise Unsupported(
            f"the output layer is a {type(head).__name__}; a plain or packed .lm_head can be cut, so call convert_ "
            "before prune_unembedding_"
        )
    if not kept or kept[0] < 0 or kept[-1] >= head.out_features:
        raise UsageError(f"kept_ids must be token ids from 0 to {head.out_features - 1}, at least one; got {kept[:5]}")
    notes = []
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        notes.append("the output head was tied to the embedding: untied for the cut, the embedding keeps all its rows")
    ids = torch.tensor(kept)
    rows = kept_rows(head, ids)
    model.lm_head = PrunedHead(rows, ids.to(_device(head)), head.out_features, expand=expand)
    return notes


def kept_rows(head: nn.Linear | PackedLinear, ids: Tensor) -> nn.Module:
    """A layer of the same kind with some of the rows, the same bits in each."""
    ids = ids.to(_device(head))
    bias = None if head.bias is None else head.bias.detach()[ids]
    if isinstance(head, PackedLinear):
        return PackedLinear(PackedTensor(head.codes[ids], head.step[ids], head.grid), bias, head.input_quantizer)
    rows: Any = nn.Linear(head.in_features, len(ids), bias is not None, device="meta")
    rows.weight = nn.Parameter(head.weight.detach()[ids].clone())
    rows.bias = None if bias is None else nn.Parameter(bias.clone())
    return rows.train(head.training)  # type: ignore[no-any-return]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _device(head: nn.Linear | PackedLinear) -> torch.device:
    return head.codes.device if isinstance(head, PackedLinear) else head.weight.device
