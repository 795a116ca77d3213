"""What a model is judged on: requests in batches, their labels, whom each is about, and parts to look at separately."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.io.hashing import sha256
from edgewright.systems.dlrm.bags import JaggedBatch
from edgewright.systems.dlrm.clicks import ClickData

BATCH = 4096


@dataclass(frozen=True)
class Examples:
    """N labelled requests for any model.

    batches: the positional arguments of `forward`, batch after batch. labels: float [N] of 0 and 1. groups: [N] whole
    numbers, the users whom examples belong to, or None. slices: name -> bool [N], parts that are reported separately.
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
    """Parts of `data` by what the training part holds: users it does not know, and its `top` most frequent ids.

    table: the one whose ids are counted, by default the longest with one id a sample.
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
