"""The units of a search: every table and every linear layer, what each may become, and what that costs.

A unit is one weight, wherever it is used: modules that share a parameter (a tied table) are one unit and are quantised
once; a table as quotient and remainder is one unit with two short tables.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.io.hashing import tensors_hash
from edgewright.io.row_codes import row_bytes
from edgewright.systems.dlrm.tables import QREmbeddingBag
from edgewright.systems.low_precision_recsys.bag import (
    RowwiseQuantEmbedding,
    RowwiseQuantEmbeddingBag,
    RowwiseQuantQRBag,
    bag_weight,
)
from edgewright.systems.low_precision_recsys.codebooks import CENTRES
from edgewright.systems.low_precision_recsys.linear import HalfLinear, Int8Linear, RowsLinear, weight_codes
from edgewright.systems.low_precision_recsys.rows import HalfRows, StoredRows, quantize_rows

REFERENCE = "fp32"
TABLE_OPTIONS = ("fp32", "fp16", "int8", "int4-greedy", "int2-greedy")
LINEAR_OPTIONS = ("fp32", "fp16", "int8-dynamic", "int8-static")
BOOK_ROWS = 64  # rows that share a codebook in "int4-books"

# (bits, method, nbins, ratio, rows of a book); at 2 bits the published defaults of the search barely help
_TABLE_FORMS: dict[str, tuple[int, str, int, float, int]] = {
    "int8": (8, "minmax", 200, 0.16, 1),
    "int4-greedy": (4, "greedy", 200, 0.16, 1),
    "int4-minmax": (4, "minmax", 200, 0.16, 1),
    "int4-kmeans": (4, "kmeans", 200, 0.16, 1),
    "int4-books": (4, "kmeans", 200, 0.16, BOOK_ROWS),
    "int2-greedy": (2, "greedy", 25, 0.6, 1),
    "int2-minmax": (2, "minmax", 25, 0.6, 1),
}
_INT8_FORMS = ("int8-dynamic", "int8-static", "int8-dynamic-l2", "int8-static-l2", "int8-acc16")
ALL_TABLE_OPTIONS = ("fp32", "fp16", *_TABLE_FORMS)
ALL_LINEAR_OPTIONS = ("fp32", "fp16", "bf16", *_INT8_FORMS)

Range = tuple[float, int]  # step and zero point of an input with a fixed range
_Embedding = (nn.Embedding, nn.EmbeddingBag, QREmbeddingBag)


@dataclass(frozen=True)
class Unit:
    """One weight. kind: "table" or "linear". paths: the modules that use it. shapes: of its tensors."""

    name: str
    kind: str
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    biases: int  # float32 values beside the weight

    @property
    def options(self) -> tuple[str, ...]:
        """Everything that the unit may become."""
        return ALL_TABLE_OPTIONS if self.kind == "table" else ALL_LINEAR_OPTIONS

    def nbytes(self, option: str) -> int:
        """Bytes of the unit by the arithmetic of its format."""
        self.check(option)
        return sum(_matrix_bytes(n, d, option) for n, d in self.shapes) + 4 * self.biases

    def check(self, option: str) -> None:
        """Raise UsageError for an option that this kind of unit does not have."""
        if option not in self.options:
            raise UsageError(f"{self.name} is a {self.kind}: {option!r} is none of {', '.join(self.options)}")


def find_units(model: nn.Module) -> dict[str, Unit]:
    """The tables and linear layers of a model by name, in the order in which it holds them.

    Raises UsageError when there is none, Unsupported for a layer that changes its rows during look-ups.
    """
    groups: dict[int, list[str]] = {}
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if type(module) is nn.Linear or isinstance(module, _Embedding):
            if not path:
                raise UsageError("the model is a single layer; put it into a module, e.g. nn.Sequential(layer)")
            if getattr(module, "max_norm", None) is not None:
                raise Unsupported(f"{path} has max_norm: it changes its rows while it looks them up; set it to None")
            groups.setdefault(id(_weights(module)[0]), []).append(path)
    units = {}
    for paths in groups.values():
        first = modules[paths[0]]
        tables = any(isinstance(modules[path], _Embedding) for path in paths)
        biases: dict[int, int] = {}
        for path in paths:
            bias = getattr(modules[path], "bias", None)
            if isinstance(bias, Tensor):
                biases[id(bias)] = bias.numel()
        shapes = tuple((w.shape[0], w.shape[1]) for w in _weights(first))
        units[paths[0]] = Unit(paths[0], "table" if tables else "linear", tuple(paths), shapes, sum(biases.values()))
    if not units:
        raise UsageError("the model has no Linear, Embedding or EmbeddingBag: there is nothing to quantise")
    return units


def build(model: nn.Module, unit: Unit, option: str, ranges: Range | None = None, quick: bool = False) -> nn.ModuleDict:
    """The modules that take the place of a unit's modules, keyed by their paths with "/" for dots.

    ranges: of the input of an "int8-static" layer. quick: the same shapes without a search for good codes, for values
    that will be replaced. Option fp32 gives no modules. Raises UsageError, for a table too with the row that is broken.
    """
    unit.check(option)
    if option == REFERENCE:
        return nn.ModuleDict()
    if unit.kind == "linear":
        return nn.ModuleDict({_key(path): m for path, m in _linears(model, unit, option, ranges).items()})
    owner = next(m for path in unit.paths if isinstance(m := model.get_submodule(path), _Embedding))
    if isinstance(owner, QREmbeddingBag):
        stored = [_store(unit.name, weight, option, quick) for weight in _weights(owner)]
    else:
        stored = [_store(unit.name, bag_weight(owner), option, quick)]
    replaced: dict[int, nn.Module] = {}
    found = {}
    for path in unit.paths:
        module = model.get_submodule(path)
        if id(module) not in replaced:
            replaced[id(module)] = _lookup(module, stored)
        found[_key(path)] = replaced[id(module)]
    return nn.ModuleDict(found)


@contextmanager
def swapped(model: nn.Module, *parts: nn.ModuleDict) -> Iterator[None]:
    """The model with these modules in place, put back afterwards whatever happens."""
    before: list[tuple[str, nn.Module]] = []
    try:
        for part in parts:
            for key, module in part.items():
                path = key.replace("/", ".")
                before.append((path, model.get_submodule(path)))
                model.set_submodule(path, module)
        yield
    finally:
        for path, module in reversed(before):
            model.set_submodule(path, module)


def replaced_copy(model: nn.Module, *parts: nn.ModuleDict) -> nn.Module:
    """A copy of the model in evaluation mode with these modules in place; what they replace is not copied."""
    memo: dict[int, object] = {}
    for part in parts:
        for key, module in part.items():
            memo[id(model.get_submodule(key.replace("/", ".")))] = module
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def unit_digest(model: nn.Module, unit: Unit) -> str:
    """Digest of a unit's weights and biases."""
    tensors = {
        f"{path}.{name}": tensor
        for path in unit.paths
        for name, tensor in model.get_submodule(path).named_parameters(recurse=False)
    }
    return tensors_hash(tensors)


