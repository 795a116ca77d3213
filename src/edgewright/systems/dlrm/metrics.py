"""How good predicted clicks are, and what a DLRM has to beat: popularity, a linear model, factorisation machines.

Normalised entropy NE = log-loss / H(p), H the entropy of the labels' base rate p: 1 is what the base rate alone gives,
below 1 is better (He et al., 2014, "Practical lessons from predicting clicks on ads", section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, number
from edgewright.errors import UsageError
from edgewright.evaluation.statistics import ratio_of_sums
from edgewright.systems.dlrm.clicks import ClickData, JaggedBatch, predict


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
    """The figures of a model on held-out samples.

    Args:
        model: a DLRM, or any module that takes (dense, bags).
        data: labelled samples, clicks and others.
        batch: samples of one call.

    Returns:
        auc with its standard error, logloss in nats, ne, calibration (mean prediction over mean label), n.

    Raises:
        UsageError: one of the labels does not occur, or a prediction is NaN.
    """
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


class FactorizationMachine(nn.Module):
    """w0 + sum_i w_i x_i + sum over pairs of ids <v_i, v_j> (Rendle, 2010), over all tables; dense features are linear.

    With two tables of one id each it is biased matrix factorisation: w0 + w_user + w_item + <v_user, v_item>.
    """

    def __init__(self, num_dense: int, table_sizes: tuple[int, ...], dim: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        starts = torch.tensor([0, *table_sizes]).cumsum(0)
        self.register_buffer("starts", starts, persistent=False)
        self.starts: Tensor
        rows = int(starts[-1])
        self.num_dense = num_dense
        self.linear = nn.EmbeddingBag(rows, 1, mode="sum", sparse=True, include_last_offset=True)
        self.factors = nn.EmbeddingBag(rows, max(dim, 1), mode="sum", sparse=True, include_last_offset=True)
        self.dim = dim
        self.bias = nn.Parameter(torch.zeros(1))
        self.dense = nn.Parameter(torch.zeros(num_dense))
        with torch.no_grad():
            self.linear.weight.zero_()
            self.factors.weight.normal_(0.0, 0.05, generator=generator)

    def forward(self, dense: Tensor, bags: JaggedBatch) -> Tensor:
        """Logits [B]; the sum over pairs is half of (sum v)^2 - sum v^2."""
        total = self.bias + (dense @ self.dense if self.num_dense else 0.0)
        sums, squares = total.new_zeros(1), total.new_zeros(1)
        for k, (values, offsets) in enumerate(zip(bags.values, bags.offsets, strict=True)):
            places = values + self.starts[k]
            total = total + self.linear(places, offsets).squeeze(1)
            if self.dim:
                sums = sums + self.factors(places, offsets)
                each = F.embedding(places, self.factors.weight, sparse=True).square()
                inner = torch.arange(len(places), device=places.device)
                squares = squares + F.embedding_bag(inner, each, offsets, mode="sum", include_last_offset=True)
        return total + 0.5 * (sums.square() - squares).sum(1) if self.dim else total

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Rows of tables: their gradients are sparse."""
        return [self.linear.weight, self.factors.weight] if self.dim else [self.linear.weight]  # type: ignore[list-item]

    def dense_parameters(self) -> list[nn.Parameter]:
        """Everything else."""
        return [self.bias, self.dense]


class LogisticRegression(nn.Module):
    """One weight for every id and every dense feature, fitted to the optimum: convex, so no seed and no rate."""

    def __init__(self, num_dense: int, table_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("starts", torch.tensor([0, *table_sizes]).cumsum(0), persistent=False)
        self.starts: Tensor
        self.weight = nn.Parameter(torch.zeros(int(self.starts[-1])))
        self.dense = nn.Parameter(torch.zeros(num_dense))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, dense: Tensor, bags: JaggedBatch) -> Tensor:
        """Logits [B]."""
        return self.logits(dense, *self.ones(bags))

    def ones(self, bags: JaggedBatch) -> tuple[Tensor, Tensor]:
        """Where the one-hot matrix [B, features] holds ones: (columns, rows)."""
        places = torch.cat([values + self.starts[k] for k, values in enumerate(bags.values)])
        every = torch.arange(bags.size)
        return places, torch.cat([every.repeat_interleave(offsets.diff()) for offsets in bags.offsets])

    def logits(self, dense: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
        """Logits [B] from the places of the ones."""
        linear = self.bias + dense @ self.dense
        return linear.index_add(0, rows, self.weight.index_select(0, columns))


def fit_logistic_regression(data: ClickData, penalty: float = 1.0, iterations: int = 60) -> LogisticRegression:
    """The minimum of total log-loss + penalty / 2 * |w|^2 (bias free), found by L-BFGS over all samples at once."""
    check("penalty", penalty, number(above=0), "one-hot features without one have no optimum")
    model = LogisticRegression(data.dense.shape[1], data.schema.sizes)
    columns, rows = model.ones(data.bags())
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model.logits(data.dense, columns, rows), data.labels)
        decay = model.weight.square().sum() + model.dense.square().sum()
        loss = loss + 0.5 * penalty / len(data) * decay
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return model.eval()


class Popularity(nn.Module):
    """The click rate of the sample's item in training, with `strength` clicks at the base rate added for calm."""

    def __init__(self, data: ClickData, table: str = "item", strength: float = 10.0) -> None:
        super().__init__()
        columns = data.schema.columns(table)
        if columns.stop - columns.start != 1:
            raise UsageError(f"table {table} holds bags; popularity needs one id a sample")
        self.table = data.schema.tables.index(table)
        ids = data.ids[:, columns].reshape(-1).long()
        known = ids >= 0
        rows = data.schema.sizes[self.table]
        shown = torch.bincount(ids[known], minlength=rows).double()
        clicked = torch.bincount(ids[known], weights=data.labels[known].double(), minlength=rows)
        base = float(data.labels.double().mean())
        self.register_buffer("logits", torch.logit((clicked + strength * base) / (shown + strength)).float())
        self.logits: Tensor
        self.base = float(torch.logit(torch.tensor(base)))

    def forward(self, dense: Tensor, bags: JaggedBatch) -> Tensor:
        """Logits [B]; a sample without an item gets the base rate."""
        values, offsets = bags.values[self.table], bags.offsets[self.table]
        there = offsets.diff() > 0
        out = torch.full((bags.size,), self.base)
        out[there] = self.logits[values[offsets[:-1][there]]]
        return out
