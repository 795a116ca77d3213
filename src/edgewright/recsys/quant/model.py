"""A model at the precisions of a recipe: called as the float model is, saved, loaded, exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import atomic_directory
from edgewright.io.json_file import read_object
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.recsys.dlrm import CONFIG, DLRM, MODEL_TYPE, read_config
from edgewright.recsys.quant.units import REFERENCE, build, replaced_copy

if TYPE_CHECKING:
    from edgewright.recsys.quant.recipe import QuantRecipe

RECIPE, WEIGHTS, SHARED = "recipe.json", "model.safetensors", "shared.json"


class QuantizedModel(nn.Module):
    """`module` is the low-precision copy; calls go to it with the arguments of the float model."""

    def __init__(self, module: nn.Module, recipe: QuantRecipe) -> None:
        super().__init__()
        self.module, self.recipe = module, recipe

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters and of all buffers that are saved, shared ones once."""
        return sum(t.numel() * t.element_size() for t in _own(self.module)[0].values())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write recipe.json, model.safetensors and, of a DLRM, config.json; the folder whole or not at all."""
        tensors, shared = _own(self.module)
        with atomic_directory(folder) as temporary:
            self.recipe.save(temporary / RECIPE)
            if isinstance(self.module, DLRM):
                fields = {"model_type": MODEL_TYPE, **dataclasses.asdict(self.module.config)}
                (temporary / CONFIG).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
            (temporary / SHARED).write_text(json.dumps(shared, indent=1) + "\n", encoding="utf-8")
            save_tensors(temporary / WEIGHTS, tensors)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> QuantizedModel:
        """A saved model, to the same bits. model: a float model of the same architecture, whatever its weights; a DLRM
        needs none. Raises UsageError (no such folder, another architecture), FormatError (files that do not fit)."""
        from edgewright.recsys.quant.recipe import QuantRecipe

        folder = Path(folder)
        recipe = QuantRecipe.load(folder / RECIPE)
        if model is None:
            if not (folder / CONFIG).exists():
                raise UsageError(f"{folder} holds no DLRM; give a model of its architecture as `model`")
            model = DLRM(read_config(folder))
        units = recipe.check(model, refreshed=True)
        parts = [
            build(model, units[name], choice.option, choice.range or (1.0, 0), quick=True)
            for name, choice in recipe.units.items()
            if choice.option != REFERENCE
        ]
        made = replaced_copy(model, *parts)
        tensors = load_tensors(folder / WEIGHTS)
        shared = read_object(folder / SHARED) if (folder / SHARED).exists() else {}
        for name, owner in shared.items():
            if not isinstance(owner, str) or owner not in tensors or name in tensors:
                raise FormatError(
                    f"{folder / SHARED}: {name} is said to be {str(owner)[:80]}, which {WEIGHTS} does not hold"
                )
            tensors[name] = tensors[owner]
        _load(made, tensors, folder / WEIGHTS)
        return cls(made, recipe)

    def export(self, format: str, path: str | Path, **options: Any) -> Any:
        """Write the model for ONNX Runtime ("onnx") or ExecuTorch ("executorch"); see `export.export_quantized`."""
        from edgewright.recsys.quant.export import export_quantized

        return export_quantized(self, path, format, **options)


def _own(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, each once; the other names of shared ones -> the name that holds them)."""
    tensors: dict[str, Tensor] = {}
    owners: dict[tuple[int, Any, Any], str] = {}
    shared = {}
    for name, tensor in module.state_dict().items():
        key = tensor.data_ptr(), tensor.dtype, tensor.shape
        if tensor.numel() and key in owners:
            shared[name] = owners[key]
        else:
            owners[key] = name
            tensors[name] = tensor
    return tensors, shared


def _load(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Put tensors in the place of those of the same names; rows kept in float16 may be there or not."""
    wanted = module.state_dict()
    kept = {name for name in tensors if name.endswith((".kept_ids", ".kept_rows"))}
    if missing := set(wanted) - set(tensors) or (set(tensors) - kept) - set(wanted):
        raise FormatError(f"{path} and its recipe differ in {', '.join(sorted(missing)[:5])}")
    for name, tensor in tensors.items():
        where, _, last = name.rpartition(".")
        try:
            owner = module.get_submodule(where)
        except AttributeError as error:
            raise FormatError(f"{path}: there is no module for {name}") from error
        old = wanted.get(name)
        if old is not None and name not in kept and (old.shape != tensor.shape or old.dtype != tensor.dtype):
            raise FormatError(
                f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}, the recipe gives {old.dtype}{list(old.shape)}"
            )
        if last in owner._parameters:
            owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[last] = tensor
