"""`export_gguf`: a model as a GGUF file for llama.cpp, verified.

Plan (which type for which tensor, and why), write to a temporary file, read back and run (`gguf_proof`), rename. A file
that does not decode to the model, or does not answer like it, never takes its final name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgewright.checks import check, one_of, optional
from edgewright.errors import CheckFailed, UsageError
from edgewright.export.gguf import ggml
from edgewright.export.gguf.blocks import TYPE_IDS, Array
from edgewright.export.gguf.encode import encode
from edgewright.export.gguf.families import native_form, writer
from edgewright.export.gguf.layout import (
    EMBEDDING_TYPES,
    FLOAT_TYPES,
    LayoutRow,
    check_layout,
    layout_row,
    plan_float,
    plan_packed,
    print_table,
)
from edgewright.export.gguf.metadata import file_type, model_metadata, rope_divisors, tokenizer_metadata
from edgewright.export.gguf.tensors import ModelTensor, model_tensors
from edgewright.export.gguf.verify import AGREEMENT, check_runs, check_tensors
from edgewright.export.gguf.writer import TensorSource, write_gguf
from edgewright.export.original import Original, comparison
from edgewright.io.atomic import atomic_file
from edgewright.io.end_tokens import end_tokens
from edgewright.io.gguf.families import ROPE_FACTORS
from edgewright.measure.progress import ProgressBar
from edgewright.runtime.child_check import GGUF_RUN, vouch

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TABLES = ("token_embd.weight", "output.weight")
CACHE_TYPES = {4: "q4_0", 8: "q8_0"}


@dataclass(frozen=True)
class GGUFExport:
    """A finished file. table: one row a tensor. bytes: of the file. checks: results, empty without `verify`."""

    path: Path
    table: tuple[LayoutRow, ...]
    bytes: int
    checks: dict[str, Any] = field(default_factory=dict)
    layout: str = "auto"

    @property
    def sidecar(self) -> Path:
        """The JSON file beside it: layout, checks and command lines."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors, scales included."""
        return 8 * sum(row.bytes for row in self.table) / sum(row.weights for row in self.table)

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "layout": self.layout,
            "checks": self.checks,
            "table": [row.to_dict() for row in self.table],
        }

    def print(self, console: Console | None = None, every: bool = False) -> None:
        """The layout table on screen, one line for each kind of tensor or, with `every`, for each tensor."""
        print_table(self.table, console, every)


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    layout: str = "auto",
    strict: bool = True,
    verify: bool = True,
    float_type: str = "F16",
    embedding: str = "Q8_0",
    kv: Any = None,
    threshold: float = AGREEMENT,
    progress: bool = True,
    original: Original | None = None,
) -> GGUFExport:
    """Write a converted (or plain) causal language model to `path` and verify it.

    Args:
        model: of transformers, or an EdgeDecoder.
        tokenizer: its tokenizer, which travels inside the file.
        path: ends in .gguf; `path`.json is written beside it. Both appear, or neither.
        layout: "auto", "portable", "small" or "fast", see `export.gguf.layout`.
        strict: a tensor that cannot have the type its layout wants is an error instead of a marked row.
        verify: decode every tensor again with three decoders and run the file against PyTorch (needs xllamacpp).
        float_type: "F16" or "F32" for matrices that are not quantised.
        embedding: "Q8_0", "F16" or "F32" for embedding tables that are not quantised; Q8_0 rounds, and the file is then
            compared with the rounded table.
        kv: 4 or 8 (or a KVConfig of that width) to run and recommend the file with a quantised cache.
        threshold: least top-1 agreement with PyTorch, from 0 to 1.
        progress: show a progress bar.
        original: the float model before quantisation, or a function from ids [1, T] to its logits [1, T, V];
            `checks["original"]` then says how far the file is from it (see `export.original`), with a UserWarning where
            that is further than a guess. A model without quantised weights is its own original, and the file must not
            be that far away.

    Returns:
        Path, type and size of every tensor, and what the checks measured.

    Raises:
        UsageError: settings that cannot work.
        Unsupported: an architecture, layer or tokenizer.
        CheckFailed: a departure under strict, or a failed verification.
        OutputError: the files could not be written.
        MissingPackage: verification without the extra `llamacpp`.
    """
    path = Path(path)
    kv = getattr(kv, "bits", kv)
    check_settings(path, layout, float_type, embedding, kv)
    given, model = model, native_form(model)
    tensors = model_tensors(model)
    if plain := not any(tensor.is_packed for tensor in tensors):
        original = given if original is None else original
    metadata = {
        **model_metadata(model, path.stem),
        **tokenizer_metadata(tokenizer, tensor_rows(tensors), end_tokens(model, tokenizer)),
    }
    rows = plan(tensors, layout, float_type, embedding)
    departures = [row for row in rows if row.departure]
    if departures and strict:
        first = departures[0]
        raise CheckFailed(
            f"{len(departures)} of {len(rows)} tensors cannot have their type in layout {layout!r}, the first is "
            f"{first.tensor}: {first.wanted} wanted, {first.written} possible ({first.why}); "
            "strict=False writes the file with these departures marked"
        )
    return write_and_prove(
        model,
        tokenizer,
        path,
        metadata,
        tensors,
        rows,
        layout,
        kv=kv,
        verify=verify,
        threshold=threshold,
        progress=progress,
        compare=None if original is None else comparison(original, path.name, plain),
    )


