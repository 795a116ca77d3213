"""From a module to an ONNX graph: a copy without packed layers goes through torch.export and PyTorch's ONNX exporter.

torch's own fake quantisation (`torch.fake_quantize_per_tensor_affine`, `torch.fake_quantize_per_channel_affine`) is
recorded twice: once while the model runs, where its codes are kept, and once under export, where each call leaves a
placeholder with the same number. `onnx_graph` puts the kept codes of the weights into the file and QuantizeLinear and
DequantizeLinear around the activations.
"""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgewright.errors import Unsupported, UsageError
from edgewright.export.onnx.layers import DOMAIN, Storage, replace_packed_, symbolic

PER_TENSOR = (torch.fake_quantize_per_tensor_affine, torch.ops.aten.fake_quantize_per_tensor_affine)
PER_CHANNEL = (torch.fake_quantize_per_channel_affine, torch.ops.aten.fake_quantize_per_channel_affine)
WHOLE_EXTREMES = (torch.amax, torch.amin, Tensor.amax, Tensor.amin)
REASON_LENGTH = 300


@dataclass(frozen=True)
class Rounding:
    """One call of torch's fake quantisation, as it was made: codes in the smallest integer type that holds the range.

    axis: None for one scale a tensor.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    low: int
    high: int


class _Recorder(TorchFunctionMode):
    """Keeps the codes of every fake quantisation, or (trace) puts a placeholder in its place."""

    def __init__(self, trace: bool) -> None:
        super().__init__()
        self.trace = trace
        self.calls: list[Rounding] = []
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = getattr(func, "overloadpacket", func)
        if kind in PER_TENSOR:
            return self._call(func, False, *_bound(args, kwargs, ("quant_min", "quant_max")))
        if kind in PER_CHANNEL:
            return self._call(func, True, *_bound(args, kwargs, ("axis", "quant_min", "quant_max")))
        if self.trace and func in WHOLE_EXTREMES and len(args) == 1 and "dim" not in kwargs:
            return func(*args, dim=tuple(range(args[0].ndim)), **kwargs)  # the exporter knows them with axes only
        return func(*args, **kwargs)

    def _call(self, func: Any, channels: bool, x: Tensor, scale: Any, zero_point: Any, *rest: int) -> Tensor:
        axis = rest[0] if channels else None
        low, high = rest[-2:]
        number = self.count
        self.count += 1
        if self.trace:
            inputs: list[Tensor | None] = [x, torch.as_tensor(scale, dtype=torch.float32)]
            return symbolic(f"{DOMAIN}::FakeQuantize", inputs, list(x.shape), call=number)
        steps = torch.as_tensor(scale, dtype=torch.float32).detach().clone()
        zeros = torch.as_tensor(zero_point).detach().clone()
        broadcast = [-1 if i == axis else 1 for i in range(x.ndim)] if channels else []
        inverse, shift = (1.0 / steps).reshape(broadcast), zeros.reshape(broadcast)
        # the arithmetic of torch's kernels: a float product with the inverse, halves to even, then an integer shift
        codes = ((x.detach().float() * inverse).round().double() + shift).clamp(low, high).to(integer_type(low, high))
        self.calls.append(Rounding(codes, steps, zeros, axis, low, high))
        return func(x, scale, zero_point, *rest)


def integer_type(low: int, high: int) -> torch.dtype:
    """The smallest type of DequantizeLinear that holds low..high; 32 bits are for biases. Raises Unsupported."""
    for dtype in (torch.int8, torch.uint8, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return dtype
    raise Unsupported(
        f"fake quantisation to {low}..{high} has no type in ONNX; it takes ranges of int8, uint8 or int32"
    )


def _bound(args: tuple[Any, ...], kwargs: dict[str, Any], last: tuple[str, ...]) -> list[Any]:
    names = ("input", "scale", "zero_point", *last)
    return [*args, *(kwargs[name] for name in names[len(args) :])]


class _Plain(nn.Module):
    """The model as positional tensors in, a tuple of tensors out."""

    def __init__(self, model: nn.Module, names: Sequence[str] | None, recorder: _Recorder) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.recorder = recorder

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with self.recorder:
            return tuple(call(self.model, self.names, tensors).values())


def call(model: nn.Module, names: Sequence[str] | None, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The model's outputs by name, whatever it returns them in: a tensor, a tuple, a list or a mapping."""
    out = model(*tensors) if names is None else model(**dict(zip(names, tensors, strict=True)))
    if isinstance(out, Tensor):
        return {"output": out}
    if isinstance(out, Mapping):
        found = {str(name): value for name, value in out.items() if isinstance(value, Tensor)}
    else:
        values = [value for value in out if isinstance(value, Tensor)] if isinstance(out, tuple | list) else []
        found = {f"output_{i}": value for i, value in enumerate(values)}
    if not found:
        raise Unsupported(f"{type(model).__name__} returns {type(out).__name__} without a tensor in it")
    return found


