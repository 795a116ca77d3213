"""Clicks as tensors: dense features, padded ids, labels; their splits, their batches and the loss on a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.systems.dlrm.bags import JaggedBatch, jagged
from edgewright.training.batches import BlockBatches


@dataclass(frozen=True)
class Schema:
    """What the columns are: names of dense features; names and rows of tables; `slots`, the longest bag of each."""

    dense: tuple[str, ...]
    tables: tuple[str, ...]
    sizes: tuple[int, ...]
    slots: tuple[int, ...]

    def columns(self, table: str) -> slice:
        """Where the ids of a table are among the columns of `ClickData.ids`."""
        place = self.tables.index(table)
        start = sum(self.slots[:place])
        return slice(start, start + self.slots[place])


@dataclass(frozen=True)
class ClickData:
    """N samples: dense [N, n] float32; ids [N, sum(slots)] of int32, -1 where nothing stands; labels [N] 0.0 or 1.0.

    Rows are in the order of time where there is one; `users` [N] names whom a sample is about, where that is known.
    """

    schema: Schema
    dense: Tensor
    ids: Tensor
    labels: Tensor
    users: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: Tensor | slice) -> ClickData:
        """Some of the samples."""
        users = None if self.users is None else self.users[chosen]
        return dataclasses.replace(
            self, dense=self.dense[chosen], ids=self.ids[chosen], labels=self.labels[chosen], users=users
        )

    def tables(self, names: Sequence[str]) -> ClickData:
        """The same samples with some of the tables."""
        unknown = [name for name in names if name not in self.schema.tables]
        if unknown:
            raise UsageError(f"no table is called {unknown[0]!r}; tables: {', '.join(self.schema.tables)}")
        places = [self.schema.tables.index(name) for name in names]
        columns = [c for name in names for c in range(*self.schema.columns(name).indices(self.ids.shape[1]))]
        schema = Schema(
            self.schema.dense,
            tuple(names),
            tuple(self.schema.sizes[p] for p in places),
            tuple(self.schema.slots[p] for p in places),
        )
        return dataclasses.replace(self, schema=schema, ids=self.ids[:, columns])

    def without_dense(self) -> ClickData:
        """The same samples with their ids alone; dense [N, 0]."""
        return dataclasses.replace(self, schema=dataclasses.replace(self.schema, dense=()), dense=self.dense[:, :0])

    def bags(self, chosen: slice = slice(None)) -> JaggedBatch:
        """The bags of some samples, as models take them."""
        return jagged(self.ids[chosen], self.schema.slots)

    def split(self, share: float) -> tuple[ClickData, ClickData]:
        """The first `share` of the samples, and those that come after."""
        cut = round(share * len(self))
        if not 0 < cut < len(self):
            raise UsageError(f"a split at {share:g} of {len(self)} samples leaves one side empty; e.g. 0.8")
        return self.rows(slice(0, cut)), self.rows(slice(cut, len(self)))

    def batches(self, size: int, seed: int = 0, shuffled: bool = True) -> BlockBatches:
        """Endless batches for the training loop: every epoch in an order of its own, or always in that of the rows."""
        columns = {"dense": self.dense, "ids": self.ids, "labels": self.labels}
        return (BlockBatches if shuffled else OrderedBatches)(columns, size, seed=seed)


class OrderedBatches(BlockBatches):
    """Batches in the order of the rows, epoch after epoch: training as the clicks came in."""

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order is None:
            self._order = 0, torch.arange(self._rows)
        return self._order[1]


class ClickLoss:
    """Loss function for the training loop: mean binary cross-entropy of a model's logits on a batch of `ClickData`."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = tuple(slots)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(batch["dense"], jagged(batch["ids"], self.slots))
        return F.binary_cross_entropy_with_logits(logits, batch["labels"])


@torch.no_grad()
def predict(model: nn.Module, data: ClickData, batch: int = 4096) -> Tensor:
    """Logits [N] of all samples, in evaluation mode, on the CPU."""
    training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        parts = []
        for start in range(0, len(data), batch):
            chosen = slice(start, start + batch)
            parts.append(model(data.dense[chosen].to(device), data.bags(chosen).to(device)).float().cpu())
        return torch.cat(parts)
    finally:
        model.train(training)
