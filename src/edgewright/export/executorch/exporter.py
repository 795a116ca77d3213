"""`export_executorch`: a model as a .pte file for ExecuTorch's XNNPACK backend, verified.

Packed layers keep their codes (`executorch_layers`), statically quantised networks theirs (`executorch_static`),
language models get a cache and one program for prompt and decoding (`executorch_language`), everything that XNNPACK
knows is delegated to it and the rest is named. The file is written under a temporary name, loaded, run and compared
with PyTorch, and only then gets its own name.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, number, one_of
from edgewright.errors import CheckFailed, EdgewrightError, Unsupported, UsageError, in_one_line
from edgewright.export.executorch.language import check_language_model, export_language, is_language_model
from edgewright.export.executorch.layers import TABLES, import_executorch, prepare
from edgewright.export.executorch.lowering import Delegation, lower, quiet
from edgewright.export.executorch.sizes import stored_bytes, stored_weights
from edgewright.export.executorch.static import FakeQuantizationTrace, Placed, has_fake_quantization, place_codes_
from edgewright.export.executorch.verify import check_language, check_program, flat_outputs
from edgewright.export.original import Original, comparison, output_distance
from edgewright.io.atomic import atomic_file
from edgewright.io.packed import PackedEmbedding, PackedLinear
from edgewright.io.pte import share_segments
from edgewright.protocols import HasExecuTorchForm
from edgewright.runtime.pte_metadata import language_metadata, program_metadata

if TYPE_CHECKING:
    from torch.export import ExportedProgram

MIN_DELEGATED = 0.5
CONTEXT = 1024


@dataclass(frozen=True)
class ExecuTorchExport:
    """A finished file. parts: bytes of codes, steps and float weights by arithmetic, each shared table once.

    static: of a network with fixed scales, layers whose weights are int8 codes and activations that are rounded.
    """

    path: Path
    bytes: int
    delegation: Delegation
    parts: dict[str, int]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    checks: dict[str, Any] = field(default_factory=dict)
    static: dict[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Bytes of the file over those of its parts."""
        return self.bytes / max(sum(self.parts.values()), 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "parts": self.parts,
            "delegated": self.delegation.delegated,
            "nodes": self.delegation.total,
            "not_delegated": self.delegation.kept,
            "static": self.static,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "checks": self.checks,
        }

    def summary(self) -> list[str]:
        """What a person wants to read, a line each."""
        kept = ", ".join(f"{count} {name}" for name, count in self.delegation.kept.items()) or "none"
        lines = [
            f"{self.path}: {self.bytes / 1e6:.1f} MB, {self.ratio:.3f} times its parts",
            f"delegated to XNNPACK: {self.delegation.share:.0%} of {self.delegation.total} nodes; not: {kept}",
        ]
        if self.static:
            layers, activations = self.static["layers"], self.static["activations"]
            lines.append(f"static int8: {layers} layers as codes, {activations} activations rounded")
        if self.checks:
            lines.append("verified: " + ", ".join(f"{key} {value}" for key, value in self.checks.items()))
        return lines + [f"note: {note}" for note in self.notes]


def export_executorch(
    model: nn.Module | ExportedProgram,
    tokenizer: Any,
    path: str | Path,
    *,
    example_inputs: Sequence[Tensor] | None = None,
    context: int | None = None,
    embedding: str = "auto",
    dynamic_batch: bool = False,
    min_delegated: float = MIN_DELEGATED,
    verify: bool = True,
    original: Original | None = None,
) -> ExecuTorchExport:
    """Write `model` (float or converted) as `path` (.pte) and verify that the file computes what the model computes.

    Where the model calls torch.fake_quantize_* with fixed scales (what `convert_static` gives), XNNPACK computes in
    integers with exactly those codes and scales.

    Args:
        model: a causal language model of transformers gets a static key-value cache, and its tokenizer travels inside
            the file. Any other module is traced with `example_inputs`. A finished ExportedProgram is lowered as it is.
        tokenizer: of a language model; None: the file takes and gives token ids only.
        path: ends in .pte.
        example_inputs: of any other module, the batch first.
        context: tokens of the static cache; default 1024, or as many as the model knows.
        embedding: what becomes of token table and head. "auto": their codes as they are where a kernel holds them;
            grouped 8-bit codes of a head, which XNNPACK lacks, and the float table of an otherwise packed model are
            rounded to 8 bits per row, and `notes` says so. "exact": refuse instead. "int8": round a float table too.
            "float": leave it.
        dynamic_batch: leave the first axis of `example_inputs` free.
        min_delegated: least share of graph nodes that XNNPACK must take, from 0 to 1.
        verify: run the file and compare it with the model.
        original: the float model before quantisation; `checks["original"]` then says how far the file is from it (see
            `export.original`). A language model without quantised weights is its own original.

    Returns:
        Path, sizes, what was delegated, checks and notes.

    Raises:
        CheckFailed: too little was delegated, or the file computes something else.
        Unsupported: an operator, named with its module, or a layer that cannot be lowered.
        UsageError: arguments that cannot work.
        MissingPackage: without the extra `executorch`.
        OutputError: the file could not be written.
    """
    path = Path(path)
    check_arguments(path, embedding, min_delegated)
    import_executorch()
    if isinstance(model, HasExecuTorchForm):
        model = model.for_executorch()
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    exported, prepared, notes, metadata, inputs = _traced(
        model, tokenizer, example_inputs, context, embedding, dynamic_batch
    )
    placed = Placed()
    if has_fake_quantization(exported):
        own: Any = copy.deepcopy(exported) if exported is model else exported
        placed, exported = place_codes_(own), own
        notes = [*notes, *placed.notes]
    static = {"layers": placed.layers, "activations": placed.activations} if placed.activations else {}
    if static:
        metadata["weights"] = {"count": placed.weights, "bytes": sum(placed.parts.values())}
    else:
        metadata["weights"] = stored_weights(prepared)
    if not metadata["weights"]["count"]:
        del metadata["weights"]
    seconds["trace"] = round(time.perf_counter() - started, 2)
    started = time.perf_counter()
    program, delegation = lower(exported, metadata)
    seconds["lower"] = round(time.perf_counter() - started, 2)
    if delegation.share < min_delegated:
        kept = ", ".join(f"{count} {name}" for name, count in delegation.kept.items())
        raise CheckFailed(
            f"XNNPACK takes only {delegation.share:.0%} of {delegation.total} nodes ({min_delegated:.0%} needed); "
            f"it does not take {kept}"
        )
    with atomic_file(path) as temporary:
        with temporary.open("wb") as file:
            program.write_to_file(file)
        del program
        share_segments(temporary)
        checks: dict[str, Any] = {}
        if verify:
            started = time.perf_counter()
            if inputs is None:
                language: Any = model
                plain = not any(isinstance(m, PackedLinear | PackedEmbedding) for m in language.modules())
                original = language if original is None and plain else original
                compare = None if original is None else comparison(original, path.name, plain)
                checks = check_language(temporary, prepared, model, tokenizer, compare)
            else:
                integers = placed.activations > 0
                checks = check_program(
                    temporary, prepared, inputs, dynamic_batch, integers, _program_comparison(original, path)
                )
            seconds["verify"] = round(time.perf_counter() - started, 2)
        size = temporary.stat().st_size
    parts = placed.parts if static else stored_bytes(prepared) if isinstance(prepared, nn.Module) else {}
    return ExecuTorchExport(path, size, delegation, parts, seconds, tuple(notes), checks, static)