def llama_cpp_quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    type: str = "Q4_0",
    progress: bool = True,
) -> GGUFExport:
    """The peer: an unquantised model in the file that llama.cpp's own quantiser would write (no importance matrix).

    type: "Q4_0", "Q4_1", "Q5_0", "Q5_1" or "Q8_0". Every matrix goes through `ggml_quantize_chunk` of the installed
    library with llama.cpp's default choice for each tensor, so the tensors are its bytes. Writes `path` and its JSON.
    """
    path = Path(path)
    check_settings(path)
    check("type", type, one_of(*ggml.PEER_TYPES))
    model = native_form(model)
    tensors = model_tensors(model)
    quantized = [tensor.name for tensor in tensors if tensor.is_packed]
    if quantized:
        raise UsageError(f"llama_cpp_quantize needs float weights, but {quantized[0]} is quantised; use export_gguf")
    metadata = {
        **model_metadata(model, path.stem),
        **tokenizer_metadata(tokenizer, tensor_rows(tensors), end_tokens(model, tokenizer)),
    }
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    rows = []
    for tensor in tensors:
        values = tensor.values()
        written, why = ggml.default_type(tensor.name, values.shape, type, tied)
        rows.append(layout_row(tensor.name, values.shape, "float32", type, written, why, lossless=written == "F32"))
    return write_and_prove(model, tokenizer, path, metadata, tensors, rows, f"llama.cpp {type}", progress=progress)


