"""How a guard does on labelled messages: F1, false positives, recall of every category, hard negatives kind by kind."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.systems.llama_guard_int4.answers import answer_scores
from edgewright.systems.llama_guard_int4.model import GuardModel
from edgewright.systems.llama_guard_int4.policy import GuardPolicy
from edgewright.systems.llama_guard_int4.task import Example

RESAMPLES = 400


def score_guard(guard: GuardModel, examples: Sequence[Example]) -> dict[str, float]:
    """Figures of a guard on examples, each rate with its standard error under "<name>_se".

    f1 and false_positives (of safe messages) of the verdict; recall_<category>: share of the messages of a category
    whose verdict names it; false_positives_<kind>: of one kind of safe message; exact: share of verdicts with exactly
    the right categories; latency: median ms a verdict.
    """
    if not examples:
        raise UsageError("there are no examples to score")
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
        found = [code in verdict.categories for verdict, example in pairs if code in example.categories]
        figures |= _rate(f"recall_{code}", torch.tensor(found))
    for kind in sorted({example.kind for example in examples if not example.categories}):
        wrong = [not verdict.safe for verdict, example in pairs if example.kind == kind]
        figures |= _rate(f"false_positives_{kind.replace(' ', '_')}", torch.tensor(wrong))
    figures |= _rate("exact", torch.tensor([verdict.categories == example.categories for verdict, example in pairs]))
    figures["latency"] = 1e3 * statistics.median(seconds)
    return figures


def score_rows(
    model: nn.Module, rows: Mapping[str, Tensor], examples: Sequence[Example], policy: GuardPolicy, tokenizer: Any
) -> dict[str, float]:
    """Nll of the right answers among legal words, and F1 at a score of one half, from one forward pass a message.

    rows: `answer_rows` of the examples.
    """
    automaton = policy.automaton(tokenizer)
    kept = sorted({token for ids in automaton.answers for token in ids})
    nll, scores = answer_scores(model, rows, kept, sorted(automaton.unsafe), sorted(automaton.safe))
    unsafe = torch.tensor([bool(example.categories) for example in examples])
    return {"nll": float(nll.mean()), "nll_se": float(nll.std()) / len(nll) ** 0.5, "f1": f1(scores >= 0.5, unsafe)}


def f1(flagged: Tensor, unsafe: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) of bool [N]; 0 where nothing is flagged or unsafe."""
    hits = int((flagged & unsafe).sum())
    total = int(flagged.sum()) + int(unsafe.sum())
    return 2 * hits / total if total else 0.0


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