def clone(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares parameters and buffers with the original: to replace modules in."""
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    config: Any = getattr(copied, "config", None)
    if getattr(config, "use_cache", False):  # a file without a cache: tokens in, logits of all of them out
        config.use_cache = False
    return copied.eval()


def record(
    model: nn.Module, names: Sequence[str] | None, tensors: Sequence[Tensor]
) -> tuple[dict[str, Tensor], list[Rounding]]:
    """(outputs, every fake quantisation in the order of its call) of one run."""
    recorder = _Recorder(trace=False)
    with torch.no_grad(), recorder:
        outputs = call(model, names, tensors)
    return outputs, recorder.calls


def trace(
    model: nn.Module,
    names: Sequence[str] | None,
    tensors: Sequence[Tensor],
    free: Sequence[Sequence[int]],
    storage: Storage,
    opset: int,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> Any:
    """The ONNX graph (an `onnx_ir.Model`) of the model, with placeholders. free: axes of any size, per input.

    Raises Unsupported naming the operator and the module that nothing translates, UsageError for a batch that the model
    fixes.
    """
    copied = clone(model)
    replace_packed_(copied, storage)
    plain = _Plain(copied, names, _Recorder(trace=True))
    dynamic = tuple({axis: torch.export.Dim.DYNAMIC for axis in axes} or None for axes in free)
    with _silence(), torch.no_grad():
        try:
            program = torch.export.export(plain, tuple(tensors), dynamic_shapes=(dynamic,))
        except Unsupported:
            raise
        except Exception as error:  # torch.export raises its own, dynamo's, fake tensor's and the model's errors
            raise _untraceable(error, copied) from error
        try:
            result = torch.onnx.export(
                program,
                input_names=list(input_names),
                output_names=list(output_names),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise _untranslatable(error, program) from error
    assert result is not None
    return result.model


def _untraceable(error: Exception, model: nn.Module) -> Exception:
    text = str(error)
    if "specialized" in text or "Constraints violated" in text or "marked as dynamic" in text:
        return UsageError(
            f"{type(model).__name__} fixes the size of an axis that was asked to be free: {_sentence(text)}; "
            "export it with dynamic_batch=False"
        )
    found = re.search(r"\b(aten|prims|torchvision|edgewright|quantized)[.:]+(\w+(?:\.\w+)?)", text)
    what = f"the operator {found[1]}::{found[2]}" if found else "its forward"
    return Unsupported(f"torch.export cannot follow {what} in {_place(error, model)}: {_sentence(text)}")


def _place(error: BaseException, model: nn.Module) -> str:
    """The innermost module of `model` whose forward is on the error's stack, by its name."""
    names = {id(module): name for name, module in model.named_modules()}
    place, step = type(model).__name__, error.__traceback__
    while step is not None:
        module = step.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and step.tb_frame.f_code.co_name == "forward":
            place = names.get(id(module)) or place
        step = step.tb_next
    return place


def _untranslatable(error: BaseException, program: Any) -> Unsupported:
    """Names the operator that the exporter stopped at, and the module that called it."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    found = re.search(r"target=torch\.ops\.([\w.]+)", "\n".join(map(str, causes)))
    reason = _sentence(str(causes[-1]))
    if found is None:
        return Unsupported(f"PyTorch's ONNX exporter does not take this model: {reason}")
    operator = found[1]
    base = operator.split(".")[1]
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    # the exporter speaks of the operators after decomposition, which mostly keep the name or a part of it
    for fits in (lambda name: name == operator, lambda name: base in name):
        for node in nodes:
            if fits(str(node.target)):
                return Unsupported(
                    f"the operator {_operator(str(node.target))} in the module {_module(node)} cannot be translated to "
                    f"ONNX: {reason}"
                )
    return Unsupported(f"the operator {_operator(operator)} cannot be translated to ONNX: {reason}")


def _operator(name: str) -> str:
    return name.removesuffix(".default").replace(".", "::", 1)


def _module(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name, kind = stack[-1] if stack else ("", "")
    name = str(name).removeprefix("L['self'].").removeprefix("model").lstrip(".")
    kind = getattr(kind, "__name__", str(kind)).rsplit(".", 1)[-1]
    return f"{name or 'at the top'} ({kind})"


def _sentence(text: str) -> str:
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[0][:REASON_LENGTH] if lines else "no reason given"


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings of the exporters on the screen: what matters is raised. Settings are put back.

    Nor their prints (onnxscript 0.6), which would stand before the JSON of a command.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
