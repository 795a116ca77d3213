"""The accuracy gate: is a quantised model's normalised entropy within the budget, with 95 % confidence?

    delta = (NE_q - NE_ref) / NE_ref = sum_i (l_q,i - l_ref,i) / sum_i l_ref,i          l: log-loss of example i

The entropy of the base rate cancels. Differences are taken example by example, which removes what makes an example
hard for both models, and users are drawn whole, since one user's examples err together. The gate asks that the upper
end of the one-sided interval, and not the estimate, is within the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.io.json_file import json_value
from edgewright.systems.dlrm.metrics import auc, base_entropy, log_loss
from edgewright.systems.low_precision_recsys.examples import Examples

METRICS = ("ne",)
_CHUNK = 100  # resamples that are drawn at once


@dataclass(frozen=True)
class Judgement:
    """A quantised model beside its reference, on the same examples.

    delta: relative change of NE; upper: the end of its one-sided interval; both infinite where a logit is no number.
    auc_delta: AUC minus the reference's. calibration: mean prediction over mean label. slices: name -> (delta, upper).
    groups: how many users (or, without users, examples) the interval was drawn from.
    """

    delta: float
    upper: float
    ne: float
    ne_reference: float
    auc: float
    auc_delta: float
    calibration: float
    calibration_reference: float
    max_logit_difference: float
    n: int
    groups: int
    slices: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; numbers that JSON does not have become None."""
        values: dict[str, Any] = json_value(self)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Judgement:
        """The reverse of `to_dict`."""
        found: dict[str, Any] = {name: _back(value) for name, value in values.items()}
        slices = {name: tuple(_back(v) for v in pair) for name, pair in values["slices"].items()}
        return cls(**{**found, "slices": slices})


@dataclass(frozen=True)
class AccuracyGate:
    """budget: largest relative growth of NE (5e-4: 0.05 %), ci: confidence of the one-sided interval.

    group: "user_id" draws users whole where the data names them (examples where it does not), None always examples.
    resamples: draws of the paired bootstrap, from `seed`.
    """

    metric: str = "ne"
    budget: float = 5e-4
    ci: float = 0.95
    group: str | None = "user_id"
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(
                f"metric={self.metric!r}: the gate judges by {', '.join(METRICS)}, normalised entropy; AUC alone would "
                "not see a model that has lost its calibration"
            )
        if math.isnan(self.budget) or self.budget < 0 or not 0.5 <= self.ci < 1 or self.resamples < 1:
            raise UsageError(
                f"budget={self.budget}, ci={self.ci}, resamples={self.resamples}: the budget is not negative, ci lies "
                "from 0.5 below 1, there is at least one resample; e.g. AccuracyGate(budget=5e-4, ci=0.95)"
            )
        if self.group not in ("user_id", None):
            raise UsageError(f"group={self.group!r}: 'user_id' draws users whole, None draws examples")

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a judgement depends on: all but the budget."""
        return self.metric, self.ci, self.group, self.resamples, self.seed

    def passes(self, judgement: Judgement) -> bool:
        """Whether the upper end is within the budget."""
        return judgement.upper <= self.budget

    def judge(self, logits: Tensor, reference: Tensor, examples: Examples) -> Judgement:
        """Logits [N] beside the reference model's [N]. Raises UsageError unless both labels occur, and for a
        reference that is not finite.
        """
        labels = examples.labels.double()
        if not bool(reference.isfinite().all()):
            raise UsageError("the reference model gives a logit that is not finite; there is nothing to compare with")
        clicks = int((labels > 0.5).sum())
        if not 0 < clicks < len(labels):
            raise UsageError(
                f"all {len(labels)} labels are {'clicks' if clicks else 'zero'}: normalised entropy needs both kinds"
            )
        entropy = base_entropy(labels)
        before = log_loss(reference, labels)
        area = auc(reference, labels)[0]
        rate = float(labels.mean())
        calibrated = float(reference.double().sigmoid().mean()) / rate
        groups = _groups(examples, self.group)
        count = int(groups.max()) + 1
        if not bool(logits.isfinite().all()):
            lost = dict.fromkeys(examples.slices, (math.inf, math.inf))
            ne = float(before.mean()) / entropy
            return Judgement(
                *(math.inf, math.inf, math.inf, ne, 0.5, 0.5 - area, math.inf, calibrated, math.inf),
                n=len(labels),
                groups=count,
                slices=lost,
            )
        after = log_loss(logits, labels)
        delta, upper = self.interval(after - before, before, groups)
        slices = {}
        for name, part in examples.slices.items():
            if bool(part.any()):
                slices[name] = self.interval((after - before)[part], before[part], groups[part])
        new_area = auc(logits, labels)[0]
        return Judgement(
            delta=delta,
            upper=upper,
            ne=float(after.mean()) / entropy,
            ne_reference=float(before.mean()) / entropy,
            auc=new_area,
            auc_delta=new_area - area,
            calibration=float(logits.double().sigmoid().mean()) / rate,
            calibration_reference=calibrated,
            max_logit_difference=float((logits - reference).abs().max()),
            n=len(labels),
            groups=count,
            slices=slices,
        )

    def interval(self, differences: Tensor, losses: Tensor, groups: Tensor) -> tuple[float, float]:
        """(delta, upper end) of sum(differences) / sum(losses), all [N]; whole groups are drawn with replacement."""
        _, places = torch.unique(groups, return_inverse=True)
        count = int(places.max()) + 1
        tops = np.zeros(count)
        bottoms = np.zeros(count)
        np.add.at(tops, places.numpy(), differences.double().numpy())
        np.add.at(bottoms, places.numpy(), losses.double().numpy())
        delta = float(tops.sum() / bottoms.sum())
        draws = np.random.default_rng(self.seed)
        found = []
        for start in range(0, self.resamples, _CHUNK):
            rounds = min(_CHUNK, self.resamples - start)
            counted = draws.multinomial(count, np.full(count, 1.0 / count), size=rounds)
            found.append((counted @ tops) / (counted @ bottoms))
        return delta, float(np.quantile(np.concatenate(found), self.ci))


def _groups(examples: Examples, group: str | None) -> Tensor:
    if group is None or examples.groups is None:
        return torch.arange(len(examples))
    return torch.unique(examples.groups, return_inverse=True)[1]


def _back(value: Any) -> Any:
    return math.inf if value is None else value
