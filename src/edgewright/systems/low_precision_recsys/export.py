"""A low-precision model as a file for ONNX Runtime or ExecuTorch, and `edgewright compress` on a folder of clicks.

A DLRM takes the three arrays of `serving` (dense, ids, weights) and gives probabilities. Both files hold the codes of
the tables: bytes are gathered by id and unpacked by arithmetic that is exact in float32, scales in float16 as their two
bytes, so that the vectors equal those of the model bit for bit. Static int8 layers go as QDQ, dynamic ones as packed
weights with rounding in front. ExecuTorch's own embedding kernels know no bias: the rows are re-expressed for them
(symmetric codes) only where the gate still passes with what that changes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, one_of
from edgewright.errors import FormatError, Unsupported, UsageError
from edgewright.export.executorch.exporter import ExecuTorchExport, export_executorch
from edgewright.export.onnx.exporter import OnnxExport, export_onnx
from edgewright.io.json_file import read_object
from edgewright.io.packed import PackedEmbedding, PackedLinear, PackedTensor
from edgewright.io.row_codes import PackedRows
from edgewright.io.run_folder import claim_folder
from edgewright.quantization.config import ActivationConfig
from edgewright.systems.dlrm.click_log import Vocabulary, read_chunks
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.dlrm.model import (
    CONFIG,
    DLRM,
    MODEL_TYPE,
    quotient_vectors,
)
from edgewright.systems.dlrm.serving import DLRMProgram, checked_format, checked_slots, example_inputs
from edgewright.systems.low_precision_recsys.gate import AccuracyGate, Examples, Judgement, as_examples, logits
from edgewright.systems.low_precision_recsys.model import QuantizedModel, apply_recipe, choices_report, uniform_recipe
from edgewright.systems.low_precision_recsys.precision_search import search
from edgewright.systems.low_precision_recsys.tables import (
    CodebookRows,
    Float16Rows,
    RowwiseQuantEmbedding,
    RowwiseQuantEmbeddingBag,
    RowwiseQuantQRBag,
    StoredRows,
)
from edgewright.systems.low_precision_recsys.units import HalfLinear, Int8Linear, RowsLinear, input_codes, row_range

if TYPE_CHECKING:
    from edgewright.measure.report import Report
    from edgewright.systems.dlrm.clicks import ClickData


CANDIDATES = 20  # scales that a symmetric row is tried with


class PackedGather(nn.Module):
    """The vector of every id, from packed rows: int64 [...] -> float32 [..., dim]."""

    packed: Tensor
    ends: Tensor | None

    def __init__(self, rows: PackedRows) -> None:
        super().__init__()
        self.bits, self.dim = rows.bits, rows.dim
        wide = rows.bits == 8  # whose scale and bias are float32; below, they are decoded from the row's bytes
        self.width = rows.packed.shape[1] - (8 if wide else 4)
        self.register_buffer("packed", rows.packed[:, : self.width].contiguous() if wide else rows.packed)
        self.register_buffer("ends", rows.scale_bias() if wide else None)
        self.decode = None if wide else Float16Decode()

    def forward(self, ids: Tensor) -> Tensor:
        data = self.packed[ids].float()
        if self.ends is not None:
            ends = self.ends[ids]
        else:
            data, last = data.split([self.width, 4], -1)
            ends = self.decode(last)  # type: ignore[misc]
        scale, bias = ends.split(1, -1)
        return unpacked(data, self.bits, self.dim) * scale + bias


class CodebookGather(nn.Module):
    """The same from codebooks."""

    codes: Tensor
    books: Tensor

    def __init__(self, rows: CodebookRows) -> None:
        super().__init__()
        self.block, self.dim, self.decode = rows.block, rows.dim, Float16Decode()
        self.register_buffer("codes", rows.packed)
        self.register_buffer("books", half_bytes(rows.books))

    def forward(self, ids: Tensor) -> Tensor:
        codes = unpacked(self.codes[ids].float(), 4, self.dim).long()
        books = self.decode(self.books[torch.div(ids, self.block, rounding_mode="floor")].float())
        return books.gather(-1, codes)


class Float16Gather(nn.Module):
    """The same from rows in float16."""

    rows: Tensor

    def __init__(self, rows: Float16Rows) -> None:
        super().__init__()
        self.decode = Float16Decode()
        self.register_buffer("rows", half_bytes(rows.packed))

    def forward(self, ids: Tensor) -> Tensor:
        return self.decode(self.rows[ids].float())


class Float16Decode(nn.Module):
    """float16 from its bytes, by arithmetic that is exact in float32 (finite values): [..., 2 k] -> [..., k].

    Exporters that take float32 only, and runtimes without float16, then hold rows in two bytes a value all the same.
    """

    powers: Tensor

    def __init__(self) -> None:
        super().__init__()
        exponents = torch.arange(32).clamp_min(1) - 25  # of the last bit of the fraction; 0 stands for subnormals
        self.register_buffer("powers", torch.pow(2.0, exponents.float()))

    def forward(self, data: Tensor) -> Tensor:
        low, high = data.reshape(*data.shape[:-1], -1, 2).split(1, -1)
        negative = torch.floor(high / 128)
        rest = high - negative * 128
        exponent = torch.floor(rest / 4)
        fraction = (rest - exponent * 4) * 256 + low + exponent.clamp(0, 1) * 1024
        value = fraction * self.powers[exponent.long()] * (1 - 2 * negative)
        return value.squeeze(-1)


def half_bytes(values: Tensor) -> Tensor:
    """float16 [..., k] as uint8 [..., 2 k], the low byte first."""
    return values.contiguous().view(torch.uint8)


def unpacked(data: Tensor, bits: int, dim: int) -> Tensor:
    """Bytes [..., b] as float whole numbers -> codes [..., dim], by arithmetic that is exact in float32."""
    if bits == 8:
        return data
    parts = []
    for _ in range(8 // bits):
        rest = torch.floor(data / 2**bits)
        parts.append(data - rest * 2**bits)
        data = rest
    return torch.stack(parts, -1).flatten(-2)[..., :dim]


def gathered(stored: StoredRows) -> nn.Module:
    """The rows as they are. Raises Unsupported for tables with rows kept in float16."""
    rows = stored.rows
    if isinstance(rows, PackedRows):
        return PackedGather(rows)
    if isinstance(rows, CodebookRows):
        return CodebookGather(rows)
    if isinstance(rows, Float16Rows):
        return Float16Gather(rows)
    raise Unsupported("a table with rows kept in float16 beside its codes cannot be written for a runtime")


def symmetric(stored: StoredRows) -> nn.Module:
    """The rows for ExecuTorch's embedding kernels, which know no bias: value = scale x code, a scale a row.

    Of 20 scales the one with the least squared error; float16 rows and codebooks of 4 bits are written as they are.
    """
    rows = stored.rows
    if not isinstance(rows, PackedRows) or (rows.dim * rows.bits) % 8:
        return gathered(stored)
    values = rows.dequantize()
    low, high = -(2 ** (rows.bits - 1)), 2 ** (rows.bits - 1) - 1
    reach = values.abs().amax(1, keepdim=True)
    best = torch.where(reach > 0, reach / high, torch.ones_like(reach))
    least = torch.full_like(best, float("inf"))
    codes = torch.zeros_like(values)
    for place in range(CANDIDATES):
        scale = torch.where(reach > 0, reach / high * (1 - place / (2 * CANDIDATES)), torch.ones_like(reach))
        tried = (values / scale).round_().clamp_(low, high)
        error = (tried * scale - values).square_().sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        codes = torch.where(better, tried, codes)
    return PackedEmbedding(PackedTensor(codes.to(torch.int8), best, f"int{rows.bits}"))


Vectors = Callable[[StoredRows], nn.Module]  # int64 [...] -> float32 [..., dim]


class PortableBag(nn.Module):
    """Bags of a fixed width as lookup, mask and sum. ids [B, m] (with weights [B, m]) -> [B, dim]."""

    def __init__(self, bag: RowwiseQuantEmbeddingBag, vectors: nn.Module) -> None:
        super().__init__()
        if bag.mode == "max":
            raise Unsupported("a bag with mode='max' cannot be written for a runtime; sum and mean can")
        self.vectors, self.mode, self.padding_idx = vectors, bag.mode, bag.padding_idx

    def forward(self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if offsets is not None or ids.ndim != 2:
            raise Unsupported("an exported bag takes ids [batch, width] without offsets; pad the bags")
        there = torch.ones_like(ids) if self.padding_idx is None else (ids != self.padding_idx).long()
        mask = there.float() if weights is None else there.float() * weights
        sums = (self.vectors(ids) * mask.unsqueeze(-1)).sum(1)
        return sums if self.mode == "sum" else sums / there.sum(1, keepdim=True).clamp_min(1).float()


class PortableQR(nn.Module):
    """Vectors of a table as quotient and remainder: int64 [...] -> [..., d]."""

    def __init__(self, bag: RowwiseQuantQRBag, quotient: nn.Module, remainder: nn.Module) -> None:
        super().__init__()
        self.collisions, self.combine = bag.collisions, bag.combine
        self.quotient, self.remainder = quotient, remainder

    def vectors(self, ids: Tensor) -> Tensor:
        return quotient_vectors(ids, self.collisions, self.combine, self.quotient, self.remainder)


class RoundedRows(nn.Module):
    """The dynamic 8-bit rounding of a layer's input. Its `config` tells ExecuTorch that its kernel does the same."""

    config = ActivationConfig(bits=8, granularity="token", symmetric=False)

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = row_range(x)
        return (input_codes(x, scale, zero) - zero) * scale


