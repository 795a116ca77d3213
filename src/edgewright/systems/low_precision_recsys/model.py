"""A recipe: which unit becomes what, as a JSON file; the model that it makes of a float model; a report of several."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import atomic_directory, write_text
from edgewright.io.hashing import sha256, tensors_hash
from edgewright.io.json_file import json_value, read_object
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.measure.report import Report
from edgewright.measure.timing import alternate
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.dlrm.model import CONFIG, DLRM, MODEL_TYPE as DLRM_TYPE, read_config
from edgewright.systems.low_precision_recsys.gate import (
    AccuracyGate,
    Examples,
    Judgement,
    as_examples,
    calibration_batches,
    logits,
)
from edgewright.systems.low_precision_recsys.units import (
    REFERENCE,
    Range,
    Unit,
    build,
    correct_biases,
    find_units,
    histograms,
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

    weights: digest of the float weights that the search saw; values: of the low-precision ones. range: scale and zero
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

    Args:
        units: unit -> what it becomes.
        bias_correction: add the mean of (y - y_q) to the bias of every linear layer.
        metrics: judgements by name ("search", "confirm"), and bytes.
        data: digests of the data.
        about: gate, objective, versions, notes.
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
        """Find the units of a model and hold them against the recipe.

        Args:
            model: the float model.
            refreshed: its weights may be newer than the recipe.

        Returns:
            The units by name.

        Raises:
            UsageError: the units that the model lacks, has besides, or has in other shapes; and, unless `refreshed`,
                those whose weights are not the ones that were searched.
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
        """Write the recipe as JSON, whole or not at all.

        Args:
            path: of the file.
        """
        body = {"model_type": MODEL_TYPE, "format": FORMAT, "architecture": self.architecture, **asdict(self)}
        write_text(path, json.dumps(json_value(body), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> QuantRecipe:
        """Read a saved recipe.

        Args:
            path: of the file.

        Raises:
            UsageError: there is no such file.
            FormatError: it is no recipe, or was changed after it was written.
        """
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
    """A low-precision copy of a model with the same forward signature; the model itself stays as it is.

    Args:
        model: the float model.
        recipe: what each of its units becomes.
        calibration: batches of the model's arguments, ClickData or Examples. With it the ranges of static layers are
            taken anew and corrected biases are computed; without it the recipe's own ranges serve.
        refreshed: the weights may be newer than the recipe.

    Returns:
        The model with its layers and tables replaced.

    Raises:
        UsageError: another architecture (listing the units), other weights, an empty calibration, or none where biases
            are to be corrected.
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
            correct_biases(model, part, batches)
    return QuantizedModel(replaced_copy(model, *parts), recipe)


def uniform_recipe(model: nn.Module, table: str = REFERENCE, linear: str = REFERENCE) -> QuantRecipe:
    """The same option for all tables, and for all linear layers: what a search is compared with.

    Args:
        model: the float model.
        table: "fp32", "fp16", "int8", "int4-greedy", "int4-minmax", "int4-kmeans", "int4-books" (a codebook for 64
            rows), "int2-greedy" or "int2-minmax".
        linear: "fp32", "fp16", "bf16", "int8-dynamic", "int8-static", either with "-l2", or "int8-acc16".

    Returns:
        The choice of every unit.

    Raises:
        UsageError: an option that there is not, or a model without units.
    """
    units = find_units(model)
    chosen = {name: table if unit.kind == "table" else linear for name, unit in units.items()}
    return recipe_of(model, units, chosen)


def recipe_of(
    model: nn.Module,
    units: Mapping[str, Unit],
    assignment: Mapping[str, str],
    parts: Mapping[str, dict[str, nn.Module]] | None = None,
    **fields: Any,
) -> QuantRecipe:
    """A recipe without ranges or distributions; parts: the units' modules, whose digests are kept."""
    choices = {}
    for name, unit in units.items():
        option = assignment.get(name, REFERENCE)
        unit.check(option)
        values = ""
        if parts and name in parts:
            held = nn.ModuleDict({path.replace(".", "/"): module for path, module in parts[name].items()})
            values = tensors_hash(dict(held.named_buffers()))
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
    """A low-precision model; calls go to `module` with the arguments of the float model.

    Args:
        module: the copy whose units are replaced.
        recipe: what they were replaced by.
    """

    def __init__(self, module: nn.Module, recipe: QuantRecipe) -> None:
        super().__init__()
        self.module, self.recipe = module, recipe

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the float model would give, at low precision.

        Args:
            inputs: its positional arguments.
            named: its named ones.
        """
        return self.module(*inputs, **named)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters and of all buffers that are saved, shared ones once."""
        return sum(t.numel() * t.element_size() for t in _own(self.module)[0].values())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write recipe.json, model.safetensors and, of a DLRM, config.json; the folder whole or not at all.

        Args:
            folder: that does not exist, or is empty.
        """
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
        """Load a saved model, to the same bits.

        Args:
            folder: what `save_pretrained` wrote.
            model: a float model of the same architecture, whatever its weights; a DLRM needs none.

        Raises:
            UsageError: no such folder, or another architecture.
            FormatError: files that do not fit each other.
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


RUNS = 30  # timed calls of every choice
TIMED_SAMPLES = 256  # of a call, where the data can be cut


def choices_report(
    model: nn.Module,
    data: ClickData | Examples,
    recipes: Mapping[str, QuantRecipe],
    gate: AccuracyGate,
    *,
    calibration: Any = None,
    slices: Mapping[str, Tensor] | None = None,
    runs: int = RUNS,
    title: str = "precisions of one model",
) -> Report:
    """A row for the float model and for every recipe: bytes, loss of NE with its upper end, loss of AUC, latency.

    Args:
        model: the float model.
        data: labelled clicks. Latency is that of the first 256 (of Examples, their first batch).
        recipes: name of a choice -> its recipe.
        gate: the rule behind the row "passes".
        calibration: batches for fixed ranges, by default the first of `data`.
        slices: parts of clicks that are judged separately too.
        runs: timed calls of every choice, in turns; 0 leaves latency out.
        title: of the report.

    Returns:
        One row a table or layer.
    """
    examples = as_examples(data, slices=slices)
    batches = calibration_batches(examples if calibration is None else calibration)
    reference = logits(model, examples)
    models: dict[str, nn.Module] = {"fp32": model}
    report = Report(title)
    add_judgement(report, "fp32", gate.judge(reference, reference, examples), gate)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    report.add("bytes", size, subject="fp32", unit="bytes")
    report.add("share", 100.0, subject="fp32", unit="%")
    for name, recipe in recipes.items():
        quantized = apply_recipe(model, recipe, batches, refreshed=True)
        add_judgement(report, name, gate.judge(logits(quantized, examples), reference, examples), gate)
        report.add("bytes", quantized.nbytes, subject=name, unit="bytes")
        report.add("share", 100 * quantized.nbytes / size, subject=name, unit="%")
        models[name] = quantized
    if runs:
        few = data.rows(slice(0, TIMED_SAMPLES)) if isinstance(data, ClickData) else examples
        add_latency(report, models, as_examples(few).batches[0], runs)
    return report


def add_judgement(report: Report, subject: str, found: Judgement, gate: AccuracyGate) -> None:
    """The rows of one judgement, changes of NE in percent."""
    report.add("delta_ne", 100 * found.delta, subject=subject, n=found.n, unit="%")
    report.add("delta_ne_upper", 100 * found.upper, subject=subject, n=found.groups, unit="%")
    report.add("passes", float(gate.passes(found)), subject=subject)
    report.add("auc_loss", -found.auc_delta, subject=subject, n=found.n)
    report.add("calibration", found.calibration, subject=subject, n=found.n)
    report.add("max_logit_difference", found.max_logit_difference, subject=subject, n=found.n)
    for name, (delta, upper) in found.slices.items():
        report.add(f"delta_ne, {name}", 100 * delta, subject=subject, unit="%")
        report.add(f"delta_ne_upper, {name}", 100 * upper, subject=subject, unit="%")


@torch.no_grad()
def add_latency(report: Report, models: Mapping[str, nn.Module], batch: tuple[Any, ...], runs: int = RUNS) -> None:
    """Median and 99th percentile of a call with this batch, in milliseconds; the models take turns."""
    was = {name: model.training for name, model in models.items()}
    cases = {name: partial(model.eval(), *batch) for name, model in models.items()}
    for name, taken in alternate(cases, runs, warmup=3).items():
        p50, p99 = np.percentile(taken.samples, [50, 99])
        report.add("latency_p50", 1e3 * float(p50), subject=name, n=runs, unit="ms")
        report.add("latency_p99", 1e3 * float(p99), subject=name, n=runs, unit="ms")
    for name, model in models.items():
        model.train(was[name])
