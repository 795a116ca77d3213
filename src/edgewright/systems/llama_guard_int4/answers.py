"""Short answers, trained and scored: rows of prompt and answer, a loss on the answer, a cached teacher, F1 and recall.

    L = ce * CE(labels) + kl * KL(p_T || p_S), both on answer tokens, temperature 1 (Llama Guard 3-1B-INT4)
Prompts carry no loss: the head runs at the answer's places only. Of a teacher nothing is needed but its probabilities
of the few tokens that an answer can hold and the mass of all others, [N, A, K + 1] numbers, so it runs once.
Shapes: N rows, B in a batch, T tokens, A places of an answer, K kept tokens, H hidden width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, number, whole
from edgewright.distillation.language import check_teacher
from edgewright.distillation.logits import target_loss
from edgewright.distillation.targets import TopKTarget
from edgewright.errors import UsageError
from edgewright.pruning.unembedding import PrunedHead, answer_ids
from edgewright.systems.llama_guard_int4.model import GuardModel
from edgewright.systems.llama_guard_int4.policy import GuardPolicy
from edgewright.systems.llama_guard_int4.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
RESAMPLES = 400


def answer_rows(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """(prompt, answer) texts as {"tokens" [N, T], "places" [N, A], "labels" [N, A]}, padded on the right.

    places: positions whose output predicts a token of the answer; labels: those tokens, the end of text last, IGNORED
    where an answer is shorter. Causal models need no attention mask: nothing real looks at padding.
    """
    check("number of examples", len(pairs), whole(1))
    end = tokenizer.eos_token_id
    tokenised = (answer_ids(tokenizer, prompt, [answer], end=end) for prompt, answer in pairs)
    rows = [(first, ids) for first, (ids,) in tokenised]
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
    """Loss function for `fit`: ce * CE(labels) + kl * KL(teacher || student) on answer tokens (arXiv 2411.17713).

    Batches are those of `answer_rows`, with "values" and "tail" of `teacher_answers` where kl is not 0.

    Args:
        ce: weight of the labels, 1 as published.
        kl: weight of the teacher; 0 needs none.
        kept: the token ids that "values" are about.

    Raises:
        UsageError: negative weights or none at all, or a teacher without kept tokens.
    """

    def __init__(self, *, ce: float = 1.0, kl: float = 0.0, kept: Sequence[int] = ()) -> None:
        check("kl", kl, number(0))
        check("ce", ce, number(0) if kl else number(above=0))
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
    """Scores of right answers from one forward pass a row.

    Args:
        model: with a whole or a cut head.
        rows: of `answer_rows`.
        kept: token ids that an answer can hold, in the order of a cut head.
        unsafe: first tokens of unsafe answers.
        safe: first tokens of safe answers.

    Returns:
        (mean nll of each answer's tokens among the kept ones, score of unsafe), float32 [N] each.
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


def score_guard(guard: GuardModel, examples: Sequence[Example]) -> dict[str, float]:
    """Figures of a guard on labelled messages.

    Args:
        guard: what is scored.
        examples: one or more.

    Returns:
        Each rate with its standard error under "<name>_se": f1 and false_positives (of safe messages) of the verdict;
        recall_<category>: share of the messages of a category whose verdict names it; false_positives_<kind>: of one
        kind of safe message; exact: share of verdicts with exactly the right categories; latency: median ms a verdict.

    Raises:
        UsageError: no examples.
    """
    check("number of examples", len(examples), whole(1))
    verdicts, seconds = [], []
    for example in examples:
        began = time.perf_counter()
        verdicts.append(guard.moderate(example.messages))
        seconds.append(time.perf_counter() - began)
    flagged = torch.tensor([not verdict.safe for verdict in verdicts])
    unsafe = torch.tensor([bool(example.categories) for example in examples])
    figures = {"f1": f1(flagged, unsafe), "f1_se": f1_error(flagged, unsafe)}
    figures |= _rate("false_positives", flagged[~unsafe])
    pairs = list(zip(verdicts, examples, strict=True))
    for code in guard.policy.categories:
        named = [code in verdict.categories for verdict, example in pairs if code in example.categories]
        figures |= _rate(f"recall_{code}", torch.tensor(named))
    for kind in sorted({example.kind for example in examples if not example.categories}):
        wrong = [not verdict.safe for verdict, example in pairs if example.kind == kind]
        figures |= _rate(f"false_positives_{kind.replace(' ', '_')}", torch.tensor(wrong))
    figures |= _rate("exact", torch.tensor([verdict.categories == example.categories for verdict, example in pairs]))
    figures["latency"] = 1e3 * statistics.median(seconds)
    return figures


def score_rows(
    model: nn.Module, rows: Mapping[str, Tensor], examples: Sequence[Example], policy: GuardPolicy, tokenizer: Any
) -> dict[str, float]:
    """Nll of the right answers among legal words, and F1 at a score of one half; rows: of the examples."""
    automaton = policy.automaton(tokenizer)
    kept = sorted({token for ids in automaton.answers for token in ids})
    nll, scores = answer_scores(model, rows, kept, sorted(automaton.unsafe), sorted(automaton.safe))
    unsafe = torch.tensor([bool(example.categories) for example in examples])
    return {"nll": float(nll.mean()), "nll_se": float(nll.std()) / len(nll) ** 0.5, "f1": f1(scores >= 0.5, unsafe)}


def f1(flagged: Tensor, unsafe: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) of bool [N]; 0 where nothing is flagged or unsafe."""
    total = int(flagged.sum()) + int(unsafe.sum())
    return 2 * int((flagged & unsafe).sum()) / total if total else 0.0


def f1_error(flagged: Tensor, unsafe: Tensor, seed: int = 0) -> float:
    """Standard error of F1 by the bootstrap over examples."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(flagged), (RESAMPLES, len(flagged)), generator=generator)
    return statistics.pstdev(f1(flagged[row], unsafe[row]) for row in rows)


def _rate(name: str, hits: Tensor) -> dict[str, float]:
    """Share of true entries with its binomial error; nothing where there was no case."""
    if not len(hits):
        return {}
    share = float(hits.double().mean())
    return {name: share, f"{name}_se": (share * (1 - share) / len(hits)) ** 0.5}
