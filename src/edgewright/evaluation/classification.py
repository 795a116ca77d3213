"""How far a classifier is from a reference: agreement of its first and first five choices, and divergence.

Images of one picture are alike: where `groups` says which image comes from which, standard errors count pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.evaluation.statistics import Estimate, ratio_of_sums

if TYPE_CHECKING:
    from edgewright.measure.report import Report

TOP = 5


def agreement(
    reference: Tensor, logits: Tensor, groups: Sequence[int] | None = None
) -> dict[str, tuple[Estimate, str]]:
    """Metric -> (estimate, unit) of logits [N, classes] against the reference's.

    top1_agreement: the same first choice, in %. top5_agreement: the reference's first choice is among the first five,
    in %. kl: KL(reference || logits) in nats an image. groups: [N], the picture that an image was cut from.
    """
    if reference.shape != logits.shape or reference.ndim != 2 or not len(reference):
        raise UsageError(
            f"logits of shape {tuple(logits.shape)} against {tuple(reference.shape)}; both must be [images, classes]"
        )
    first = reference.argmax(1)
    top = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    values = {
        "top1_agreement": (100.0 * (logits.argmax(1) == first).double(), "%"),
        "top5_agreement": (100.0 * (top == first.unsqueeze(1)).any(1).double(), "%"),
        "kl": ((p.exp() * (p - q)).sum(1), "nats/image"),
    }
    return {name: (_estimate(each, groups), unit) for name, (each, unit) in values.items()}


def add_agreement(
    report: Report, subject: str, reference: Tensor, logits: Tensor, groups: Sequence[int] | None = None
) -> None:
    """The rows of `agreement` for `subject`."""
    for metric, (found, unit) in agreement(reference, logits, groups).items():
        se = found.se if found.se == found.se else None
        report.add(metric, found.value, subject=subject, se=se, n=found.n, unit=unit)


@torch.no_grad()
def logits_of(model: torch.nn.Module, images: Tensor, batch: int = 16) -> Tensor:
    """Logits [N, classes] of images [N, ...], in evaluation mode, batch by batch."""
    training = model.training
    model.eval()
    try:
        return torch.cat([model(part) for part in images.split(batch)])
    finally:
        model.train(training)


def _estimate(values: Tensor, groups: Sequence[int] | None) -> Estimate:
    if groups is None:
        return ratio_of_sums(values.tolist(), [1] * len(values))
    if len(groups) != len(values):
        raise UsageError(f"{len(groups)} groups for {len(values)} images; every image needs one")
    totals: dict[int, float] = {}
    counts: dict[int, int] = {}
    for group, value in zip(groups, values.tolist(), strict=True):
        totals[group] = totals.get(group, 0.0) + value
        counts[group] = counts.get(group, 0) + 1
    return ratio_of_sums(list(totals.values()), list(counts.values()))
