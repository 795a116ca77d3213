"""What a model is judged on, and the accuracy gate: is its normalised entropy within the budget, with 95 % confidence?

    delta = (NE_q - NE_ref) / NE_ref = sum_i (l_q,i - l_ref,i) / sum_i l_ref,i          l: log-loss of example i

The entropy of the base rate cancels. Differences are taken example by example, which removes what makes an example
hard for both models, and users are drawn whole, since one user's examples err together. The gate asks that the upper
end of the one-sided interval, and not the estimate, is within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.checks import check, check_fields, number, one_of, whole
from edgewright.errors import UsageError
from edgewright.io.hashing import sha256
from edgewright.io.json_file import json_value
from edgewright.systems.dlrm.clicks import ClickData, JaggedBatch
from edgewright.systems.dlrm.metrics import auc, base_entropy, log_loss

BATCH = 4096


@dataclass(frozen=True)
class Examples:
    """N labelled requests for any model.

    Args:
        batches: the positional arguments of `forward`, batch after batch.
        labels: float [N] of 0 and 1.
        groups: whole numbers [N], the users whom examples belong to, or None.
        slices: name -> bool [N], parts that are reported separately.

    Raises:
        UsageError: there is no example, or groups and slices are not as long as the labels.
    """

    batches: Sequence[tuple[Any, ...]]
    labels: Tensor
    groups: Tensor | None = None
    slices: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.batches) or not len(self.labels):
            raise UsageError("there is no data: give at least one batch and its labels")
        for name, part in [("groups", self.groups), *self.slices.items()]:
            if part is not None and len(part) != len(self.labels):
                raise UsageError(f"{name}: {len(part)} entries for {len(self.labels)} labels; give as many")

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """SHA-256 of all that a measurement depends on."""
        parts = [self.labels, self.groups, *(self.slices[name] for name in sorted(self.slices))]
        tensors = [*_tensors(parts), *_tensors(self.batches)]
        described = (part for t in tensors for part in (f"{t.dtype} {list(t.shape)} ", t))
        return sha256(*described, repr(sorted(self.slices)))


def as_examples(data: ClickData | Examples, batch: int = BATCH, slices: Mapping[str, Tensor] | None = None) -> Examples:
    """Clicks in batches as a DLRM takes them; Examples stay what they are. Raises UsageError when there are none."""
    if isinstance(data, Examples):
        return data
    if not isinstance(data, ClickData):
        raise UsageError(f"data to judge by are ClickData or Examples, got {type(data).__name__}")
    cuts = [slice(start, start + batch) for start in range(0, len(data), batch)]
    batches = [(data.dense[cut], data.bags(cut)) for cut in cuts]
    return Examples(batches, data.labels, data.users, dict(slices or {}))


def halves(data: ClickData | Examples) -> tuple[Examples, Examples]:
    """Two parts that share no example: the earlier half to search on, the later one to confirm with."""
    if isinstance(data, ClickData):
        first, second = data.split(0.5)
        return as_examples(first), as_examples(second)
    cut = len(data.batches) // 2
    if not cut:
        raise UsageError("one batch cannot be split into data to search on and data to confirm with; give confirm=")
    rows = sum(_size(batch) for batch in data.batches[:cut])
    parts = []
    for batches, places in ((data.batches[:cut], slice(0, rows)), (data.batches[cut:], slice(rows, None))):
        groups = None if data.groups is None else data.groups[places]
        named = {name: part[places] for name, part in data.slices.items()}
        parts.append(Examples(batches, data.labels[places], groups, named))
    return parts[0], parts[1]


def calibration_batches(data: Any, batches: int = 1) -> list[tuple[Any, ...]]:
    """Arguments of `forward` to watch activations with: the first batches of Examples or clicks, or a list of tuples.

    Raises UsageError when there is none.
    """
    if isinstance(data, ClickData | Examples):
        return list(as_examples(data).batches[:batches])
    found = [entry if isinstance(entry, tuple) else (entry,) for entry in data]
    if not found:
        raise UsageError("the calibration data is empty: give at least one batch of the model's arguments")
    return found


def click_slices(data: ClickData, train: ClickData, table: str | None = None, top: int = 100) -> dict[str, Tensor]:
    """Parts of `data` by what the training part holds: users it does not know, and its most frequent ids.

    Args:
        data: clicks that a model is judged on.
        train: clicks that it was trained on.
        table: the one whose ids are counted, by default the longest with one id a sample.
        top: how many ids count as frequent.

    Returns:
        Name of a part -> bool [N], as `Examples` takes them.
    """
    found = {}
    if data.users is not None and train.users is not None:
        found["new users"] = ~torch.isin(data.users, train.users)
    schema = train.schema
    single = [name for name, slots in zip(schema.tables, schema.slots, strict=True) if slots == 1]
    if table is None and single:
        table = max(single, key=lambda name: schema.sizes[schema.tables.index(name)])
    if table is not None:
        counts = torch.bincount(train.ids[:, schema.columns(table)].flatten().long() + 1)[1:]
        frequent = counts.topk(min(top, len(counts))).indices
        found[f"{top} most frequent of {table}"] = torch.isin(data.ids[:, schema.columns(table)][:, 0], frequent)
    return found


@torch.no_grad()
def logits(model: nn.Module, examples: Examples) -> Tensor:
    """float32 [N]: what the model says to every example, in evaluation mode, which is put back afterwards."""
    training = model.training
    model.eval()
    try:
        found = torch.cat([model(*batch).float().reshape(-1).cpu() for batch in examples.batches])
    finally:
        model.train(training)
    if len(found) != len(examples):
        raise UsageError(f"the model gave {len(found)} values for {len(examples)} labels; it must give a logit each")
    return found


def _size(batch: tuple[Any, ...]) -> int:
    for value in batch:
        if isinstance(value, JaggedBatch):
            return value.size
        if isinstance(value, Tensor):
            return len(value)
    raise UsageError("a batch holds no tensor: its number of examples is unknown; give confirm=")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, JaggedBatch):
        yield from _tensors([value.values, value.offsets, value.weights])
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from _tensors(value[name])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


_CHUNK = 100  # resamples that are drawn at once


@dataclass(frozen=True)
class Judgement:
    """A quantised model beside its reference, on the same examples.

    Args:
        delta: relative change of NE, infinite where a logit is no number.
        upper: the end of its one-sided interval.
        ne: normalised entropy, log-loss over the entropy of the base rate.
        ne_reference: that of the reference model.
        auc: area under the ROC curve.
        auc_delta: that minus the reference's.
        calibration: mean prediction over mean label.
        calibration_reference: that of the reference model.
        max_logit_difference: the largest change of a logit.
        n: examples.
        groups: how many users (or, without users, examples) the interval was drawn from.
        slices: name -> (delta, upper) of that part.
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
        return json_value(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Judgement:
        """The reverse of `to_dict`.

        Args:
            values: what `to_dict` gave; None stands for infinity.
        """
        plain: dict[str, Any] = {name: math.inf if value is None else value for name, value in values.items()}
        ends = {name: tuple(math.inf if v is None else v for v in pair) for name, pair in values["slices"].items()}
        return cls(**{**plain, "slices": ends})


@dataclass(frozen=True)
class AccuracyGate:
    """The rule by which a quantised model passes: the upper end of its interval is within the budget.

    Args:
        metric: "ne", normalised entropy; AUC alone would not see a model that has lost its calibration.
        budget: largest relative growth of NE; 5e-4 is 0.05 %, the order of what production allows.
        ci: confidence of the one-sided interval, from 0.5 below 1.
        group: "user_id" draws users whole where the data names them (examples where it does not), None draws examples.
        resamples: draws of the paired bootstrap.
        seed: of the draws.

    Raises:
        UsageError: a field breaks its rule.
    """

    metric: str = "ne"
    budget: float = 5e-4
    ci: float = 0.95
    group: str | None = "user_id"
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "metric": one_of("ne"),
                "ci": number(0.5, below=1),
                "group": one_of("user_id", None),
                "resamples": whole(1),
                "seed": whole(0),
            },
        )
        if self.budget != math.inf:  # which lets everything through
            check("AccuracyGate budget", self.budget, number(0))

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a judgement depends on: all but the budget."""
        return self.metric, self.ci, self.group, self.resamples, self.seed

    def passes(self, judgement: Judgement) -> bool:
        """Whether the upper end is within the budget.

        Args:
            judgement: what `judge` returned.
        """
        return judgement.upper <= self.budget

    def judge(self, logits: Tensor, reference: Tensor, examples: Examples) -> Judgement:
        """A quantised model's logits beside the reference model's, on the same examples.

        Args:
            logits: float [N].
            reference: float [N], of the float model.
            examples: N labelled requests.

        Raises:
            UsageError: one of the labels 0 and 1 does not occur, or the reference is not finite.
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
        """The bootstrap interval of sum(differences) / sum(losses); whole groups are drawn with replacement.

        Args:
            differences: change of the loss of each example, [N].
            losses: of the reference, [N].
            groups: whole numbers [N].

        Returns:
            (delta, upper end).
        """
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
