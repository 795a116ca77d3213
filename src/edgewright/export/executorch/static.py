"""Static int8 in a traced program: torch's fake quantisation becomes integers in the form that XNNPACK computes.

`torch.fake_quantize_*` with fixed scales is what `quantize_static` leaves in a model (and `export_onnx` reads). Here

    of a weight       its int8 codes, as the scales in the program give them, and dequantize_per_channel
    of an activation  quantize_per_tensor to int8 (codes of uint8 minus 128) and dequantize_per_tensor
    of a bias         the float value; XNNPACK stores it as int32 in units of step times step of the input, its own grid

XNNPACK computes an operator in integers where a dequantize stands in front of each input and a quantize behind it (one
ReLU or clamp may stand between). So operations that only move values (padding, reshaping, pooling by maximum) get a
quantize and dequantize of their input's scale behind them, which changes no value, and no two readers share a
dequantize. A layer whose output stays float has no integer kernel: its weights become the values of their codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edgewright.errors import Unsupported

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Node = Any  # torch.fx.Node, whose arguments are typed as a union of everything a graph can hold
aten = torch.ops.aten
OPERATOR = "fixed_rounding"  # ours while a model is traced: torch's own cannot be traced with a free batch
PER_TENSOR = (aten.fake_quantize_per_tensor_affine.default, aten.fake_quantize_per_tensor_affine.tensor_qparams)
PER_CHANNEL = (aten.fake_quantize_per_channel_affine.default,)
LOW, HIGH = -128, 127  # XNNPACK's only 8-bit type of static activations is signed
COMPUTE = (aten.conv2d.default, aten.conv2d.padding, aten.convolution.default, aten.linear.default)
CLAMPS = (aten.relu.default, aten.relu6.default, aten.relu_.default, aten.relu6_.default, aten.hardtanh.default,
          aten.hardtanh_.default, aten.clamp.default)  # fmt: skip
MOVES = (aten.pad.default, aten.constant_pad_nd.default, aten.max_pool2d.default, aten.flatten.using_ints,
         aten.reshape.default, aten.view.default, aten.permute.default, aten.transpose.int, aten.squeeze.dim,
         aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default, aten.cat.default, aten.relu.default,
         aten.relu_.default, aten.contiguous.default, aten.clone.default)  # fmt: skip


@dataclass
class Placed:
    """What was placed. parts: bytes of codes, steps and float tensors; weights: their number; layers: those whose
    weights are codes; notes for people.
    """

    parts: dict[str, int] = field(default_factory=lambda: {"codes": 0, "steps": 0, "float": 0})
    weights: int = 0
    layers: int = 0
    activations: int = 0
    notes: list[str] = field(default_factory=list)


@cache
def _library() -> torch.library.Library:
    """Define `edgewright::fixed_rounding` once in this process; axis -1: one scale a tensor."""
    library = torch.library.Library("edgewright", "FRAGMENT")
    library.define(f"{OPERATOR}(Tensor x, Tensor scale, Tensor zero, int axis, int low, int high) -> Tensor")

    def compute(x: Tensor, scale: Tensor, zero: Tensor, axis: int, low: int, high: int) -> Tensor:
        if axis < 0:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high)
        return torch.fake_quantize_per_channel_affine(x, scale, zero, axis, low, high)

    library.impl(OPERATOR, compute, "CPU")
    shape: Any = lambda x, scale, zero, axis, low, high: torch.empty_like(x)  # noqa: E731
    torch.library.register_fake(f"edgewright::{OPERATOR}", shape, lib=library)
    return library


class FakeQuantizationTrace(TorchFunctionMode):
    """While a model is traced: torch's fake quantisation leaves our operator in the graph."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.fake_quantize_per_tensor_affine, torch.fake_quantize_per_channel_affine):
            return func(*args, **(kwargs or {}))
        channels = func is torch.fake_quantize_per_channel_affine
        names = ("input", "scale", "zero_point", *(("axis",) if channels else ()), "quant_min", "quant_max")
        x, scale, zero, *rest = [*args, *((kwargs or {})[name] for name in names[len(args) :])]
        step, point = torch.as_tensor(scale, dtype=torch.float32), torch.as_tensor(zero, dtype=torch.int32)
        _library()
        return torch.ops.edgewright.fixed_rounding(x, step, point, *(rest if channels else (-1, *rest)))


