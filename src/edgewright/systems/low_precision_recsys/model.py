"""A recipe: which unit becomes what, as a JSON file; and the model that it makes of a float model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import atomic_directory, write_text
from edgewright.io.hashing import sha256, tensors_hash
from edgewright.io.json_file import json_value, read_object
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.systems.dlrm.model import CONFIG, DLRM, MODEL_TYPE as DLRM_TYPE, read_config
from edgewright.systems.low_precision_recsys.calibration import correct_biases, histograms
from edgewright.systems.low_precision_recsys.examples import calibration_batches
from edgewright.systems.low_precision_recsys.units import (
    REFERENCE,
    Range,
    Unit,
    build,
    find_units,
    replaced_copy,
    unit_digest,
)

FORMAT = 1
MODEL_TYPE = "edgewright_quant_recipe"
LARGEST = 64 << 20
RECIPE, WEIGHTS, SHARED = "recipe.json", "model.safetensors", "shared.json"


@dataclass(frozen=True)
class Choice:
    """What one unit becomes.

    weights: digest of the float weights that the search saw; values: of the low-precision ones. range: step and zero
    point of the input, for static layers. edges and shares: the input's distribution, for the drift of linear units.
    """

    option: str
    kind: str
    shapes: tuple[tuple[int, int], ...]
    weights: str = ""
    values: str = ""
    range: Range | None = None
    edges: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class QuantRecipe:
    """Options of all units, and where they come from.

    metrics: judgements by name ("search", "confirm") and bytes. data: digests of the data. about: gate, objective,
    versions, notes.
    """

    units: dict[str, Choice]
    bias_correction: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def assignment(self) -> dict[str, str]:
        """Unit -> option."""
        return {name: choice.option for name, choice in self.units.items()}

    @property
    def architecture(self) -> str:
        """Digest of the units' names, kinds and shapes: which models the recipe is for."""
        lines = [f"{name} {c.kind} {[list(s) for s in c.shapes]}" for name, c in sorted(self.units.items())]
        return sha256("\n".join(lines))

    def check(self, model: nn.Module, refreshed: bool = False) -> dict[str, Unit]:
        """The units of `model`. Raises UsageError listing those that it lacks, has besides, or has in other shapes;
        and, unless `refreshed`, those whose weights are not the ones that were searched.
        """
        units = find_units(model)
        missing = [name for name in self.units if name not in units]
        added = [name for name in units if name not in self.units]
        other = [
            f"{name} (here {list(units[name].shapes)}, in the recipe {list(choice.shapes)})"
            for name, choice in self.units.items()
            if name in units and (choice.shapes, choice.kind) != (units[name].shapes, units[name].kind)
        ]
        wrong = [
            f"{what}: {', '.join(names)}"
            for what, names in (("missing units", missing), ("units without a choice", added), ("other shapes", other))
            if names
        ]
        if wrong:
            raise UsageError(f"the recipe is for another architecture: {'; '.join(wrong)}")
        if not refreshed:
            names = [n for n, c in self.units.items() if c.weights and c.weights != unit_digest(model, units[n])]
            if names:
                raise UsageError(
                    f"the recipe was searched on other weights of {', '.join(names)}; Monitor(recipe, gate, store)"
                    ".check(model, data) judges a refreshed model, apply_recipe(..., refreshed=True) does not judge"
                )
        return units

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON, whole or not at all."""
        body = {"model_type": MODEL_TYPE, "format": FORMAT, "architecture": self.architecture, **asdict(self)}
        write_text(path, json.dumps(json_value(body), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> QuantRecipe:
        """A saved recipe. Raises UsageError (no such file), FormatError (not a recipe, or not as it was written)."""
        fields = read_object(path, LARGEST, "a recipe is what search(...).save(path) writes")
        if fields.get("model_type") != MODEL_TYPE or fields.get("format") != FORMAT:
            raise FormatError(f"{path} is no recipe of format {FORMAT} (model_type {MODEL_TYPE!r})")
        try:
            units = {name: _choice(name, values) for name, values in fields["units"].items()}
            rest = {name: fields[name] for name in ("metrics", "data", "about")}
            if not all(isinstance(value, dict) for value in rest.values()):
                raise TypeError("metrics, data and about are objects")
            recipe = cls(units, bool(fields["bias_correction"]), **rest)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise FormatError(f"{path} is no recipe: {type(error).__name__} {error}") from error
        if fields.get("architecture") != recipe.architecture:
            raise FormatError(f"{path}: its units do not give its architecture digest; it was changed by hand")
        return recipe


def apply_recipe(
    model: nn.Module, recipe: QuantRecipe, calibration: Any = None, *, refreshed: bool = False
) -> QuantizedModel:
    """A low-precision copy of `model` with the same forward signature; `model` itself stays as it is.

    calibration: batches of the model's arguments (or ClickData, Examples). With it the ranges of static layers are
    taken anew and corrected biases are computed; without it the recipe's own ranges serve. refreshed: the weights may
    be newer than the recipe. Raises UsageError for another architecture (listing the units), other weights, an empty
    calibration, or one that is missing where biases are to be corrected.
    """
    units = recipe.check(model, refreshed)
    batches = None if calibration is None else calibration_batches(calibration)
    ranges = {name: choice.range for name, choice in recipe.units.items() if choice.range is not None}
    if batches is not None:
        static = {n: units[n] for n, c in recipe.units.items() if c.option.startswith("int8-static")}
        ranges.update({n: found.parameters() for n, found in histograms(model, static, batches).items()})
    parts = [
        build(model, units[name], choice.option, ranges.get(name))
        for name, choice in recipe.units.items()
        if choice.option != REFERENCE
    ]
    if recipe.bias_correction:
        if batches is None:
            raise UsageError(
                "the recipe corrects biases, which needs data: apply_recipe(model, recipe, calibration=...)"
            )
        for part in parts:
            correct_biases(model, {key.replace("/", "."): module for key, module in part.items()}, batches)
    return QuantizedModel(replaced_copy(model, *parts), recipe)


def uniform_recipe(model: nn.Module, table: str = REFERENCE, linear: str = REFERENCE) -> QuantRecipe:
    """The same option for all tables, and for all linear layers: what a search is compared with."""
    units = find_units(model)
    chosen = {name: table if unit.kind == "table" else linear for name, unit in units.items()}
    return recipe_of(model, units, chosen)


def recipe_of(
    model: nn.Module,
    units: Mapping[str, Unit],
    assignment: Mapping[str, str],
    parts: Mapping[str, nn.ModuleDict] | None = None,
    **fields: Any,
) -> QuantRecipe:
    """A recipe without ranges or distributions; parts: the units' modules, whose digests are kept."""
    choices = {}
    for name, unit in units.items():
        option = assignment.get(name, REFERENCE)
        unit.check(option)
        values = tensors_hash(dict(parts[name].named_buffers())) if parts and name in parts else ""
        choices[name] = Choice(option, unit.kind, unit.shapes, unit_digest(model, unit), values)
    return QuantRecipe(choices, **fields)


