"""How good predicted clicks are: area under the ROC curve, log-loss, normalised entropy, calibration.

Normalised entropy NE = log-loss / H(p), H the entropy of the labels' base rate p: 1 is what the base rate alone gives,
below 1 is better (He et al., 2014, "Practical lessons from predicting clicks on ads", section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.evaluation.statistics import ratio_of_sums
from edgewright.systems.dlrm.clicks import ClickData, predict


@dataclass(frozen=True)
class ClickMetrics:
    """auc with its standard error; logloss in nats a sample; ne; calibration: mean prediction over mean label."""

    auc: float
    auc_se: float
    logloss: float
    logloss_se: float
    ne: float
    calibration: float
    n: int


def auc(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Area under the ROC curve and its standard error, without assumptions on the scores' distribution.

    The share of pairs (click, no click) in the right order, ties count half. The error is that of DeLong et al. (1988):
    the variance, over clicks and over the others, of the share of pairs that a sample wins. Raises UsageError unless
    both labels are there.
    """
    scores, clicked = scores.double().flatten(), _checked(scores, labels)
    positive, negative = scores[clicked], scores[~clicked]
    wins = _wins(positive, negative)
    losses = 1.0 - _wins(negative, positive)
    spread = [float(part.var()) / len(part) if len(part) > 1 else math.nan for part in (wins, losses)]
    return float(wins.mean()), math.sqrt(sum(spread))


def log_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of every sample, in nats, float64 [N]."""
    return F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")


def base_entropy(labels: Tensor) -> float:
    """Entropy of the base rate in nats: the log-loss of predicting it for everyone."""
    rate = float(labels.double().mean())
    return -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)


def normalized_entropy(logits: Tensor, labels: Tensor) -> float:
    """Log-loss over the entropy of the base rate of these labels. Raises UsageError unless both labels are there."""
    _checked(logits, labels)
    return float(log_loss(logits, labels).mean()) / base_entropy(labels)


def click_metrics(logits: Tensor, labels: Tensor) -> ClickMetrics:
    """All figures of logits [N] against labels [N] of 0 and 1."""
    area, error = auc(logits, labels)
    losses = log_loss(logits, labels)
    loss = ratio_of_sums(losses.tolist(), [1] * len(losses))
    rate = float(labels.double().mean())
    calibration = float(logits.double().sigmoid().mean()) / rate
    return ClickMetrics(area, error, loss.value, loss.se, loss.value / base_entropy(labels), calibration, len(labels))


def evaluate(model: nn.Module, data: ClickData, batch: int = 4096) -> ClickMetrics:
    """The figures of a model on held-out samples."""
    return click_metrics(predict(model, data, batch), data.labels)


def _wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """For each of `ours` the share of `theirs` that it exceeds, ties half."""
    ordered = theirs.sort().values
    below = torch.searchsorted(ordered, ours, right=False)
    upto = torch.searchsorted(ordered, ours, right=True)
    return (below + upto).double() / (2 * len(theirs))


def _checked(scores: Tensor, labels: Tensor) -> Tensor:
    clicked = labels.flatten() > 0.5
    if scores.numel() != labels.numel():
        raise UsageError(f"{scores.numel()} predictions for {labels.numel()} labels; give as many")
    if bool(scores.isnan().any()):
        raise UsageError(f"prediction {int(scores.flatten().isnan().nonzero()[0])} is NaN; the model is broken")
    check_labels(labels)
    return clicked


def check_labels(labels: Tensor, what: str = "labels", hint: str = "") -> None:
    """Raise UsageError unless clicks and others are among the labels [N]. what: of which samples they are."""
    clicked = labels.flatten() > 0.5
    if not bool(clicked.any()) or bool(clicked.all()):
        raise UsageError(
            f"all {labels.numel()} {what} are {'clicks' if labels.numel() and bool(clicked.all()) else 'zero'}; the "
            f"figures need samples of both kinds{hint}"
        )
