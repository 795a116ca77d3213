"""Verification of .onnx file: ONNX Runtime, given the written file, answers like the model in PyTorch.

The figure is the largest difference of an output over the largest value of that output, over the example and over two
other batch sizes. Integers and booleans count by the share that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgewright.errors import CheckFailed, EdgewrightError, in_one_line
from edgewright.runtime.onnx import OnnxProgram, check_model_file

SHORTER = 3  # positions that the second example has less, where the length is free


@dataclass(frozen=True)
class Difference:
    """error: the largest of all runs, relative to the largest value of the output. batches: sizes that were run."""

    error: float
    output: str
    batches: tuple[int, ...]


def variations(tensors: Sequence[Tensor], free: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """The example, and the example in other sizes: one row, and one row more with everything in another order.

    Where nothing is free the second is the example with its last axis turned round.
    """
    if not any(0 in axes for axes in free):
        return [list(tensors), [t.flip(-1) if t.ndim else t for t in tensors]]
    single, more = [], []
    for tensor, axes in zip(tensors, free, strict=True):
        batched = 0 in axes
        more_rows = torch.cat([tensor, tensor[:1].flip(-1)]).flip(0) if batched else tensor
        cut = 1 in axes and tensor.shape[1] > SHORTER + 1
        single.append(tensor[:1].contiguous() if batched else tensor)
        more.append((more_rows[:, :-SHORTER] if cut else more_rows).contiguous())
    return [list(tensors), single, more]


def verify(
    path: Path,
    names: Sequence[str],
    reference: Callable[[Sequence[Tensor]], Mapping[str, Tensor]],
    inputs: Sequence[Sequence[Tensor]],
    tolerance: float,
) -> Difference:
    """Check the file with `onnx`, run it on every list of inputs, compare. names: of the outputs, in order.

    Raises CheckFailed with the figure when it exceeds `tolerance`, or where checker or runtime refuse the file.
    """
    import onnx

    try:
        check_model_file(path)
        onnx.checker.check_model(str(path))
    except (EdgewrightError, onnx.checker.ValidationError) as error:
        raise CheckFailed(f"the written ONNX file is not valid: {in_one_line(error)}") from error
    worst, where = 0.0, ""
    try:
        with OnnxProgram(path, check=False) as program:
            for tensors in inputs:
                expected = reference(tensors)
                found = program.run([tensor.numpy() for tensor in tensors])
                for name, want, got in zip(names, expected.values(), found, strict=True):
                    distance = difference(want.detach().numpy(), got)
                    if distance >= worst:
                        worst, where = distance, name
    except CheckFailed:
        raise
    except EdgewrightError as error:
        raise CheckFailed(f"ONNX Runtime does not run the written file: {error}") from error
    if not worst <= tolerance:
        raise CheckFailed(
            f"ONNX Runtime's output {where!r} differs from PyTorch's by {worst:.2g} of its largest value; allowed are "
            f"{tolerance:.2g}. The file was not kept"
        )
    return Difference(worst, where, tuple(int(t[0].shape[0]) if t[0].ndim else 1 for t in inputs))


def difference(want: np.ndarray, got: Any) -> float:
    """Largest |got - want| over largest |want|; infinite where shape, type or the places of NaN and infinity differ."""
    got = np.asarray(got)
    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    if not want.size:
        return 0.0
    if want.dtype.kind != "f":
        return float(np.mean(want != got))
    finite = np.isfinite(want)
    if not np.array_equal(want[~finite], got[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    peak = max(float(np.abs(want[finite]).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(got[finite].astype(np.float64) - want[finite]).max()) / peak
