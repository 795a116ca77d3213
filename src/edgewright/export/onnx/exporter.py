"""`export_onnx`: a model as an .onnx file for ONNX Runtime, compared with the model before it takes its name.

Float models go as they are. Packed layers put their codes into the file, never derived again:

    linear, up to 4 bits     com.microsoft MatMulNBits, 4 bits a code (or 1 and 2, see `storage`)
    linear, 8 bits           com.microsoft MatMulNBits, 8 bits a code
    embedding                a Gather of packed words at 1, 2, 4 or 8 bits a code, unpacked behind it
    convolution              DequantizeLinear of int4 or 8 bits, one scale an output channel, and Conv

Static int8 comes from torch's own fake quantisation. Whatever module calls `torch.fake_quantize_per_tensor_affine` or
`torch.fake_quantize_per_channel_affine` with scales that do not depend on the input is exported as QDQ: around an
activation QuantizeLinear and DequantizeLinear; in place of a weight the 8-bit codes that PyTorch computed, and
DequantizeLinear. The weight may be computed from parameters first (a folded batch norm, say). ONNX Runtime then uses
its integer kernels; `onnx_graph.eight_bits` sees to it that they are exact on every CPU.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, number, one_of, optional
from edgewright.errors import MissingPackage, Unsupported, UsageError
from edgewright.export.onnx import graph as onnx_graph, trace as onnx_trace
from edgewright.export.onnx.layers import Storage
from edgewright.export.onnx.verify import variations, verify
from edgewright.export.original import output_distance
from edgewright.io.atomic import atomic_file
from edgewright.io.temporaries import PART, prefix
from edgewright.runtime.onnx import OnnxProgram

INSTALL = "pip install 'edgewright[onnx]'"
OPSETS = (21, 22, 23)  # 4-bit initialisers came with 21
FLOAT_TOLERANCE = 1e-4  # sums in another order
ROUNDED_TOLERANCE = 0.1  # where inputs of layers are rounded, a sum in another order takes the next code now and then
EXTERNAL_FROM = (2 << 30) - (16 << 20)  # protobuf ends at 2 GiB
EXAMPLE_TOKENS = 16
AXES = {0: "batch", 1: "length"}


@dataclass(frozen=True)
class OnnxExport:
    """A finished file. bytes: of the file and its external data. max_error: the largest difference from PyTorch over
    the largest value of the output, in ONNX Runtime. operators: how many of those that read codes.
    """

    path: Path
    bytes: int
    max_error: float
    tolerance: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, int]
    notes: tuple[str, ...] = ()
    checks: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    opset: int = OPSETS[0],
    tolerance: float | None = None,
    storage: Storage = "nibbles",
    integers: onnx_graph.Integers = "unsigned",
    original: nn.Module | None = None,
) -> OnnxExport:
    """Write `model` (float32, on the CPU) to `path`, run the file in ONNX Runtime, compare, and only then name it.

    Args:
        model: any module that torch.export traces.
        path: ends in .onnx.
        example_inputs: a tensor, a sequence for the positional arguments, or a mapping for the keyword arguments of
            forward, with the batch first; left out, `example_inputs_for(model)`.
        input_names: of the graph; default: the names of forward's arguments.
        output_names: of the graph; default: the names that the model's output has.
        dynamic_batch: leave the first axis of every input free, and the length of token inputs (integers [batch,
            length]).
        opset: one of OPSETS.
        tolerance: largest allowed difference, relative to the largest value of an output; default 1e-4, or 0.1 where
            inputs of layers are rounded.
        storage: "nibbles" keeps linear weights of 1 to 4 bits at 4 bits, which ONNX Runtime multiplies fastest;
            "smallest" at their own 1, 2 or 4 bits (1-bit weights become floats when the file is loaded).
        integers: type of 8-bit codes in QDQ. "unsigned" stores int8 codes as uint8, 128 higher: the same values, which
            ONNX Runtime multiplies exactly on every CPU. "signed" leaves int8 as int8, for runtimes that take symmetric
            weights only; ONNX Runtime on x86 without VNNI then clips sums of large products.
        original: the float model before quantisation; `checks["original"]` then says how far the file is from it.

    Returns:
        Path, sizes, operators, largest difference and notes.

    Raises:
        Unsupported: an operator without a translation, named with its module.
        UsageError: arguments that cannot work.
        CheckFailed: the runtime answers otherwise.
        MissingPackage: without the extra `onnx`.
    """
    path = Path(path)
    _import_extra()
    _check_arguments(path, opset, tolerance, storage, integers)
    _check_model(model)
    names, tensors = _tensors(example_inputs if example_inputs is not None else example_inputs_for(model))
    free = _free_axes(tensors, dynamic_batch)
    if dynamic_batch:  # a size of one would be taken for a constant
        tensors = [_at_least_two(tensor) if 0 in axes else tensor for tensor, axes in zip(tensors, free, strict=True)]
    copied = onnx_trace.clone(model)
    outputs, calls = onnx_trace.record(copied, names, tensors)
    given = list(input_names or names or _numbered("input", len(tensors)))
    results = list(output_names or outputs)
    for what, found, wanted in (("input", given, len(tensors)), ("output", results, len(outputs))):
        if len(found) != wanted or len(set(found)) != wanted:
            raise UsageError(f"{what}_names={found}; the model has {wanted} {what}s, give each its own name")
    graph, free, notes = _graph(copied, names, tensors, free, storage, opset, given, results)
    onnx_graph.name_axes(graph, free, AXES)
    operators = onnx_graph.lower(graph, calls, "edgewright", integers)
    if tolerance is None:
        tolerance = ROUNDED_TOLERANCE if _rounds(copied, operators) else FLOAT_TOLERANCE

    def reference(inputs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return onnx_trace.call(copied, names, inputs)

    with (
        atomic_file(path) as temporary,
        tempfile.TemporaryDirectory(prefix=prefix(path.name), suffix=PART, dir=path.parent) as folder,
    ):
        staged = Path(folder) / path.name  # its external data must have its final name when it is checked
        external = _save(graph, staged)
        checked = verify(staged, results, reference, variations(tensors, free), tolerance)
        checks = {} if original is None else {"original": _distance(original, names, staged, tensors, path.name)}
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        if external:
            notes.append(f"more than 2 GiB: the tensors are in {external}, which belongs beside the file")
            os.replace(Path(folder) / external, path.parent / external)
        os.replace(staged, temporary)
    notes.insert(0, f"ran in ONNX Runtime with batches of {', '.join(map(str, checked.batches))}")
    return OnnxExport(
        path, size, checked.error, tolerance, tuple(given), tuple(results), operators, tuple(notes), checks
    )


def _distance(
    original: nn.Module, names: Sequence[str] | None, file: Path, tensors: Sequence[Tensor], name: str
) -> dict[str, Any]:
    """How far the file's outputs for the example are from those of the model before quantisation."""
    with OnnxProgram(file, check=False) as program, torch.no_grad():
        found = [torch.from_numpy(value) for value in program.run([tensor.numpy() for tensor in tensors])]
        wanted = list(onnx_trace.call(onnx_trace.clone(original), names, tensors).values())
    floats = [(a, b) for a, b in zip(wanted, found, strict=True) if a.is_floating_point()]
    return output_distance([a for a, _ in floats], [b for _, b in floats], name)