def has_fake_quantization(program: ExportedProgram) -> bool:
    """Whether a traced program holds torch's fake quantisation."""
    return any(_is_rounding(node) for node in program.graph.nodes)


def _is_rounding(node: Node) -> bool:
    return node.target in (*PER_TENSOR, *PER_CHANNEL) or str(node.target) == f"edgewright.{OPERATOR}.default"


def _axis(node: Node) -> int | None:
    """The axis of a rounding with a scale a channel, else None."""
    axis = node.args[3] if len(node.args) == 6 else -1  # in torch's operators per tensor there are five arguments
    return None if axis == -1 else int(axis)


def place_codes_(program: ExportedProgram) -> Placed:
    """Replace every fake quantisation of a program traced with torch.export, in place.

    Raises Unsupported naming the module: for a scale that depends on the input, more than 8 bits, an activation with a
    scale a channel, and weights that are not symmetric (XNNPACK's have no zero point).
    """
    placer = _Placer(program)
    placer.simplify()
    floats: list[str] = []
    for node in placer.roundings():
        if not placer.is_constant(node.args[0]):
            placer.activation(node)
    placer.spread()
    for node in placer.roundings():
        name = placer.constant(node)
        if name is not None:
            floats.append(name)
    if floats:
        listed = ", ".join(floats[:4]) + (f" and {len(floats) - 4} more" if len(floats) > 4 else "")
        placer.placed.notes.append(
            f"{listed}: input or output stays float, so XNNPACK computes in float and the weights are float32 values"
        )
    placer.finish()
    return placer.placed