def _traced(
    model: Any,
    tokenizer: Any,
    example_inputs: Sequence[Tensor] | None,
    context: int | None,
    embedding: str,
    dynamic: bool,
) -> tuple[Any, Any, list[str], dict[str, Any], tuple[Tensor, ...] | None]:
    """(exported program, what to compare with, notes, metadata, example inputs or None for a language model)."""
    from torch.export import ExportedProgram

    if isinstance(model, ExportedProgram):
        example = model.example_inputs[0] if example_inputs is None and model.example_inputs else example_inputs
        inputs = _inputs(example, model)
        return model, model.module(), [], program_metadata(inputs, False), inputs
    if is_language_model(model) and example_inputs is None:
        if context is None:
            context = min(CONTEXT, getattr(model.config, "max_position_embeddings", None) or CONTEXT)
        check_language_model(model, context)  # type: ignore[arg-type]
        metadata = language_metadata(model, tokenizer, context)
        prepared, notes = prepare(model, embedding)
        exported = _guarded(model, lambda: export_language(prepared, context))  # type: ignore[arg-type]
        return exported, prepared, notes, metadata, None
    inputs = _inputs(example_inputs, model)
    prepared, notes = prepare(model, embedding)
    shapes = None
    if dynamic:
        batch = torch.export.Dim("batch", min=1, max=1024)
        shapes = tuple({0: batch} for _ in inputs)
        inputs = tuple(value if len(value) > 1 else torch.cat([value, value]) for value in inputs)

    def trace() -> Any:
        with torch.no_grad():
            return torch.export.export(
                _Plain(prepared), inputs, dynamic_shapes=(shapes,) if shapes else None, strict=False
            )

    return _guarded(model, trace), prepared, notes, program_metadata(inputs, dynamic), inputs


class _Plain(nn.Module):
    """A module whose outputs are a flat tuple of tensors, whatever container the model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return flat_outputs(self.model(*inputs))


def _program_comparison(original: Any, path: Path) -> Any:
    """A function from (inputs, the file's outputs) to their distance from the original's outputs; None without one."""
    if original is None:
        return None

    def compare(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, Any]:
        return output_distance(flat_outputs(original(*inputs)), outputs, path.name)

    return compare


def _guarded(model: nn.Module, trace: Any) -> Any:
    try:
        with quiet(), FakeQuantizationTrace():
            return trace()
    except EdgewrightError:
        raise
    except Exception as error:  # torch.export's errors share no base class; each means: not traceable
        reason = in_one_line(error)
        raise Unsupported(f"torch.export cannot trace {type(model).__name__}: {reason}") from error


def _inputs(example: Any, model: Any) -> tuple[Tensor, ...]:
    if isinstance(example, Tensor):
        example = (example,)
    values = tuple(example or ())
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise UsageError(
            f"{type(model).__name__} is not a language model: give tensors to trace it with, "
            "e.g. export_executorch(model, None, path, example_inputs=[torch.randn(1, 3, 224, 224)])"
        )
    return values


def check_arguments(path: Path, embedding: str, min_delegated: float) -> None:
    """Raise UsageError for what cannot be asked for, before any work."""
    if path.suffix.lower() != ".pte":
        raise UsageError(f"an ExecuTorch file ends in .pte, got {path.name!r}; e.g. {path.stem or 'model'}.pte")
    check("embedding", embedding, one_of(*TABLES))
    check("min_delegated", min_delegated, number(0, 1), "a share, e.g. min_delegated=0.5")
