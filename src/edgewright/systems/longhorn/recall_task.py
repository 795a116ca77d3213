"""Multi-query associative recall: pairs to remember, then their keys again, each asking for its value.

    k1 v1 k2 v2 ... kP vP   0 0 k2 0 kP 0 0 0 k1 ...          (arXiv 2312.04927; the vocabulary's token 0 is filler)

Only what follows a repeated key is to be predicted, so accuracy is what a layer can hold and find again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgewright.errors import UsageError

IGNORED = -100


@dataclass(frozen=True)
class RecallTask:
    """`pairs` in rows of `length` tokens. Keys are of the first half of the vocabulary (without 0), values of the
    second.

    density None: each key is asked for once, fillers stand at random places between. A number: each place behind the
    pairs asks for any of the keys with this probability, which gives more to learn from a row.
    """

    pairs: int = 8
    length: int = 64
    vocabulary: int = 64
    density: float | None = None

    def __post_init__(self) -> None:
        keys, least = self.vocabulary // 2 - 1, 3 * self.pairs + 1
        if not 1 <= self.pairs <= keys:
            raise UsageError(f"pairs={self.pairs}: a vocabulary of {self.vocabulary} has 1 to {keys} distinct keys")
        if self.length < least:
            raise UsageError(f"length={self.length} is too short for {self.pairs} pairs; give {least} tokens or more")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"density={self.density} is a probability above 0, or None; e.g. 0.75")


def recall_rows(task: RecallTask, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """{"input_ids", "labels"}, int64 [rows, length]. labels: the value one place behind each repeated key, else -100.

    That is the form of transformers' losses, which compare the logits of a token with the label of the next place.
    """
    P, half = task.pairs, task.vocabulary // 2

    def shuffled(count: int) -> Tensor:
        return torch.rand(rows, count, generator=generator).argsort(1)

    keys = 1 + shuffled(half - 1)[:, :P]
    values = half + torch.randint(task.vocabulary - half, (rows, P), generator=generator)
    ids = torch.zeros(rows, task.length, dtype=torch.long)
    ids[:, 0 : 2 * P : 2], ids[:, 1 : 2 * P : 2] = keys, values
    behind = task.length - 2 * P - 1  # a label needs one place behind it
    if task.density is None:
        places, order = 2 * P + shuffled(behind)[:, :P].sort(1).values, shuffled(P)
        asked, answers = keys.gather(1, order), values.gather(1, order)
    else:
        places = torch.arange(2 * P, task.length - 1).expand(rows, -1)
        order = torch.randint(P, (rows, behind), generator=generator)
        asks = torch.rand(rows, behind, generator=generator) < task.density
        asks[:, 0] = True  # a row without a question has no accuracy
        asked = keys.gather(1, order).where(asks, 0)
        answers = values.gather(1, order).where(asks, IGNORED)
    labels = torch.full_like(ids, IGNORED)
    return {"input_ids": ids.scatter_(1, places, asked), "labels": labels.scatter_(1, places + 1, answers)}


def recall_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers of each row [rows], of logits [rows, length, vocabulary] and labels as above."""
    wanted = labels[:, 1:]
    asked = wanted != IGNORED
    right = (logits[:, :-1].argmax(-1) == wanted) & asked
    return right.sum(1) / asked.sum(1)
