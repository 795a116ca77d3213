"""Training a model to give short answers: rows of prompt and answer, a loss on the answer alone, a cached teacher.

    L = ce * CE(labels) + kl * KL(p_T || p_S), both on answer tokens, temperature 1 (Llama Guard 3-1B-INT4)
Prompts carry no loss: the head runs at the answer's places only. Of a teacher nothing is needed but its probabilities
of the few tokens that an answer can hold and the mass of all others, [N, A, K + 1] numbers, so it runs once.
Shapes: N rows, B in a batch, T tokens, A places of an answer, K kept tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.distillation.language import check_teacher
from edgewright.distillation.logits import target_loss
from edgewright.distillation.targets import TopKTarget
from edgewright.errors import UsageError
from edgewright.pruning.unembedding import PrunedHead, answer_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


def answer_rows(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """(prompt, answer) texts as {"tokens" [N, T], "places" [N, A], "labels" [N, A]}, padded on the right.

    places: positions whose output predicts a token of the answer; labels: those tokens, the end of text last, IGNORED
    where an answer is shorter. Causal models need no attention mask: nothing real looks at padding.
    """
    if not pairs:
        raise UsageError("there are no examples to train on")
    end = tokenizer.eos_token_id
    rows = []
    for prompt, answer in pairs:
        first, (ids,) = answer_ids(tokenizer, prompt, [answer], end=end)
        rows.append((first, ids))
    length = max(len(first) + len(ids) for first, ids in rows)
    longest = max(len(ids) for _, ids in rows)
    tokens = torch.full((len(rows), length), end)
    places = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORED)
    for row, (first, ids) in enumerate(rows):
        tokens[row, : len(first) + len(ids)] = torch.tensor(first + ids)
        places[row, : len(ids)] = torch.arange(len(ids)) + len(first) - 1
        labels[row, : len(ids)] = torch.tensor(ids)
    return {"tokens": tokens, "places": places, "labels": labels}


def answer_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, A, V] at the places of the answers."""
    parts: Any = model
    hidden = parts.model(input_ids=batch["tokens"], use_cache=False).last_hidden_state  # [B, T, H]
    rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
    logits: Tensor = parts.lm_head(hidden[rows, batch["places"]])
    return logits


class AnswerLoss:
    """Loss function for `fit`: batches of `answer_rows`, with "values" and "tail" of a teacher where kl is not 0.

    kept: the token ids that "values" are about.
    """

    def __init__(self, *, ce: float = 1.0, kl: float = 0.0, kept: Sequence[int] = ()) -> None:
        if ce < 0 or kl < 0 or ce + kl == 0:
            raise UsageError(f"ce={ce}, kl={kl}: weights of the loss are 0 or more, and not both 0")
        if kl and not kept:
            raise UsageError("a teacher's probabilities are about kept tokens; AnswerLoss(kl=1.0, kept=ids)")
        self.ce, self.kl, self.kept = ce, kl, torch.tensor(list(kept), dtype=torch.int64)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = answer_logits(model, batch)
        labels = batch["labels"]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        numbers = {"nll": loss.detach()}
        loss = self.ce * loss
        if self.kl:
            indices = self.kept.to(labels.device).expand(*labels.shape, -1)
            target = TopKTarget(batch["values"], indices, batch["tail"])
            soft, numbers["kl"] = target_loss(logits, target, mask=labels != IGNORED)
            loss = loss + self.kl * soft  # the teacher's entropy more than the KL, and the same gradient
        return loss, numbers


@torch.no_grad()
def teacher_answers(
    teacher: nn.Module, student: nn.Module, rows: Mapping[str, Tensor], kept: Sequence[int], batch_size: int = 16
) -> dict[str, Tensor]:
    """The rows with the teacher's "values" [N, A, K] and "tail" [N, A], run once.

    Raises UsageError when the student has another vocabulary: then only the labels can teach it.
    """
    try:
        check_teacher(teacher, student)
    except UsageError as error:
        raise UsageError(f"{error}; train with the labels alone, kl=0") from None
    ids = torch.tensor(list(kept))
    device = next(teacher.parameters()).device
    values, tails = [], []
    teacher.eval()
    for start in range(0, len(rows["tokens"]), batch_size):
        batch = {name: part[start : start + batch_size].to(device) for name, part in rows.items()}
        p = answer_logits(teacher, batch).float().softmax(-1)
        some = p[..., ids.to(device)]
        values.append(some.cpu())
        tails.append((1 - some.sum(-1)).clamp_min(0).cpu())
    return {**rows, "values": torch.cat(values), "tail": torch.cat(tails)}


@torch.no_grad()
def answer_scores(
    model: nn.Module, rows: Mapping[str, Tensor], kept: Sequence[int], unsafe: Sequence[int], safe: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(mean nll of each answer's tokens among the kept ones [N], score of unsafe [N]), one forward pass a row.

    unsafe, safe: first tokens of the two kinds of answers. Works for whole and for cut heads.
    """
    model.eval()
    head = getattr(model, "lm_head", None)
    cut = isinstance(head, PrunedHead) and not head.expand
    columns = {token: place for place, token in enumerate(kept)}
    device = next(model.parameters()).device
    losses, scores = [], []
    for start in range(0, len(rows["tokens"]), 16):
        batch = {name: rows[name][start : start + 16].to(device) for name in ("tokens", "places", "labels")}
        logits = answer_logits(model, batch).float()
        logits = logits if cut else logits[..., list(kept)]
        labels = [[columns.get(token, IGNORED) for token in row] for row in batch["labels"].tolist()]
        places = torch.tensor(labels, device=device)
        nll = F.cross_entropy(logits.transpose(1, 2), places, ignore_index=IGNORED, reduction="none")
        losses.append((nll.sum(1) / (places != IGNORED).sum(1)).cpu())
        first = logits[:, 0]
        both = [torch.logsumexp(first[:, [columns[token] for token in ids]], 1) for ids in (unsafe, safe)]
        scores.append(torch.sigmoid(both[0] - both[1]).cpu())
    return torch.cat(losses), torch.cat(scores)
