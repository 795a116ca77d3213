"""Clicks as tensors: bags of ids, dense features, labels; their splits, their batches and the loss on a batch.

A bag is what one sample says about one categorical feature: no id, one, or several. Two forms of the same thing:

    JaggedBatch   per table the ids of all bags one after the other, and where each bag begins: what models take
    padded ids    one matrix [B, S], a run of columns a table, -1 where nothing stands: what data sets hold
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, one_of
from edgewright.errors import UsageError
from edgewright.training.batches import BlockBatches

NOTHING = -1  # of padded ids: no id stands here


class OutOfRangeId(UsageError, IndexError):
    """An id that its table has no row for."""


@dataclass(frozen=True)
class JaggedBatch:
    """The bags of B samples in T tables.

    values: T tensors [nnz_k] of int64 (or int32) row ids. offsets: T tensors [B + 1] that begin with 0, never fall and
    end with nnz_k; bag i of table k is values[k][offsets[k][i]:offsets[k][i + 1]]. weights: T tensors [nnz_k] of
    float32, or None where every id counts once.
    """

    values: Sequence[Tensor]
    offsets: Sequence[Tensor]
    weights: Sequence[Tensor | None] | None = None

    @property
    def size(self) -> int:
        """B, the number of samples."""
        return len(self.offsets[0]) - 1

    def weight(self, table: int) -> Tensor | None:
        """The weights of one table's ids, or None."""
        return None if self.weights is None else self.weights[table]

    def to(self, device: torch.device | str) -> JaggedBatch:
        """The same bags on another device."""
        weights = None
        if self.weights is not None:
            weights = tuple(None if weight is None else weight.to(device) for weight in self.weights)
        return JaggedBatch(tuple(v.to(device) for v in self.values), tuple(o.to(device) for o in self.offsets), weights)

    def check(self, tables: int, names: Sequence[str] | None = None) -> JaggedBatch:
        """Raise UsageError naming the table where types, lengths or offsets cannot be; returns itself."""
        weighted = tables if self.weights is None else len(self.weights)
        if {len(self.values), len(self.offsets), weighted} != {tables}:
            raise UsageError(
                f"the batch has bags for {len(self.values)} tables (offsets for {len(self.offsets)}, weights for "
                f"{weighted}), the model has {tables}: give one tensor of values and one of offsets for every table"
            )
        size = self.size
        for k, (values, offsets) in enumerate(zip(self.values, self.offsets, strict=True)):
            name = names[k] if names else str(k)
            for what, tensor in (("values", values), ("offsets", offsets)):
                if tensor.dtype not in (torch.int64, torch.int32) or tensor.ndim != 1:
                    raise UsageError(
                        f"table {name}: {what} are {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}; "
                        "they are one row of int64"
                    )
            if len(offsets) != size + 1:
                raise UsageError(
                    f"table {name}: {len(offsets)} offsets, {size + 1} expected: one for each of the {size} samples "
                    "and the end"
                )
            if int(offsets[0]) != 0 or int(offsets[-1]) != len(values) or bool((offsets.diff() < 0).any()):
                raise UsageError(
                    f"table {name}: offsets must begin with 0, never fall and end with {len(values)}, the number of "
                    f"values; got {offsets[:8].tolist()}{'...' if len(offsets) > 8 else ''} ending {int(offsets[-1])}"
                )
            weight = self.weight(k)
            if weight is not None and weight.shape != values.shape:
                raise UsageError(f"table {name}: {len(weight)} weights for {len(values)} values")
        return self


def check_ids(values: Tensor, rows: int, table: str, offsets: Tensor | None = None) -> None:
    """Raise OutOfRangeId naming table, id and sample unless every id is a row of a table with `rows` rows."""
    if not len(values):
        return
    low, high = (int(end) for end in values.aminmax())
    if low >= 0 and high < rows:
        return
    place = int(((values < 0) | (values >= rows)).nonzero()[0])
    sample = place if offsets is None else int(torch.searchsorted(offsets, place, right=True)) - 1
    raise OutOfRangeId(
        f"table {table} has rows 0 to {rows - 1}; row {sample} of the batch asks for id {int(values[place])} "
        "(on_oob='mod' wraps such ids, on_oob='default_row' sends them to row 0)"
    )


def jagged(ids: Tensor, slots: Sequence[int]) -> JaggedBatch:
    """Padded ids [B, sum(slots)] as bags: table k has slots[k] columns; places with -1 are left out."""
    values, offsets = [], []
    size = len(ids)
    for part, width in zip(ids.split(list(slots), dim=1), slots, strict=True):
        there = part >= 0
        if width == 1 and bool(there.all()):
            values.append(part.reshape(-1).to(torch.int64))
            offsets.append(torch.arange(size + 1, device=ids.device))
            continue
        ends = there.sum(1).cumsum(0)
        values.append(part[there].to(torch.int64))
        offsets.append(torch.cat([ends.new_zeros(1), ends]))
    return JaggedBatch(tuple(values), tuple(offsets))


def padded(bags: JaggedBatch, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Bags as (ids [B, sum(slots)] int64, weights of the same shape float32): 0 and 0.0 where nothing stands.

    This is what an exported model takes. Raises UsageError for a bag that has more ids than its table has slots.
    """
    all_ids, all_weights = [], []
    for k, width in enumerate(slots):
        values, offsets = bags.values[k], bags.offsets[k]
        lengths = offsets.diff()
        if len(lengths) and int(lengths.max()) > width:
            raise UsageError(
                f"table {k}: row {int(lengths.argmax())} of the batch has a bag of {int(lengths.max())} ids, the file "
                f"has room for {width}; export with max_bag={int(lengths.max())}"
            )
        ids = torch.zeros(len(lengths), width, dtype=torch.int64)
        weights = torch.zeros(len(lengths), width)
        there = torch.arange(width) < lengths.unsqueeze(1)
        ids[there] = values.to(torch.int64)
        weight = bags.weight(k)
        weights[there] = torch.ones(len(values)) if weight is None else weight.detach().float()
        all_ids.append(ids)
        all_weights.append(weights)
    return torch.cat(all_ids, 1), torch.cat(all_weights, 1)


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
        for name in names:
            check("table", name, one_of(*self.schema.tables))
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
    """Logits of all samples, in evaluation mode, which is put back afterwards.

    Args:
        model: a DLRM, or any module that takes (dense, bags).
        data: N samples.
        batch: samples of one call.

    Returns:
        float32 [N] on the CPU.
    """
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
