"""The units of a search: every table and every linear layer, what each may become, what that costs; and linear layers.

A unit is one weight, wherever it is used: modules that share a parameter (a tied table) are one unit and are quantised
once; a table as quotient and remainder is one unit with two short tables. Linear layers at int8:

    y = s_x s_c (q_x - z_x) . q_w + b          q_w int8, s_c = max|W_c| / 127 for output channel c
                                               q_x uint8, (s_x, z_x) of each row of x (dynamic) or fixed (static)

The sum is over integers in 32 bits. 16-bit accumulation, which old x86 needs for speed, is emulated: weights beyond 7
bits go another way (a sparse product in float), what is left is added in saturating 16-bit integers that are emptied
into 32 bits every `spill` products.

Calibration watches the inputs of linear layers over batches. A histogram has 2048 even bins between the least and the
greatest value, which a first pass finds. The range of an 8-bit code is cut at both ends where that lowers the expected
squared error: the values beyond it become its ends, and all others get a finer scale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, one_of, whole
from edgewright.errors import Unsupported, UsageError
from edgewright.io.hashing import tensors_hash
from edgewright.io.row_codes import row_bytes
from edgewright.systems.dlrm.model import QREmbeddingBag
from edgewright.systems.low_precision_recsys.tables import (
    CENTRES,
    Float16Rows,
    RowwiseQuantEmbedding,
    RowwiseQuantEmbeddingBag,
    RowwiseQuantQRBag,
    StoredRows,
    bag_weight,
    quantize_rows,
)

CODES = 127
LEVELS = 255
SPILL = 64  # products that 16 bits hold before they are emptied
_SEVEN_BITS = (-64, 63)
_EXACT = 512  # products of 255 x 128 whose sum float32 holds exactly


def weight_codes(weight: Tensor, clip: str = "max", nbins: int = 200, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    """(codes int8 [out, in], scale float32 [out]) of W [out, in]: symmetric, one scale an output channel.

    clip: "max", or "l2": the range is cut part by part, as the greedy search of tables does at both ends, and the
    scale with the least squared error is taken. A channel of zeros has scale 1. Raises UsageError for NaN or infinity.
    """
    check("clip", clip, one_of("max", "l2"))
    weight = weight.detach().float()
    reach = weight.abs().amax(1)
    if not bool(reach.isfinite().all()):
        raise UsageError(f"output channel {int((~reach.isfinite()).nonzero()[0])} holds NaN or infinity")
    best = _scale(reach)
    if clip == "l2":
        least = _error(weight, best)
        for part in range(1, int(nbins * ratio) + 1):
            scale = _scale(reach * (1 - part / nbins))
            error = _error(weight, scale)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    return _codes(weight, best).to(torch.int8), best


def row_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """(s_x, z_x) of every row of x [..., in], float32 [..., 1]: from min(x, 0) to max(x, 0) in 255 intervals."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0.0), x.amax(-1, keepdim=True).clamp_min(0.0)
    return range_parameters(low, high)


