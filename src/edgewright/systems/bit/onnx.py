"""A packed binary model as an .onnx file: signs as uint8 initialisers, unfolded by a small subgraph in front of MatMul.

The file is as small as the words in memory. ONNX Runtime has no kernel for bits: it unfolds the signs into floats when
it loads the file, so the size on disk shrinks, its memory and its arithmetic do not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.export.onnx.exporter import OnnxExport, export_onnx

# A sum in another order moves a value across a threshold now and then, and one flipped bit moves a whole unit.
FLIPPED_TOLERANCE = 0.5


def export_binary_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    tolerance: float = FLIPPED_TOLERANCE,
) -> OnnxExport:
    """Write a model that went through `pack_binary_`, run the file in ONNX Runtime and compare; see `export_onnx`.

    tolerance: largest difference allowed, relative to the largest value of an output.
    Raises UsageError when the model has no packed binary layer.
    """
    exported = copy.deepcopy(model)
    found = [(name, module) for name, module in exported.named_modules() if hasattr(module, "exportable")]
    if not found:
        raise UsageError("the model has no packed binary layer; call pack_binary_(model) first, or export_onnx")
    for name, module in found:
        exported.set_submodule(name, module.exportable())
    return export_onnx(exported, path, example_inputs=example_inputs, tolerance=tolerance, storage="smallest")
