"""A trained DLRM as a file for ONNX Runtime or ExecuTorch, and requests for it.

The file takes three arrays and gives the probability of a click:

    dense    float32 [B, num_dense]
    ids      int64   [B, S]     table k has slots[k] columns; 0 where nothing stands
    weights  float32 [B, S]     1 (or the id's weight) where an id stands, 0 elsewhere

ExecuTorch has no kernel for EmbeddingBag, so that a bag becomes lookup, product with its weights and sum; the pairs of
the interaction become one product of matrices and one selection of constant places. Both runtimes compute the same. Ids
beyond a table are taken as its last row (negative ones as its first): no request reads memory that is not the table's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.export.executorch.exporter import ExecuTorchExport, export_executorch
from edgewright.export.onnx.exporter import OnnxExport, export_onnx
from edgewright.systems.dlrm.clicks import JaggedBatch, padded
from edgewright.systems.dlrm.model import DLRM, table_vectors

FORMATS = {"onnx": ".onnx", "executorch": ".pte"}


class DLRMProgram(nn.Module):
    """A DLRM over padded ids, in operators that every runtime has. Shares the weights of its model."""

    def __init__(self, model: DLRM, slots: Sequence[int]) -> None:
        super().__init__()
        self.model, self.slots = model, checked_slots(slots, len(model.tables))

    def forward(self, dense: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Dense [B, n], ids [B, S], weights [B, S] -> probabilities [B]."""
        # split, not slices: it tells the exporter that the number of columns is fixed
        parts = zip(self.model.tables, ids.split(self.slots, 1), weights.split(self.slots, 1), strict=True)
        sums = [
            table_vectors(table, chosen.clamp(0, rows - 1), counted)  # type: ignore[arg-type]
            for (table, chosen, counted), rows in zip(parts, self.model.config.table_sizes, strict=True)
        ]
        return self.model.join(self.model.bottom(dense), sums).sigmoid()


def export_dlrm(
    model: DLRM, path: str | Path, format: str | None = None, *, slots: Sequence[int] | None = None, max_bag: int = 1
) -> OnnxExport | ExecuTorchExport:
    """Write the model for a runtime; the exporter runs the file and compares it before it gets its name.

    Any batch size runs in the file (ExecuTorch: up to 1024).

    Args:
        model: trained.
        path: of the file, .onnx or .pte.
        format: "onnx" or "executorch", by default that of the suffix.
        slots: the longest bag of each table, by default `max_bag` for all.
        max_bag: longest bag of any table.

    Returns:
        What `export_onnx` or `export_executorch` return.

    Raises:
        UsageError: a path, format or slots that do not go together.
    """
    path = Path(path)
    format = checked_format(path, format)
    slots = [max_bag] * len(model.tables) if slots is None else list(slots)
    training = model.training
    program = DLRMProgram(model.eval(), slots).eval()
    example = example_inputs(model, slots)
    try:
        if format == "onnx":
            names = ("dense", "ids", "weights")
            return export_onnx(
                program, path, example_inputs=example, input_names=names, output_names=("click",), tolerance=1e-4
            )

        # lookups of tables, which XNNPACK does not know, are many small nodes beside few large ones
        return export_executorch(program, None, path, example_inputs=example, dynamic_batch=True, min_delegated=0.0)
    finally:
        model.train(training)


def checked_format(path: Path, format: str | None) -> str:
    """The format of a file, by default that of its suffix. Raises UsageError where the two differ."""
    if format is None:
        format = next((name for name, suffix in FORMATS.items() if path.suffix == suffix), "")
    if FORMATS.get(format) != path.suffix:
        raise UsageError(f"{path} with format {format!r}: give 'onnx' and a name in .onnx, or 'executorch' and .pte")
    return format


def checked_slots(slots: Sequence[int], tables: int) -> list[int]:
    """The longest bag of each table. Raises UsageError unless there is one for every table."""
    if len(slots) != tables or min(slots) < 1:
        raise UsageError(f"slots={tuple(slots)}: one number of at least 1 for each of {tables} tables")
    return list(slots)


def example_inputs(model: DLRM, slots: Sequence[int], batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Requests with bags of every length from none to full: (dense, ids, weights)."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(batch, model.config.num_dense, generator=generator)
    ids, weights = [], []
    for k, width in enumerate(slots):
        drawn = torch.randint(0, model.config.table_sizes[k], (batch, width), generator=generator)
        lengths = (torch.arange(batch) + k) % (width + 1)
        there = (torch.arange(width) < lengths.unsqueeze(1)).float()
        ids.append(drawn * there.long())
        weights.append(there)
    return dense, torch.cat(ids, 1), torch.cat(weights, 1)


def requests(model: DLRM, dense: Tensor, bags: JaggedBatch, slots: Sequence[int]) -> list[np.ndarray]:
    """The arrays that the file takes, for `Program.run`. Ids are checked here: the file only bounds them.

    Args:
        model: that was exported.
        dense: float32 [B, num_dense].
        bags: the ids of B samples.
        slots: the longest bag of each table, as the file was exported.

    Returns:
        dense float32 [B, num_dense], ids int64 [B, sum(slots)], weights float32 [B, sum(slots)].

    Raises:
        UsageError: values that the model does not take, or a bag longer than its slots.
        OutOfRangeId: an id without a row.
    """
    model.check_inputs(dense, bags)
    rows = tuple(model.row_ids(k, v, bags.offsets[k]) for k, v in enumerate(bags.values))
    ids, weights = padded(JaggedBatch(rows, bags.offsets, bags.weights), slots)
    return [dense.numpy(), ids.numpy(), weights.numpy()]