def _store(name: str, weight: Tensor, option: str, quick: bool) -> StoredRows:
    if option == "fp16":
        return StoredRows(HalfRows(weight.detach().half()))
    bits, method, nbins, ratio, block = _TABLE_FORMS[option]
    try:
        if quick and method == "greedy":
            method = "minmax"
        return StoredRows(quantize_rows(weight.detach().float(), bits, method, nbins, ratio, block=block))
    except UsageError as error:
        raise UsageError(f"table {name}: {error}") from error


def _lookup(module: nn.Module, stored: list[StoredRows]) -> nn.Module:
    if isinstance(module, QREmbeddingBag):
        return RowwiseQuantQRBag(module, *stored)
    if isinstance(module, nn.EmbeddingBag):
        return RowwiseQuantEmbeddingBag.like(module, stored[0])
    if isinstance(module, nn.Embedding):
        return RowwiseQuantEmbedding(stored[0])
    assert isinstance(module, nn.Linear)
    return RowsLinear(stored[0], module.bias)


def _linears(model: nn.Module, unit: Unit, option: str, ranges: Range | None) -> dict[str, nn.Module]:
    static = option.startswith("int8-static")
    if static and ranges is None:
        raise UsageError(f"{unit.name}: {option} reads its input in a fixed range; give batches to calibrate it with")
    layers = {path: model.get_submodule(path) for path in unit.paths}
    weight: Tensor = layers[unit.paths[0]].weight  # type: ignore[assignment]
    made: dict[int, nn.Module] = {}
    if option in _INT8_FORMS:
        try:
            codes, scale = weight_codes(weight, "l2" if option.endswith("-l2") else "max")
        except UsageError as error:
            raise UsageError(f"linear layer {unit.name}: {error}") from error
    for module in layers.values():
        if id(module) in made:
            continue
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        if option in _INT8_FORMS:
            accumulate = 16 if option == "int8-acc16" else 32
            made[id(module)] = Int8Linear(codes, scale, bias, ranges if static else None, accumulate)
        else:
            made[id(module)] = HalfLinear(weight, bias, torch.bfloat16 if option == "bf16" else torch.float16)
    return {path: made[id(module)] for path, module in layers.items()}


def _weights(module: nn.Module) -> list[nn.Parameter]:
    if isinstance(module, QREmbeddingBag):
        return [module.quotient, module.remainder]
    return [module.weight]  # type: ignore[list-item]


def _matrix_bytes(n: int, d: int, option: str) -> int:
    if option == "fp32":
        return 4 * n * d
    if option in ("fp16", "bf16"):
        return 2 * n * d
    if option in _INT8_FORMS:
        return n * d + 4 * n + (8 if option.startswith("int8-static") else 0)
    bits, method, _, _, block = _TABLE_FORMS[option]
    if method == "kmeans":
        return n * -(-d // 2) + 2 * CENTRES * -(-n // block)
    return n * row_bytes(d, bits)


def _key(path: str) -> str:
    return path.replace(".", "/")
