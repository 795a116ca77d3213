"""The objective of pre-training as a module: tokens in, mean cross-entropy of each next token out.

A module, not a function, so that data-parallel wrappers see one forward call that uses every weight. The logits of a
whole batch never exist: the head and its gradient run in chunks of tokens, as in distillation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.distillation.logits import chunked_distillation_loss
from edgewright.errors import UsageError
from edgewright.io.transformers_names import with_cache

CHUNK_LOGITS = 2**23  # float32 logits that exist at a time: 32 MB


class LabelTarget:
    """One right token each [tokens] int64: the target of `distillation.logits` that gives plain cross-entropy."""

    def __init__(self, labels: Tensor) -> None:
        self.labels, self.tokens = labels, len(labels)

    def cross_entropy_(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """(cross-entropy, entropy of the target = 0) [n]; the float32 logits become the gradient."""
        labels = self.labels[part].unsqueeze(-1)
        right = logits.gather(-1, labels)
        norm = torch.logsumexp(logits, -1, keepdim=True)
        logits.sub_(norm).exp_().scatter_add_(-1, labels, torch.full_like(right, -1.0))
        loss = (norm - right).squeeze(-1)
        return loss, torch.zeros_like(loss)


class NextToken(nn.Module):
    """A decoder with its loss. `decoder` has `.model` (tokens -> hidden states) and `.lm_head`."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        vocabulary = int(decoder.config.vocab_size)  # type: ignore[union-attr,arg-type]
        self.chunk = max(64, CHUNK_LOGITS // vocabulary)

    def forward(self, tokens: Tensor, what: str = "loss", cache: Any = None) -> Tensor:
        """tokens: int64 [B, T].

        what: "loss", the mean over B * (T - 1) predictions, a scalar; "rows", the mean of each row [B], without
        gradients; "next", the logits behind the last token [B, vocabulary], keys and values going into `cache`.
        """
        decoder: Any = self.decoder
        base, head = decoder.model, decoder.lm_head
        if what == "next":
            hidden = base(input_ids=tokens, use_cache=cache is not None, **with_cache(cache)).last_hidden_state
            return head(hidden[:, -1]).float()
        hidden = base(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        labels = tokens[:, 1:].reshape(-1)
        if what == "loss":
            return chunked_distillation_loss(hidden, head, LabelTarget(labels), chunk=self.chunk)[0]
        if what != "rows":
            raise UsageError(f"what={what!r}; choose loss, rows or next")
        flat = hidden.reshape(len(labels), -1)
        parts = [slice(start, start + self.chunk) for start in range(0, len(labels), self.chunk)]
        losses = [F.cross_entropy(head(flat[p]).float(), labels[p], reduction="none") for p in parts]
        return torch.cat(losses).view(len(tokens), -1).mean(-1)
