"""Integer-only execution of a converted network: int8 codes, int32 sums, rescaling by an integer and a shift.

This is the arithmetic that int8 hardware does, in plain torch integers, to check fake quantisation against. No float
enters between the codes of the input and the codes of the output. Source: arXiv 1806.08342, sections 2.1 to 2.3.
    sum (w - z_w)(x - z_x) = sum w x - z_w sum x - z_x sum w + K z_w z_x      the last two are constants of the bias
    code = z_y + (sum * M0 + 2^(s-1)) >> s                                    M = step_w step_x / step_y = M0 * 2^-s
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.quantization.static.batchnorm import StaticLayer
from edgewright.quantization.static.observers import FixedActivation
from edgewright.quantization.static.rules import is_tensor, kind_of, rectified_limit, tensor_inputs

INT32 = 2**31
WIDEST_SHIFT = 62


def fixed_point(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """(M0, shift) int64 with multiplier = M0 * 2^-shift and M0 in [2^30, 2^31), for positive float64 multipliers."""
    fraction, exponent = torch.frexp(multiplier.double())
    whole = torch.round(fraction * INT32).to(torch.int64)
    shift = 31 - exponent.to(torch.int64)
    full = whole == INT32  # rounded up to the next power of two
    whole, shift = torch.where(full, whole >> 1, whole), torch.where(full, shift - 1, shift)
    excess = (shift - WIDEST_SHIFT).clamp(min=0)  # such a multiplier makes 0 of every int32
    return whole >> excess, shift - excess


def rescale(sums: Tensor, whole: Tensor, shift: Tensor) -> Tensor:
    """round(sums * whole * 2^-shift) in int64, halves up. sums: int32 values; the product fits 63 bits."""
    half = torch.ones_like(shift) << (shift - 1)
    return (sums.to(torch.int64) * whole + half) >> shift


@dataclass(frozen=True)
class Codes:
    """An activation: int32 codes that mean scale * (code - zero)."""

    codes: Tensor
    scale: float
    zero: int

    def values(self) -> Tensor:
        """float32, as the fake-quantised network has them."""
        return (self.codes - self.zero).float() * self.scale


@dataclass(frozen=True)
class Sums:
    """int32 sums that still need their scale: the value is the total of `sums[i] * scale[i]`, scale [C] or [].

    floor, ceiling: a ReLU or ReLU6 that was applied, to be done on the codes.
    """

    sums: tuple[Tensor, ...]
    scale: tuple[Tensor, ...]
    rectified: bool = False
    ceiling: float | None = None


class Match(NamedTuple):
    """How an activation's codes compare with fake quantisation: share that is equal, largest difference in scales."""

    equal: float
    worst: int
    elements: int


