"""A low-precision model as a file for ONNX Runtime or ExecuTorch, run and compared before it gets its name.

A DLRM takes the three arrays of `serving` (dense, ids, weights) and gives probabilities. Both files hold the codes of
the tables and unpack what is looked up; static int8 layers go as QDQ, dynamic ones as packed weights with rounding in
front. ExecuTorch's own embedding kernels know no bias: the rows are re-expressed for them (symmetric codes) only where
the gate still passes with what that changes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.onnx.exporter import export_onnx
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.dlrm.model import DLRM
from edgewright.systems.dlrm.serving import FORMATS, DLRMProgram, example_inputs
from edgewright.systems.low_precision_recsys.bag import RowwiseQuantEmbeddingBag
from edgewright.systems.low_precision_recsys.examples import Examples, as_examples, logits
from edgewright.systems.low_precision_recsys.gate import AccuracyGate, Judgement
from edgewright.systems.low_precision_recsys.gathered import gathered, symmetric
from edgewright.systems.low_precision_recsys.linear import Int8Linear
from edgewright.systems.low_precision_recsys.model import QuantizedModel
from edgewright.systems.low_precision_recsys.portable import PortableDLRM, Vectors, portable
from edgewright.systems.low_precision_recsys.rows import StoredRows

EXACT, ROUNDED = 1e-4, 0.05  # allowed differences; a sum in another order moves a rounded input by a code now and then


def export_quantized(
    model: QuantizedModel,
    path: str | Path,
    format: str,
    *,
    slots: Sequence[int] | None = None,
    max_bag: int = 1,
    inputs: Sequence[Tensor] | None = None,
    gate: AccuracyGate | None = None,
    reference: nn.Module | None = None,
    data: ClickData | Examples | None = None,
) -> Any:
    """Write the file; returns what `export_onnx` or `export_executorch` return, `notes` saying how rows are held.

    slots: of a DLRM, the longest bag of each table, by default `max_bag` for all. inputs: of any other model, example
    arguments with the batch first (ids of bags are [batch, width]). reference: the float model, from which
    `checks["original"]` says how far the file is. gate and data: with all three, ExecuTorch's kernels get symmetric
    rows where the gate passes; without them rows stay as they are.
    Raises UsageError, Unsupported for what no runtime has, and what the exporters raise.
    """
    path = Path(path)
    if FORMATS.get(format) != path.suffix:
        raise UsageError(f"{path} with format {format!r}: give 'onnx' and a name in .onnx, or 'executorch' and .pte")
    dlrm = isinstance(model.module, DLRM)
    if not dlrm and inputs is None:
        raise UsageError("this model is no DLRM: give example arguments, e.g. export('onnx', path, inputs=(ids,))")
    vectors: Vectors = gathered
    note = "rows are unpacked as the model holds them"
    if format == "executorch" and gate is not None and reference is not None and data is not None:
        found = judge_symmetric(model, gate, reference, data)
        if gate.passes(found):
            vectors, note = symmetric, "rows are symmetric, for the embedding kernels"
        else:
            note += (
                f": symmetric rows would cost {100 * found.upper:.3g} % of NE, the budget is {100 * gate.budget:g} %"
            )
    example: tuple[Tensor, ...]
    original = reference
    if isinstance(model.module, DLRM):
        widths = [max_bag] * len(model.module.tables) if slots is None else list(slots)
        if len(widths) != len(model.module.tables) or min(widths) < 1:
            raise UsageError(f"slots={tuple(widths)}: one number of at least 1 for each table")
        program: nn.Module = PortableDLRM(model.module, widths, vectors).eval()
        example = example_inputs(model.module, widths)
        names: tuple[str, ...] | None = ("dense", "ids", "weights")
        original = DLRMProgram(reference, widths).eval() if isinstance(reference, DLRM) else None
    else:
        program, example, names = portable(model.module, vectors), tuple(inputs or ()), None
    if format == "onnx":
        rounds = any(isinstance(m, Int8Linear) for m in model.module.modules())
        done: Any = export_onnx(
            program,
            path,
            example_inputs=example,
            input_names=names,
            output_names=("click",) if dlrm else None,
            tolerance=ROUNDED if rounds else EXACT,
            original=original,
        )
    else:
        # gathers and unpacking, which XNNPACK does not know, are many small nodes beside few large ones
        done = export_executorch(
            program,
            None,
            path,
            example_inputs=example,
            dynamic_batch=True,
            min_delegated=0.0,
            original=original,
        )
    return replace(done, notes=(*done.notes, note))


def judge_symmetric(
    model: QuantizedModel, gate: AccuracyGate, reference: nn.Module, data: ClickData | Examples
) -> Judgement:
    """The model with symmetric rows beside the float model, on labelled data."""
    examples = as_examples(data)
    return gate.judge(logits(with_symmetric_rows(model.module), examples), logits(reference, examples), examples)


def with_symmetric_rows(model: nn.Module) -> nn.Module:
    """A copy that computes in PyTorch what a file with symmetric rows computes."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, StoredRows):
            memo[id(module)] = _Symmetric(module)
    made = copy.deepcopy(model, memo).eval()
    for module in made.modules():
        if isinstance(module, RowwiseQuantEmbeddingBag):
            module.fused = False  # the operator would read the packed bytes
    return made


class _Symmetric(StoredRows):
    """Stored rows whose vectors are those of their symmetric form."""

    def __init__(self, stored: StoredRows) -> None:
        super().__init__(stored.rows)
        self.form = symmetric(stored)

    def vectors(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.form(ids)  # type: ignore[no-any-return]