class StaticLinear(nn.Module):
    """An int8 layer with a fixed input range, by torch's fake quantisation: exporters place its codes as they are."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    zeros: Tensor

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        assert layer.step is not None and layer.zero is not None
        self.step, self.zero = float(layer.step), int(layer.zero)
        self.register_buffer("weight", layer.weight)
        self.register_buffer("scale", layer.scale)
        self.register_buffer("zeros", torch.zeros_like(layer.scale, dtype=torch.int32))
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, 0, 255)
        weight = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zeros, 0, -127, 127)
        return F.linear(x, weight, self.bias)


def portable(model: nn.Module, vectors: Vectors = gathered) -> nn.Module:
    """A copy of a low-precision model with every module of ours in portable operators. Raises Unsupported."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, RowwiseQuantEmbeddingBag):
            memo[id(module)] = PortableBag(module, vectors(module.stored))
        elif isinstance(module, RowwiseQuantEmbedding):
            memo[id(module)] = vectors(module.stored)
        elif isinstance(module, RowwiseQuantQRBag):
            memo[id(module)] = PortableQR(module, vectors(module.quotient), vectors(module.remainder))
        elif isinstance(module, Int8Linear):
            memo[id(module)] = _int8(module)
        elif isinstance(module, HalfLinear):
            memo[id(module)] = _plain(module.weight.float(), module.bias)
        elif isinstance(module, RowsLinear):
            memo[id(module)] = _plain(module.stored.weight, module.bias)
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def _int8(layer: Int8Linear) -> nn.Module:
    if layer.accumulate != 32:
        raise Unsupported("16-bit accumulation is emulated to predict it; no runtime here computes so")
    if layer.step is not None:
        return StaticLinear(layer)
    packed = PackedTensor(layer.codes, layer.scale.unsqueeze(1), "int8")
    return PackedLinear(packed, layer.bias, RoundedRows())


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


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
) -> OnnxExport | ExecuTorchExport:
    """Write the file; it is run and compared before it gets its name.

    Args:
        model: what `apply_recipe` returned.
        path: of the file, .onnx or .pte.
        format: "onnx" or "executorch", as the suffix.
        slots: of a DLRM, the longest bag of each table, by default `max_bag` for all.
        max_bag: longest bag of any table.
        inputs: of any other model, example arguments with the batch first (ids of bags are [batch, width]).
        gate: with `reference` and `data`, ExecuTorch's kernels get symmetric rows where the gate passes; without them
            rows stay as they are.
        reference: the float model, from which `checks["original"]` says how far the file is.
        data: labelled clicks.

    Returns:
        What `export_onnx` or `export_executorch` return, `notes` saying how rows are held.

    Raises:
        UsageError: a path, format or slots that do not go together.
        Unsupported: what no runtime has: bags in mode "max", rows kept in float16, 16-bit accumulation.
    """
    path = Path(path)
    checked_format(path, format)
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
        tables = len(model.module.tables)
        widths = checked_slots([max_bag] * tables if slots is None else slots, tables)
        program: nn.Module = DLRMProgram(portable(model.module, vectors), widths).eval()  # type: ignore[arg-type]
        example = example_inputs(model.module, widths)
        names: tuple[str, ...] | None = ("dense", "ids", "weights")
        original = DLRMProgram(reference, widths).eval() if isinstance(reference, DLRM) else None
    else:
        program, example, names = portable(model.module, vectors), tuple(inputs or ()), None
    if format == "onnx":
        rounds = any(isinstance(m, Int8Linear) for m in model.module.modules())
        done: OnnxExport | ExecuTorchExport = export_onnx(
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


BUDGET = 5e-4  # of normalised entropy
FILES = {"onnx": "model.onnx", "pte": "model.pte", "executorch": "model.pte"}


def click_folder(model: str) -> Path | None:
    """The folder with a click model's config.json: `model` itself or its model/; None where there is none."""
    for folder in (Path(model), Path(model) / "model"):
        try:
            if read_object(folder / CONFIG).get("model_type") == MODEL_TYPE:
                return folder
        except (UsageError, FormatError):
            continue
    return None


def compress_clicks(
    folder: Path,
    log: str | Path,
    output: Path,
    *,
    budget: float = BUDGET,
    targets: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Search, apply, save and report; the report is in `output` as well, beside model/ and the files asked for.

    log: rows that the model was not trained on, in the layout of its vocabulary; the earlier half is searched on, the
    later half confirms and is what the report tells. The same call goes on where it was stopped.
    """
    for target in targets:
        check("--to of a click model", target, one_of(*FILES))
    claim_folder(output, "compress")
    model = DLRM.from_pretrained(folder).eval()
    early, late = read_clicks(folder, log).split(0.5)
    say(f"{len(early)} rows to search on, {len(late)} to confirm with")
    gate = AccuracyGate(budget=budget)
    recipe = search(model, early, gate, log=output / "search", confirm=late, say=say)
    recipe.save(output / "recipe.json")
    low = apply_recipe(model, recipe)
    low.save_pretrained(output / "model")
    recipes = {"searched": recipe, "all int8": uniform_recipe(model, "int8", "int8-dynamic")}
    recipes["all int4"] = uniform_recipe(model, "int4-greedy", "int8-dynamic")
    report = choices_report(model, late, recipes, gate, calibration=early.rows(slice(0, 4096)), title=folder.name)
    report.settings.update({"model": str(folder), "data": str(log), "budget": budget})
    units = ", ".join(f"{name} {option}" for name, option in recipe.assignment.items())
    report.notes += [f"searched: {units}", *recipe.about["notes"]]
    for name in dict.fromkeys(FILES[target] for target in targets):
        done = export_quantized(low, output / name, "onnx" if name.endswith(".onnx") else "executorch", reference=model)
        distance = done.checks["original"]["relative_error"]
        report.notes.append(
            f"{name}: {done.bytes / 1e6:.2f} MB, {done.notes[-1]}; its answers differ from the float ones by "
            f"{distance:.3g} of their spread"
        )
    report.save(output)
    return report


def read_clicks(folder: Path, log: str | Path) -> ClickData:
    """A click log as the model's own vocabulary reads it. Raises UsageError for fewer than four rows."""
    vocabulary = Vocabulary.from_pretrained(folder)
    parts = [vocabulary.encode(chunk) for chunk in read_chunks(log, vocabulary.layout)]
    if sum(len(part) for part in parts) < 4:
        raise UsageError(f"{log} has too few rows to judge a model by; give some thousands that it was not trained on")
    dense, ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("dense", "ids", "labels"))
    return dataclasses.replace(parts[0], dense=dense, ids=ids, labels=labels)