def example_inputs_for(model: nn.Module) -> dict[str, Tensor]:
    """Inputs that an encoder or causal language model of transformers can be exported with: two short token rows.

    Encoders also get an attention mask whose second row ends early. Raises UsageError for any other model.
    """
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 2 or getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"no example inputs are known for {type(model).__name__}; give them, e.g. "
            "export_onnx(model, 'model.onnx', example_inputs=torch.randn(2, 3, 224, 224))"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, EXAMPLE_TOKENS), generator=generator)
    if "CausalLM" in type(model).__name__ or type(model).__name__.endswith("LMHeadModel"):
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, -EXAMPLE_TOKENS // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _graph(
    model: nn.Module,
    names: Sequence[str] | None,
    tensors: Sequence[Tensor],
    free: list[tuple[int, ...]],
    storage: Storage,
    opset: int,
    given: Sequence[str],
    results: Sequence[str],
) -> tuple[Any, list[tuple[int, ...]], list[str]]:
    """(graph, axes that are free in it, notes): a model that fixes the length of its tokens is taken at that length."""
    arguments = (storage, opset, given, results)
    try:
        return onnx_trace.trace(model, names, tensors, free, *arguments), free, []
    except UsageError:
        batch_only = [tuple(axis for axis in axes if axis == 0) for axes in free]
        if batch_only == free:
            raise
    graph = onnx_trace.trace(model, names, tensors, batch_only, *arguments)
    return graph, batch_only, ["the model fixes the length of its tokens to that of the example"]