def write_and_prove(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    metadata: dict[str, tuple[str, Any]],
    tensors: Sequence[ModelTensor],
    rows: Sequence[LayoutRow],
    layout: str,
    *,
    kv: int | None = None,
    verify: bool = False,
    threshold: float = AGREEMENT,
    progress: bool = True,
    compare: Callable[[list[int], Tensor], dict[str, Any]] | None = None,
) -> GGUFExport:
    """The second half of `export_gguf`: everything after the decisions."""
    if verify:
        from edgewright.runtime.llamacpp_library import library

        library()  # a missing package is said before the work, not after
    metadata["general.file_type"] = (
        "u32",
        file_type([(row.written, row.weights) for row in rows if len(row.shape) > 1]),
    )
    sources = [_source(tensor, row) for tensor, row in zip(tensors, rows, strict=True)]
    divisors = rope_divisors(model.config)
    if divisors is not None:
        sources.insert(0, TensorSource(ROPE_FACTORS, divisors.shape, TYPE_IDS["F32"], lambda: divisors.view("u1")))
    finished = path.with_name(path.name + ".json")
    steps = len(sources) + (len(tensors) + 2 if verify else 0)
    bar = ProgressBar(f"writing {path.name}", steps, shown=progress)
    with atomic_file(path) as temporary, atomic_file(finished) as notes, bar:
        with torch.no_grad():
            write_gguf(temporary, metadata, _ahead(sources), lambda _: bar.advance())
            checks: dict[str, Any] = {}
            if verify:
                checks = check_tensors(temporary, tensors, rows, lambda: bar.advance(facts="decoding every tensor"))
                bar.advance(facts="running it in llama.cpp")
                cache = CACHE_TYPES.get(kv or 0)
                checks |= check_runs(temporary, model, tokenizer, tensors, rows, cache, threshold, compare)
                bar.advance()
        export = GGUFExport(path, tuple(rows), temporary.stat().st_size, checks, layout)
        notes.write_text(json.dumps(_notes(export, kv), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    vouch(*GGUF_RUN, path)
    return export


def plan(
    tensors: Sequence[ModelTensor], layout: str, float_type: str = "F16", embedding: str = "Q8_0"
) -> list[LayoutRow]:
    """The layout table of a model: one row a tensor, in file order."""
    rows = []
    for tensor in tensors:
        packed = tensor.packed
        if packed is not None:
            row = plan_packed(tensor.name, packed, layout)
            if tensor.experts:
                row = replace(row, shape=(tensor.experts, row.shape[0] // tensor.experts, row.shape[1]))
            rows.append(row)
            continue
        values = tensor.values()
        if values.ndim == 1:
            rows.append(plan_float(tensor.name, values, "F32", fixed="llama.cpp keeps vectors in float32"))
        else:
            rows.append(plan_float(tensor.name, values, embedding if tensor.name in TABLES else float_type))
    return rows


def check_exportable(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise what `export_gguf` would raise for the class of the model or its tokenizer, without writing anything."""
    model = native_form(model)
    writer(model)
    tokenizer_metadata(tokenizer, model.config.vocab_size, end_tokens(model, tokenizer))


def tensor_rows(tensors: Sequence[ModelTensor]) -> int:
    """Rows of the embedding table: the vocabulary of the file."""
    table = next(tensor for tensor in tensors if tensor.name == TABLES[0])
    stored: Any = table.module.codes if table.is_packed else table.module.weight
    return int(stored.shape[0])


def check_settings(
    path: Path, layout: str = "auto", float_type: str = "F16", embedding: str = "Q8_0", kv: int | None = None
) -> None:
    """Raise UsageError for a setting that export_gguf does not know."""
    if path.suffix != ".gguf":
        raise UsageError(f"the output {str(path)!r} must end in .gguf, for example {path.stem or 'model'}.gguf")
    check_layout(layout)
    check("float_type", float_type, one_of(*FLOAT_TYPES))
    check("embedding", embedding, one_of(*EMBEDDING_TYPES))
    check("kv", kv, optional(one_of(*CACHE_TYPES)), "llama.cpp's quantised caches have 4 or 8 bits")


def command_lines(path: Path, kv: int | None) -> dict[str, str]:
    """Ready-made llama.cpp commands for the file."""
    cache = f" -ctk {CACHE_TYPES[kv]} -ctv {CACHE_TYPES[kv]} -fa on" if kv else ""
    return {"chat": f"llama-cli -m {path.name}{cache}", "serve": f"llama-server -m {path.name}{cache}"}


def _notes(export: GGUFExport, kv: int | None) -> dict[str, Any]:
    holds: dict[str, int] = {}
    for row in export.table:
        holds[row.holds] = holds.get(row.holds, 0) + row.weights
    described = {**export.to_dict(), "path": export.path.name}
    return {
        "format": "edgewright gguf export 1",
        "quantization": {"weights": holds, "kv_cache_bits": kv},
        "commands": command_lines(export.path, kv),
        **described,
    }


def _source(tensor: ModelTensor, row: LayoutRow) -> TensorSource:
    return TensorSource(row.tensor, row.shape, TYPE_IDS[row.written], lambda: encode(tensor, row))


def _ahead(sources: Sequence[TensorSource]) -> list[TensorSource]:
    """The same tensors, each one's bytes prepared in a second thread while the one before it is written."""
    pool = ThreadPoolExecutor(max_workers=1)
    pending: dict[int, Any] = {}

    def data(index: int) -> Array:
        for following in (index, index + 1):
            if following < len(sources) and following not in pending:
                pending[following] = pool.submit(torch.no_grad()(sources[following].data))
        result: Array = pending.pop(index).result()
        pending[index] = None
        if index + 1 == len(sources):
            pool.shutdown()
        return result

    return [
        TensorSource(source.name, source.shape, source.type_id, lambda index=index: data(index))  # type: ignore[misc]
        for index, source in enumerate(sources)
    ]