class _Placer:
    def __init__(self, program: ExportedProgram) -> None:
        from executorch.backends.transforms import utils

        self.program, self.graph, self.utils = program, program.graph, utils
        self.placed = Placed()
        self.q = torch.ops.quantized_decomposed
        self.count = 0
        self.known: dict[Any, bool] = {}

    def found(self, targets: tuple[Any, ...]) -> list[Node]:
        return [node for node in self.graph.nodes if node.op == "call_function" and node.target in targets]

    def roundings(self) -> list[Node]:
        return [node for node in self.graph.nodes if node.op == "call_function" and _is_rounding(node)]

    # ---- what comes before

    def simplify(self) -> None:
        """Dropout and tracing's checks go; a mean over the picture keeps its axes up to its rounding."""
        for node in self.found((aten._assert_tensor_metadata.default,)):
            self.graph.erase_node(node)
        for node in self.found((aten.dropout.default,)):
            if not node.args[2]:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        for node in self.found((aten.mean.dim,)):
            x, axes = node.args[0], sorted(axis % 4 for axis in node.args[1])
            rounded = self._only_user(node)
            keeps = len(node.args) > 2 and node.args[2]
            if axes != [2, 3] or keeps or x.meta["val"].ndim != 4 or rounded is None or not _is_rounding(rounded):
                continue
            node.args = (x, [2, 3], True)
            node.meta["val"] = x.meta["val"].mean((2, 3), True)
            shape = rounded.meta["val"].shape
            rounded.meta["val"] = node.meta["val"]
            users = list(rounded.users)
            with self.graph.inserting_after(rounded):
                flat = self.graph.call_function(aten.flatten.using_ints, (rounded, 1))
            flat.meta = {**node.meta, "val": rounded.meta["val"].new_empty(shape)}
            for user in users:
                user.replace_input_with(rounded, flat)

    # ---- activations

    def activation(self, node: Node) -> None:
        x, step, zero, low, high = self._arguments(node)
        where = _where(node)
        if step.numel() != 1 or _axis(node) is not None:
            raise Unsupported(f"the activation in {where} has a scale a channel; XNNPACK takes one a tensor")
        if high - low > HIGH - LOW or low < LOW or high > 255:
            raise Unsupported(f"the activation in {where} is quantised to {low}..{high}; XNNPACK takes 8 bits")
        scale, point, shift = float(step), int(zero), 128 if high > HIGH else 0
        if high - low < HIGH - LOW:  # fewer bits: XNNPACK knows no narrower range, a clamp does it
            x = self._clamped(node, x, (low - point) * scale, (high - point) * scale)
        parameters = (scale, point - shift, LOW, HIGH, torch.int8)
        with self.graph.inserting_before(node):
            codes = self._add(self.q.quantize_per_tensor.default, (x, *parameters), node)
        self._read(codes, node, parameters)
        self.graph.erase_node(node)
        self.placed.activations += 1

    def _clamped(self, node: Node, x: Node, low: float, high: float) -> Node:
        """X within low..high; a clamp that is there already is narrowed instead, since only one fuses with a layer."""
        with self.graph.inserting_before(node):
            if x.target not in CLAMPS or self._only_user(x) is None:
                return self._add(aten.hardtanh.default, (x, low, high), node)
            old_low, old_high = _bounds(x)
            clamped = self._add(aten.hardtanh.default, (x.args[0], max(low, old_low), min(high, old_high)), node)
        self._replace(x, clamped)
        return clamped

    def _read(self, codes: Node, old: Node, parameters: tuple[Any, ...]) -> None:
        """A dequantize of its own for every reader of `old`."""
        for user in list(old.users):
            if user is codes:
                continue
            with self.graph.inserting_before(user):
                value = self._add(self.q.dequantize_per_tensor.default, (codes, *parameters), old)
            user.replace_input_with(old, value)

    def spread(self) -> None:
        """Quantise behind operations that move values, in their input's own scale; give clamps the form that fuses."""
        rounds, reads = self.q.quantize_per_tensor.default, self.q.dequantize_per_tensor.default
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node.target not in MOVES or not _moves(node):
                continue
            sources = node.all_input_nodes
            parameters = {source.args[1:] for source in sources if source.target == reads}
            done = all(user.target == rounds for user in node.users)
            if not sources or done or len(parameters) != 1 or any(s.target != reads for s in sources):
                continue
            if all(user.op == "output" for user in node.users):
                continue
            with self.graph.inserting_after(node):
                codes = self._add(rounds, (node, *next(iter(parameters))), node)
            self._read(codes, node, next(iter(parameters)))
        for node in self.found((aten.clamp.default,)):
            low, high = _bounds(node)
            if low > float("-inf") and high < float("inf") and node.args[0].target in COMPUTE:
                node.target, node.args = aten.hardtanh.default, (node.args[0], low, high)

    # ---- weights and biases

    def constant(self, node: Node) -> str | None:
        """Place the codes of one weight; the name of its module where they had to become floats."""
        x, step, zero, low, high = self._arguments(node)
        values = self._value(x)
        axis = _axis(node)
        wide = [-1 if i == axis else 1 for i in range(values.ndim)]
        step, zero = step.float(), zero.to(torch.int64)
        # the arithmetic of torch's kernels: a float product with the inverse, halves to even, then an integer shift
        codes = (values * (1.0 / step).reshape(wide)).round().double() + zero.reshape(wide)
        codes = codes.clamp(low, high).to(torch.int64) - zero.reshape(wide)
        users = list(node.users)
        if high - low > 255 or not all(user.target in COMPUTE and user.args[1] is node for user in users):
            self._replace(node, self._placeholder(node.target(*(self._value(arg) for arg in node.args)), node))
            return None
        where = _where(node)
        if axis not in (None, 0):
            raise Unsupported(f"the weight of {where} is quantised along axis {axis}; XNNPACK takes output channels")
        if codes.min() < LOW or codes.max() > HIGH:
            raise Unsupported(
                f"the weight of {where} has a zero point of its own; XNNPACK takes symmetric weights: "
                "StaticConfig(symmetric=True)"
            )
        if not all(self._computes_integers(user) for user in users):
            weight = codes.to(torch.float32) * step.reshape(wide)
            self._replace(node, self._placeholder(weight, node))
            return where
        step = step.expand(len(values)).contiguous()
        held = [codes.to(torch.int8), step, torch.zeros(len(step), dtype=torch.int64)]
        with self.graph.inserting_before(node):
            inputs = [self._placeholder(tensor, node) for tensor in held]
            target = self.q.dequantize_per_channel.default
            self._replace(node, self._add(target, (*inputs, 0, LOW, HIGH, torch.int8), node))
        self.placed.layers += 1
        self.placed.parts["codes"] += codes.numel()
        self.placed.parts["steps"] += 4 * step.numel()
        return None

    def _computes_integers(self, layer: Node) -> bool:
        """Whether a layer stands between the dequantize and quantize that make XNNPACK compute it in integers."""
        source = layer.args[0]
        if source.target != self.q.dequantize_per_tensor.default:
            return False
        after = self._only_user(layer)
        if after is not None and after.target in CLAMPS:
            after = self._only_user(after)
        return after is not None and after.target == self.q.quantize_per_tensor.default

    def _placeholder(self, tensor: Tensor, beside: Node) -> Node:
        from torch.export.graph_signature import InputKind

        self.count += 1
        first = next(node for node in self.graph.nodes if node.op == "placeholder")
        with self.graph.inserting_before(first):
            return self.utils.create_constant_placeholder(
                self.program, self.graph, f"b_static_{self.count}", InputKind.BUFFER, tensor.contiguous(), True
            )

    def _replace(self, old: Node, new: Node) -> None:
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    # ---- constants

    def is_constant(self, node: Any) -> bool:
        """Whether a value of the graph is computed from the program's own tensors alone."""
        if not isinstance(node, torch.fx.Node):
            return True
        if node not in self.known:
            if node.op == "placeholder":
                self.known[node] = self.utils.is_param_node(self.program, node)
            else:
                self.known[node] = node.op == "call_function" and all(map(self.is_constant, node.all_input_nodes))
        return self.known[node]

    def _value(self, value: Any) -> Any:
        if not isinstance(value, torch.fx.Node):
            return value
        if value.op == "placeholder":
            tensor = self.utils.get_param_tensor(self.program, value)
            assert tensor is not None
            return tensor.detach()
        arguments = torch.fx.map_arg((value.args, value.kwargs), self._value)
        with torch.no_grad():
            return value.target(*arguments[0], **arguments[1])  # type: ignore[operator]

    def _arguments(self, node: Node) -> tuple[Any, Tensor, Tensor, int, int]:
        """(input, steps, zero points, lowest and highest code) of a fake quantisation."""
        x, step, zero = node.args[:3]
        if not (self.is_constant(step) and self.is_constant(zero)):
            raise Unsupported(
                f"the fake quantisation in {_where(node)} computes its scale from the input; XNNPACK takes fixed "
                "scales: calibrate the model first"
            )
        low, high = int(node.args[-2]), int(node.args[-1])
        return x, torch.as_tensor(self._value(step)), torch.as_tensor(self._value(zero)), low, high

    # ---- the graph

    def _add(self, target: Any, args: tuple[Any, ...], beside: Node) -> Node:
        """A node at the insertion point, with the value that tracing would have given it."""
        node = self.graph.call_function(target, args)
        node.meta = {key: beside.meta[key] for key in ("nn_module_stack", "stack_trace") if key in beside.meta}
        node.meta["val"] = target(*torch.fx.map_arg(args, lambda one: one.meta["val"]))
        return node

    @staticmethod
    def _only_user(node: Node) -> Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def finish(self) -> None:
        """Remove what nothing reads any more, the float weights first of all, and count what stays float."""
        self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            if node.op != "placeholder" or not self.utils.is_param_node(self.program, node):
                continue
            if not node.users:
                self.utils.delete_constant_placeholder(self.program, node)
            elif node.meta["val"].is_floating_point():
                held = node.meta["val"]
                self.placed.parts["float"] += held.numel() * held.element_size()
        parts = self.placed.parts
        parts["float"] -= parts["steps"]
        self.placed.weights = parts["codes"] + parts["float"] // 4
        self.graph.lint()
        self.program.graph_module.recompile()