def range_parameters(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of uint8 codes for a range that holds 0; scale 1 where the range is empty."""
    scale = (high - low) / LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (-low / scale).round().clamp(0, LEVELS)


def input_codes(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """uint8 codes of x, as float32 whole numbers from 0 to 255."""
    return (x / scale).round_().add_(zero).clamp_(0, LEVELS)


def integer_product(codes: Tensor, weights: Tensor) -> Tensor:
    """Codes [B, in] (whole numbers from -255 to 255) . weights [out, in] (int8) -> int32 [B, out], exactly.

    float32 holds every whole number up to 2^24, so that 512 products at a time are exact in any order of adding; the
    parts are added as integers. On a CPU without integer instructions this is many times faster than integer loops.
    """
    x, w = codes.float(), weights.float()
    total = (x[:, :_EXACT] @ w[:, :_EXACT].t()).to(torch.int32)
    for start in range(_EXACT, x.shape[1], _EXACT):
        part = slice(start, start + _EXACT)
        total += (x[:, part] @ w[:, part].t()).to(torch.int32)
    return total


class Int8Linear(nn.Module):
    """A linear layer in int8. [..., in] float32 -> [..., out] float32.

    activation: (s_x, z_x) for static ranges, None to take those of each row. accumulate: 32, or 16 to emulate 16-bit
    sums with outliers split off; `overflows` then counts the saturated sums of the last call.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    step: Tensor | None  # the scale of the input, as saved files name it
    zero: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        activation: tuple[float, int] | None = None,
        accumulate: int = 32,
        spill: int = SPILL,
    ) -> None:
        super().__init__()
        check("accumulate", accumulate, one_of(16, 32))
        check("spill", spill, whole(2))
        self.out_features, self.in_features = codes.shape
        self.accumulate, self.spill, self.overflows = accumulate, spill, 0
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        step, zero = activation or (None, None)
        self.register_buffer("step", None if step is None else torch.tensor(step, dtype=torch.float32))
        self.register_buffer("zero", None if zero is None else torch.tensor(zero, dtype=torch.int32))

    @property
    def weight(self) -> Tensor:
        """The float32 matrix [out, in] that the codes stand for."""
        return self.codes.float() * self.scale.unsqueeze(1)

    def activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(s_x, z_x) that `x` is read with."""
        if self.step is None or self.zero is None:
            return row_range(x)
        return self.step, self.zero.float()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).float()
        x_scale, zero = self.activation(flat)
        codes = input_codes(flat, x_scale, zero)
        if self.accumulate == 16:
            product = self._sixteen(codes, zero)
        else:
            product = integer_product(codes.sub_(zero), self.codes).float()
        y = product * self.scale * x_scale
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def saturation(self, x: Tensor) -> float:
        """Share of the values of x that lie outside the range they are read with."""
        flat = x.reshape(-1, self.in_features).float()
        x_scale, zero = self.activation(flat)
        exact = (flat / x_scale).round() + zero
        return float(((exact < 0) | (exact > LEVELS)).float().mean())

    def _sixteen(self, codes: Tensor, zero: Tensor) -> Tensor:
        main, outliers = split_outliers(self.codes)
        sums, self.overflows = accumulate_16(codes, main, self.spill)
        exact = (codes - zero) @ outliers.t()
        return (sums - (zero.to(torch.int32) * main.sum(1, dtype=torch.int32))).float() + exact

    def extra_repr(self) -> str:
        kind = "dynamic" if self.step is None else f"static scale {float(self.step):.4g}"
        return f"{self.in_features} -> {self.out_features}, {kind}, {self.accumulate}-bit sums"


def split_outliers(codes: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes as (those within 7 bits, others 0; float32 of the others, the rest 0)."""
    inside = (codes >= _SEVEN_BITS[0]) & (codes <= _SEVEN_BITS[1])
    return torch.where(inside, codes, torch.zeros_like(codes)), torch.where(inside, 0.0, codes.float())


def accumulate_16(codes: Tensor, weights: Tensor, spill: int = SPILL) -> tuple[Tensor, int]:
    """(codes [B, in] (0 to 255) . weights [out, in] (7 bits) through 16 bits: int32 [B, out], saturated sums).

    Pairs of products are added first, then saturating sums of pairs, emptied into 32 bits every `spill` products.
    """
    low, high = torch.iinfo(torch.int16).min, torch.iinfo(torch.int16).max
    pad = codes.shape[1] % 2
    x, w = F.pad(codes, (0, pad)).to(torch.int32), F.pad(weights, (0, pad)).to(torch.int32)
    total = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    part, lost = torch.zeros_like(total), 0
    for place in range(0, x.shape[1], 2):
        pair = x[:, place, None] * w[:, place] + x[:, place + 1, None] * w[:, place + 1]
        for sums in (pair, part.add_(pair.clamp_(low, high))):
            lost += int(((sums < low) | (sums > high)).sum())
        part.clamp_(low, high)
        if (place + 2) % spill == 0:
            total += part
            part.zero_()
    return total + part, lost


class HalfLinear(nn.Module):
    """A linear layer whose weight is float16 or bfloat16 and whose arithmetic is float32."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.detach().to(dtype))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float(), self.bias)


class RowsLinear(nn.Module):
    """A linear layer whose weight is a table's rows: what is left of a layer that was tied to an embedding."""

    bias: Tensor | None

    def __init__(self, stored: StoredRows, bias: Tensor | None) -> None:
        super().__init__()
        self.stored = stored
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stored.weight, self.bias)


def _scale(reach: Tensor) -> Tensor:
    scale = reach / CODES
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale.unsqueeze(1)).round_().clamp_(-CODES, CODES)


def _error(weight: Tensor, scale: Tensor) -> Tensor:
    return (_codes(weight, scale) * scale.unsqueeze(1) - weight).square().sum(1)


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

Range = tuple[float, int]  # scale and zero point of an input with a fixed range
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
        check(f"option of the {self.kind} {self.name}", option, one_of(*self.options))


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


def build(
    model: nn.Module, unit: Unit, option: str, ranges: Range | None = None, quick: bool = False
) -> dict[str, nn.Module]:
    """The modules that take the place of a unit's modules, by path.

    ranges: of the input of an "int8-static" layer. quick: the same shapes without a search for good codes, for values
    that will be replaced. Option fp32 gives no modules. Raises UsageError, for a table too with the row that is broken.
    """
    unit.check(option)
    if option == REFERENCE:
        return {}
    layers = {path: model.get_submodule(path) for path in unit.paths}
    try:
        if unit.kind == "table":
            make = _table_maker(next(m for m in layers.values() if isinstance(m, _Embedding)), option, quick)
        else:
            make = _layer_maker(layers[unit.paths[0]].weight, option, ranges)  # type: ignore[arg-type]
    except UsageError as error:
        raise UsageError(f"{unit.kind} {unit.name}: {error}") from error
    made = {id(layer): make(layer) for layer in {id(layer): layer for layer in layers.values()}.values()}
    return {path: made[id(layer)] for path, layer in layers.items()}