def library_versions() -> dict[str, str]:
    """Versions that a recipe's bytes depend on."""
    return {"torch": torch.__version__}


def _choice(name: str, values: dict[str, Any]) -> Choice:
    shapes = tuple((int(n), int(d)) for n, d in values["shapes"])
    kind, option = str(values["kind"]), str(values["option"])
    Unit(name, kind, (name,), shapes, 0).check(option)
    found = values["range"]
    fixed = None if found is None else (float(found[0]), int(found[1]))
    if kind not in ("table", "linear") or (fixed and not (fixed[0] > 0 and 0 <= fixed[1] <= 255)):
        raise ValueError(f"{name}: kind {kind!r}, range {fixed}")
    edges, shares = tuple(map(float, values["edges"])), tuple(map(float, values["shares"]))
    if edges and len(shares) != len(edges) + 1:
        raise ValueError(f"{name}: {len(edges)} edges and {len(shares)} shares")
    return Choice(option, kind, shapes, str(values["weights"]), str(values["values"]), fixed, edges, shares)


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
                fields = {"model_type": DLRM_TYPE, **dataclasses.asdict(self.module.config)}
                (temporary / CONFIG).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
            (temporary / SHARED).write_text(json.dumps(shared, indent=1) + "\n", encoding="utf-8")
            save_tensors(temporary / WEIGHTS, tensors)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> QuantizedModel:
        """A saved model, to the same bits. model: a float model of the same architecture, whatever its weights; a DLRM
        needs none. Raises UsageError (no such folder, another architecture), FormatError (files that do not fit).
        """
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