class IntegerExecutor:
    """Runs a converted network in integers only: int8 codes in, int32 sums, int8 codes out.

    Args:
        converted: of `convert_static`, traced, with quantised activations.

    Raises:
        UsageError: another model.
        Unsupported: when it runs, naming the first operation without an integer form.
    """

    def __init__(self, converted: nn.Module) -> None:
        if not isinstance(converted, fx.GraphModule) or not any(
            isinstance(module, FixedActivation) for module in converted.modules()
        ):
            raise UsageError("integer execution needs a traced model from convert_static with quantised activations")
        self.model = converted
        self.input = self._input_quantizer()

    def quantize_input(self, x: Tensor) -> Tensor:
        """Codes of float images, as the first quantiser makes them.

        Args:
            x: float [N, C, H, W].

        Returns:
            int32 [N, C, H, W].
        """
        entry = self.input
        codes = torch.round(x * (1.0 / torch.tensor(entry.scale))) + entry.zero
        return codes.clamp(entry.lowest, entry.highest).to(torch.int32)

    def reference(self, codes: Tensor) -> Codes:
        """Codes of the output for codes of the input.

        Args:
            codes: [N, C, H, W], any integer type.

        Returns:
            int32 codes with their scale and zero point; `.values()` are the float32 values.
        """
        return self._run(codes, None)[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Float values of the output for float images.

        Args:
            x: float [N, C, H, W].
        """
        return self.reference(self.quantize_input(x)).values()

    def compare(self, x: Tensor) -> dict[str, Match]:
        """Each quantised activation against fake quantisation, every operation given the same codes to start from.

        Args:
            x: float [N, C, H, W].

        Returns:
            Name of an activation -> share of equal codes, largest difference in codes, number of values.
        """
        recorder = _Recorder(self.model)
        with torch.no_grad():
            recorder.run(x)
        return self._run(self.quantize_input(x), recorder.seen)[1]

    def _input_quantizer(self) -> FixedActivation:
        for node in self.model.graph.nodes:
            if node.op == "placeholder" and is_tensor(node):
                for user in node.users:
                    module = self.model.get_submodule(str(user.target)) if user.op == "call_module" else None
                    if isinstance(module, FixedActivation):
                        return module
        raise UsageError("the model's input is not quantised; integer execution has nothing to start from")

    @torch.no_grad()
    def _run(self, codes: Tensor, expected: dict[fx.Node, Tensor] | None) -> tuple[Codes, dict[str, Match]]:
        state: dict[fx.Node, Any] = {}
        matches: dict[str, Match] = {}
        for node in self.model.graph.nodes:
            if node.op == "placeholder":
                state[node] = Codes(codes.to(torch.int32), self.input.scale, self.input.zero)
            elif node.op == "output":
                result = state[node.args[0]]
                if not isinstance(result, Codes):
                    raise Unsupported("the output is not quantised; integer execution ends in codes")
                return result, matches
            elif is_tensor(node):
                state[node] = self._step(node, state)
                module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
                if expected is not None and isinstance(module, FixedActivation) and module is not self.input:
                    true = torch.round(expected[node].double() / module.scale).to(torch.int32) + module.zero
                    difference = (state[node].codes - true).abs()
                    matches[module.name] = Match(
                        float((difference == 0).double().mean()), int(difference.max()), difference.numel()
                    )
                    state[node] = replace(state[node], codes=true)
        raise UsageError("the graph of the model has no output")

    def _step(self, node: fx.Node, state: dict[fx.Node, Any]) -> Codes | Sums:
        sources = [state[source] for source in tensor_inputs(node)]
        module: Any = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FixedActivation):
            return _requantize(sources[0], module)
        if isinstance(module, StaticLayer):
            return _compute(sources[0], module)
        kind = kind_of(node, self.model)
        if kind == "rectify":
            return _rectify(sources[0], rectified_limit(node, self.model))
        if all(isinstance(source, Codes) for source in sources):
            if kind == "add":
                return Sums(
                    tuple(source.codes - source.zero for source in sources),
                    tuple(torch.tensor(source.scale, dtype=torch.float64) for source in sources),
                )
            if kind == "average":
                return _average(sources[0], node, self.model)
            if kind == "cat":
                return replace(sources[0], codes=self._moved(node, [source.codes for source in sources]))
            if kind == "inherit":
                return _inherit(self, node, sources[0])
        raise Unsupported(f"{node.name} ({kind}) has no integer form here; leave it to the fake-quantised model")

    def _moved(self, node: fx.Node, tensors: list[Tensor]) -> Tensor:
        """The node itself, on integers: operations that only move or select values."""
        order = dict(zip(tensor_inputs(node), tensors, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: order.get(source))
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def _compute(x: Codes, layer: StaticLayer) -> Sums:
    if layer.scheme is None:
        raise Unsupported(f"the weight of {layer.name} is float; integer execution needs weight_bits")
    operation, weight = layer.operation, layer.codes
    scale = layer.scale.double() * x.scale  # [out]
    constant = torch.zeros(len(weight), dtype=torch.int64)
    if layer.bias is not None:
        constant += torch.round(layer.bias.double() / scale).clamp(-INT32, INT32 - 1).to(torch.int64)
    elements = weight[0].numel()
    constant -= x.zero * weight.flatten(1).sum(1, dtype=torch.int64)
    constant += elements * x.zero * layer.zero.to(torch.int64)
    bias = constant.clamp(-INT32, INT32 - 1).to(torch.int32)
    if operation.linear:
        sums = x.codes @ weight.T
        ones = x.codes.sum(-1, keepdim=True, dtype=torch.int32)
        return Sums(((sums - layer.zero * ones + bias),), (scale,))
    codes = F.pad(x.codes, operation.margins(weight.shape[2:]), value=x.zero)  # zero is a code: padding costs nothing
    unpadded = (operation.stride, (0, 0), (1, 1), operation.groups)
    sums = F.conv2d(codes, _spread(weight, operation.dilation), None, *unpadded)
    if bool((layer.zero != 0).any()):
        ones = _spread(torch.ones_like(weight), operation.dilation)
        sums -= layer.zero.reshape(1, -1, 1, 1) * F.conv2d(codes, ones, None, *unpadded)
    return Sums((sums + bias.reshape(1, -1, 1, 1),), (scale.reshape(1, -1, 1, 1),))


def _spread(kernel: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """A dilated kernel written out with its zeros: torch has no dilated convolution of int32."""
    if tuple(dilation) == (1, 1):
        return kernel
    height, width = (d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[2:], strict=True))
    wide = kernel.new_zeros(*kernel.shape[:2], height, width)
    wide[:, :, :: dilation[0], :: dilation[1]] = kernel
    return wide


def _rectify(x: Codes | Sums, ceiling: float | None) -> Codes | Sums:
    if isinstance(x, Sums):
        return replace(x, rectified=True, ceiling=ceiling)
    highest = None if ceiling is None else x.zero + round(ceiling / x.scale)
    return replace(x, codes=x.codes.clamp(x.zero, highest))


def _requantize(x: Codes | Sums, target: FixedActivation) -> Codes:
    """Codes at the target's scale: one rounding, also for the two sums of an addition."""
    if isinstance(x, Codes):
        if (x.scale, x.zero) == (target.scale, target.zero):
            return x
        x = Sums((x.codes - x.zero,), (torch.tensor(x.scale, dtype=torch.float64),))
    if len(x.sums) == 1:
        codes = rescale(x.sums[0], *fixed_point(x.scale[0] / target.scale))
    else:
        factors = [scale / target.scale for scale in x.scale]
        _, shift = fixed_point(torch.stack(factors).max())  # one shift, so that both are rounded together
        wholes = [torch.round(factor * 2.0 ** int(shift)).to(torch.int64) for factor in factors]
        total = sum(part.to(torch.int64) * whole for part, whole in zip(x.sums, wholes, strict=True))
        codes = (total + (torch.ones_like(shift) << (shift - 1))) >> shift
    lowest, highest = target.lowest, target.highest
    if x.rectified:
        lowest = max(lowest, target.zero)
        highest = highest if x.ceiling is None else min(highest, target.zero + round(x.ceiling / target.scale))
    return Codes((codes + target.zero).clamp(lowest, highest).to(torch.int32), target.scale, target.zero)


def _average(x: Codes, node: fx.Node, model: nn.Module) -> Sums:
    """The sum of each window; the division goes into the scale."""
    shifted = x.codes - x.zero
    out = tuple(node.meta["tensor_meta"].shape)
    dims, keep = _mean_dims(node, shifted.ndim)
    if dims is not None:
        count = math.prod(shifted.shape[dim] for dim in dims)
        return Sums((shifted.sum(dims, keepdim=keep, dtype=torch.int32),), (torch.tensor(x.scale / count).double(),))
    kernel, stride = _window(node, model, tuple(shifted.shape[2:]), out[2:])
    windows = shifted.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    scale = torch.tensor(x.scale / (kernel[0] * kernel[1]), dtype=torch.float64)
    return Sums((windows.sum((-1, -2), dtype=torch.int32),), (scale,))


def _mean_dims(node: fx.Node, ndim: int) -> tuple[tuple[int, ...] | None, bool]:
    if node.target not in (torch.mean, "mean"):
        return None, False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", tuple(range(ndim)))
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return (dims,) if isinstance(dims, int) else tuple(dims), bool(keep)  # type: ignore[arg-type]


def _window(
    node: fx.Node, model: nn.Module, size: tuple[int, ...], out: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, int]]:
    module: Any = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.AvgPool2d) or node.target is F.avg_pool2d:
        kernel = module.kernel_size if module else (node.args[1] if len(node.args) > 1 else node.kwargs["kernel_size"])
        stride = module.stride if module else (node.args[2] if len(node.args) > 2 else node.kwargs.get("stride"))
        return _pair(kernel), _pair(stride or kernel)
    if any(whole % part for whole, part in zip(size, out, strict=True)):
        raise Unsupported(f"{node.name}: adaptive pooling of {size} to {out} has windows of different sizes")
    kernel = tuple(whole // part for whole, part in zip(size, out, strict=True))
    return _pair(kernel), _pair(kernel)


def _inherit(executor: IntegerExecutor, node: fx.Node, x: Codes) -> Codes:
    target = executor.model.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    if isinstance(target, nn.Dropout | nn.Dropout2d) or target is F.dropout:
        return x
    # Shifting the zero point to 0 makes padding with zeros the same for integers; max pooling has no int32 kernel in
    # every version of torch, and float64 holds all codes exactly.
    moved = executor._moved(node, [(x.codes - x.zero).double()])
    return replace(x, codes=moved.to(torch.int32) + x.zero)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