def _save(graph: Any, path: Path) -> str | None:
    """Write the model; the name of the file with its tensors where one file cannot hold them."""
    import onnx_ir

    total = sum(
        value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None
    )
    external = f"{path.name}.data" if total > EXTERNAL_FROM else None
    onnx_ir.save(graph, path, external_data=external)
    return external


def _tensors(example: Any) -> tuple[list[str] | None, list[Tensor]]:
    if isinstance(example, Mapping):
        names: list[str] | None = [str(name) for name in example]
        tensors = list(example.values())
    else:
        names, tensors = None, [example] if isinstance(example, Tensor) else list(example)
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.numel() for tensor in tensors):
        raise UsageError(
            "example_inputs must be tensors that are not empty, e.g. example_inputs=torch.randn(2, 3, 224, 224) or "
            "example_inputs={'input_ids': ids}"
        )
    return names, [tensor.detach().cpu().contiguous() for tensor in tensors]


def _numbered(kind: str, count: int) -> list[str]:
    return [kind] if count == 1 else [f"{kind}_{i}" for i in range(count)]


def _at_least_two(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if len(tensor) == 1 else tensor


def _free_axes(tensors: Sequence[Tensor], dynamic_batch: bool) -> list[tuple[int, ...]]:
    batch = next((len(tensor) for tensor in tensors if tensor.ndim), None)
    free = []
    for tensor in tensors:
        axes: tuple[int, ...] = ()
        if dynamic_batch and tensor.ndim and len(tensor) == batch:
            tokens = tensor.ndim == 2 and tensor.dtype in (torch.int64, torch.int32) and tensor.shape[1] > 1
            axes = (0, 1) if tokens else (0,)
        free.append(axes)
    return free


def _rounds(model: nn.Module, operators: Mapping[str, int]) -> bool:
    """Whether inputs of layers are rounded, so that a last bit can become a step."""
    return "QuantizeLinear" in operators or any(
        getattr(module, "input_quantizer", None) is not None for module in model.modules()
    )


def _check_arguments(path: Path, opset: int, tolerance: float | None, storage: str, integers: str) -> None:
    if path.suffix.lower() != ".onnx" or path.is_dir():
        raise UsageError(f"{path} is no name for an ONNX file; it ends in .onnx, e.g. out/model.onnx")
    check("opset", opset, one_of(*OPSETS))
    check("tolerance", tolerance, optional(number(above=0)), "a share of the largest output, e.g. tolerance=1e-3")
    check("storage", storage, one_of("nibbles", "smallest"))
    check("integers", integers, one_of("unsigned", "signed"))


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(getattr(module, "quantizer", None), "pack") and hasattr(module, "packed"):
            raise UsageError(f"layer {name} is a {type(module).__name__}; before the export, call convert_(model)")
        known = getattr(module, "is_calibrated", None)
        if callable(known) and not known():
            raise UsageError(
                f"{name} has not seen any data, so its scale is not set; run the model on some inputs first"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise Unsupported(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; export model.float()")
        if tensor.device.type != "cpu":
            raise UsageError(f"{name} is on {tensor.device}; export model.cpu()")


def _import_extra() -> None:
    from importlib import import_module

    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise MissingPackage(f"ONNX export needs the package {name}: {INSTALL}") from error