@contextmanager
def swapped(model: nn.Module, *parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with these modules in place, put back afterwards whatever happens."""
    before: list[tuple[str, nn.Module]] = []
    try:
        for part in parts:
            for path, module in part.items():
                before.append((path, model.get_submodule(path)))
                model.set_submodule(path, module)
        yield
    finally:
        for path, module in reversed(before):
            model.set_submodule(path, module)


def replaced_copy(model: nn.Module, *parts: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the model in evaluation mode with these modules in place; what they replace is not copied."""
    memo = {id(model.get_submodule(path)): module for part in parts for path, module in part.items()}
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def unit_digest(model: nn.Module, unit: Unit) -> str:
    """Digest of a unit's weights and biases."""
    tensors = {
        f"{path}.{name}": tensor
        for path in unit.paths
        for name, tensor in model.get_submodule(path).named_parameters(recurse=False)
    }
    return tensors_hash(tensors)


def _table_maker(owner: nn.Module, option: str, quick: bool) -> Callable[[nn.Module], nn.Module]:
    def store(weight: Tensor) -> StoredRows:
        if option == "fp16":
            return StoredRows(Float16Rows(weight.detach().half()))
        bits, method, nbins, ratio, block = _TABLE_FORMS[option]
        method = "minmax" if quick and method == "greedy" else method
        return StoredRows(quantize_rows(weight.detach().float(), bits, method, nbins, ratio, block=block))

    weights = _weights(owner) if isinstance(owner, QREmbeddingBag) else [bag_weight(owner)]  # type: ignore[arg-type]
    stored = [store(weight) for weight in weights]

    def make(module: nn.Module) -> nn.Module:
        if isinstance(module, QREmbeddingBag):
            return RowwiseQuantQRBag(module, *stored)
        if isinstance(module, nn.EmbeddingBag):
            return RowwiseQuantEmbeddingBag.like(module, stored[0])
        if isinstance(module, nn.Embedding):
            return RowwiseQuantEmbedding(stored[0])
        return RowsLinear(stored[0], module.bias)  # type: ignore[arg-type]

    return make


def _layer_maker(weight: Tensor, option: str, ranges: Range | None) -> Callable[[Any], nn.Module]:
    if option not in _INT8_FORMS:
        dtype = torch.bfloat16 if option == "bf16" else torch.float16
        return lambda layer: HalfLinear(weight, layer.bias, dtype)
    fixed = ranges if option.startswith("int8-static") else None
    if fixed is None and option.startswith("int8-static"):
        raise UsageError(f"{option} reads its input in a fixed range; give batches to calibrate it with")
    codes, scale = weight_codes(weight, "l2" if option.endswith("-l2") else "max")
    return lambda layer: Int8Linear(codes, scale, layer.bias, fixed, 16 if option == "int8-acc16" else 32)


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


BINS = 2048
CUTS = 64  # candidates at each end
PSI_BINS = 10
_FLOOR = 1e-4  # share of an empty bin, so that one value in a new place does not make the index infinite


@dataclass(frozen=True)
class Histogram:
    """counts: float64 [2048] of even bins from low to high."""

    low: float
    high: float
    counts: Tensor

    @property
    def centres(self) -> Tensor:
        """Middle of every bin, float64."""
        bins = len(self.counts)
        return self.low + (self.high - self.low) * (torch.arange(bins, dtype=torch.float64) + 0.5) / bins

    def range(self) -> tuple[float, float]:
        """(low, high) with the least expected squared error of 8-bit codes, 0 included, among 64 x 64 cuts."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if low == high:
            return low, high
        there = self.counts > 0
        values, shares = self.centres[there], self.counts[there] / self.counts.sum()
        kept = 1 - torch.arange(CUTS, dtype=torch.float64) / CUTS
        lows = low * kept if low < 0 else torch.zeros(1, dtype=torch.float64)
        highs = high * kept if high > 0 else torch.zeros(1, dtype=torch.float64)
        best = (float("inf"), low, high)
        for candidate in lows.tolist():
            scale, zero = range_parameters(torch.full_like(highs, candidate), highs)
            codes = ((values / scale[:, None]).round_() + zero[:, None]).clamp_(0, LEVELS)
            errors = ((codes - zero[:, None]) * scale[:, None] - values).square_() @ shares
            place = int(errors.argmin())
            best = min(best, (float(errors[place]), candidate, float(highs[place])))
        return best[1], best[2]

    def parameters(self) -> Range:
        """(scale, zero point) of the range, as an int8 layer takes them."""
        low, high = self.range()
        scale, zero = range_parameters(torch.tensor(low), torch.tensor(high))
        return float(scale), int(zero)

    def edges(self, bins: int = PSI_BINS) -> list[float]:
        """Inner edges of bins with near equal shares; fewer where one value takes several of them."""
        shares = self.counts.cumsum(0) / self.counts.sum()
        wanted = torch.arange(1, bins, dtype=torch.float64) / bins
        places = torch.searchsorted(shares, wanted).clamp_max(len(shares) - 1).unique()
        width = (self.high - self.low) / len(self.counts)
        return (self.low + (places.double() + 1) * width).tolist()

    def shares(self, edges: Sequence[float]) -> list[float]:
        """Share of the values between the edges, and beyond both ends."""
        places = torch.searchsorted(torch.tensor(edges, dtype=torch.float64), self.centres)
        found = torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, places, self.counts)
        return (found / found.sum()).tolist()


def population_stability(before: Sequence[float], after: Sequence[float]) -> float:
    """PSI = sum (after - before) ln(after / before) over the shares of bins; above 0.2 is a changed population."""
    old = torch.tensor(before, dtype=torch.float64).clamp_min(_FLOOR)
    new = torch.tensor(after, dtype=torch.float64).clamp_min(_FLOOR)
    return float(((new - old) * (new / old).log()).sum())


def histograms(model: nn.Module, units: Mapping[str, Unit], batches: Iterable[tuple[Any, ...]]) -> dict[str, Histogram]:
    """The inputs of every linear unit over the batches, which are run twice. Raises UsageError when there is none."""
    batches = list(batches)
    if not batches:
        raise UsageError("the calibration data is empty: give at least one batch of the model's arguments")
    watched = {path: unit.name for unit in units.values() if unit.kind == "linear" for path in unit.paths}
    ends: dict[str, tuple[float, float]] = {}
    for name, x in _inputs(model, watched, batches):
        low, high = (float(end) for end in x.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise UsageError(f"the input of {name} holds NaN or infinity during calibration")
        before = ends.get(name, (low, high))
        ends[name] = min(before[0], low), max(before[1], high)
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in ends}
    for name, x in _inputs(model, watched, batches):
        low, high = ends[name]
        width = max(high - low, torch.finfo(torch.float32).tiny)
        places = ((x.double() - low) * (BINS / width)).long().clamp_(0, BINS - 1)
        counts[name] += torch.bincount(places, minlength=BINS).double()
    return {name: Histogram(*ends[name], counts[name]) for name in ends}


@torch.no_grad()
def correct_biases(reference: nn.Module, targets: Mapping[str, nn.Module], batches: Iterable[tuple[Any, ...]]) -> int:
    """Add the mean of (y - y_q) to the bias of low-precision linear layers, in place; how many were corrected.

    targets: path in the reference model -> the layer that takes its place; others than Int8Linear and HalfLinear are
    left alone. y and y_q are both outputs on the reference's inputs. A layer without a bias gets one.
    """
    chosen = {id(m): (path, m) for path, m in targets.items() if isinstance(m, Int8Linear | HalfLinear)}
    layers = dict(chosen.values())
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, _: nn.Module, x: Tensor, y: Tensor) -> None:
        gap = (y - layers[name](x)).reshape(-1, y.shape[-1]).double()
        sums[name] = gap.sum(0) + sums[name] if name in sums else gap.sum(0)
        counts[name] = counts.get(name, 0) + len(gap)

    with hooked(reference, layers, watch):
        _run(reference, list(batches))
    for name, total in sums.items():
        module, shift = layers[name], (total / max(counts[name], 1)).float()
        module.bias = shift if module.bias is None else module.bias + shift
    return len(sums)


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], watch: Any) -> Iterator[None]:
    """Call watch(name, module, first input, output) whenever one of the named modules has run."""
    handles = []
    try:
        for name in names:

            def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                watch(name, module, inputs[0], output)

            handles.append(model.get_submodule(name).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(model: nn.Module, watched: Mapping[str, str], batches: list[tuple[Any, ...]]) -> list[tuple[str, Tensor]]:
    """(unit, flat input) of every run of a watched module."""
    seen: list[tuple[str, Tensor]] = []
    with hooked(model, watched, lambda path, _, x, y: seen.append((watched[path], x.detach().float().reshape(-1)))):
        _run(model, batches)
    return [(name, x) for name, x in seen if x.numel()]


@torch.no_grad()
def _run(model: nn.Module, batches: list[tuple[Any, ...]]) -> None:
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(*batch)
    finally:
        model.train(training)