def _moves(node: Node) -> bool:
    """Whether this use of an operator only moves values and zeros: padding with anything else does not."""
    if node.target == aten.constant_pad_nd.default:
        return len(node.args) < 3 or not node.args[2]
    if node.target == aten.pad.default:
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        return mode == "constant" and not value
    return True


def _bounds(node: Node) -> tuple[float, float]:
    """Lowest and highest value that a clamp lets through."""
    infinity = float("inf")
    if node.target in (aten.relu.default, aten.relu_.default):
        return 0.0, infinity
    if node.target in (aten.relu6.default, aten.relu6_.default):
        return 0.0, 6.0
    names, ends = ("min_val", "max_val"), (-1.0, 1.0)
    if node.target == aten.clamp.default:
        names, ends = ("min", "max"), (-infinity, infinity)
    given = [node.args[i + 1] if len(node.args) > i + 1 else node.kwargs.get(names[i]) for i in range(2)]
    low, high = (end if one is None else one for one, end in zip(given, ends, strict=True))
    return float(low), float(high)


def _where(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "the model"
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    name = str(path).split("L['self'].")[-1].removeprefix("model.")
    return f"module {name} ({kind.rsplit('.', 1)[-1]})" if name not in ("", "model") else kind.rsplit(".", 1)[-1]
