"""What is left to do on an ONNX graph: placeholders become standard operators, codes become integer initialisers.

FakeQuantize of a weight -> its recorded 8-bit codes and DequantizeLinear; of an activation -> Clip (for ranges that are
no full 8 bits), QuantizeLinear, DequantizeLinear. Dequantize -> DequantizeLinear of int4 or 8 bits. Unpack -> shifts,
masks and a product. Float weights that nothing reads any more leave the file.

`eight_bits` decides in which of the two 8-bit types codes are stored. ONNX Runtime's kernels for x86 without VNNI
multiply unsigned inputs by signed weights in pairs and clip each pair's sum to 16 bits: 255 * 127 * 2 is twice of what
fits. Signed inputs are made unsigned first, so they suffer alike. Their kernels for unsigned weights are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from edgewright.errors import Unsupported
from edgewright.export.onnx.layers import DOMAIN
from edgewright.export.onnx.trace import Rounding

Value = Any  # onnx_ir.Value
Integers = Literal["unsigned", "signed"]


def eight_bits(codes: np.ndarray, zero: np.ndarray, integers: Integers) -> tuple[np.ndarray, np.ndarray]:
    """(codes, zero points) of the same values in the type that `integers` asks for; 8-bit arrays only.

    "unsigned": int8 becomes uint8, both numbers 128 higher, which is exact on every CPU. "signed": as they are.
    """
    if integers == "signed" or codes.dtype != np.int8:
        return codes, zero
    return (codes.astype(np.int16) + 128).astype(np.uint8), (zero.astype(np.int16) + 128).astype(np.uint8)


def lower(model: Any, calls: Sequence[Rounding], producer: str, integers: Integers) -> dict[str, int]:
    """Replace every placeholder of an `onnx_ir.Model` in place; counts of the operators that hold codes.

    Raises Unsupported for a fake quantisation whose scale depends on the input.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    builders: dict[str, Callable[..., Value]] = {
        "FakeQuantize": lambda build, node: _fake_quantize(build, node, calls, integers),
        "Dequantize": lambda build, node: _dequantize(build, node, integers),
        "Unpack": _unpack,
    }
    for node in list(model.graph.all_nodes()):
        if node.domain != DOMAIN:
            continue
        build = _Builder(ir, model.graph, node)
        result = builders[node.op_type](build, node)
        old = node.outputs[0]
        result.shape, result.type = old.shape, old.type
        if old.is_graph_output():  # it carries the name that was asked for
            old.name, result.name = None, old.name
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)
    common.RemoveUnusedNodesPass()(model)
    common.DeduplicateInitializersPass(size_limit=1 << 40)(model)
    common.RemoveUnusedOpsetsPass()(model)
    _clean(model)
    model.producer_name, model.producer_version = producer, None
    return _counts(model)


def name_axes(model: Any, free: Sequence[Sequence[int]], names: Mapping[int, str]) -> None:
    """Give the free axes of inputs readable names, everywhere in the graph: axis 0 "batch", axis 1 "length"."""
    import onnx_ir as ir

    table: dict[str, str] = {}
    for value, axes in zip(model.graph.inputs, free, strict=True):
        for axis in axes:
            old = value.shape[axis]
            if isinstance(old, ir.SymbolicDim) and old.value is not None:
                table[old.value] = names.get(axis, f"axis_{axis}")
    values = {id(value): value for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        values.update((id(value), value) for value in node.outputs)
    for value in values.values():
        if value.shape is not None and not value.shape.frozen:
            value.shape = ir.Shape([_renamed(ir, size, table) for size in value.shape])


def _renamed(ir: Any, size: Any, table: Mapping[str, str]) -> Any:
    if isinstance(size, ir.SymbolicDim) and size.value in table:
        return ir.SymbolicDim(table[size.value])
    return size


class _Builder:
    """New nodes and initialisers in front of one placeholder."""

    def __init__(self, ir: Any, graph: Any, node: Any) -> None:
        self.ir, self.graph, self.node = ir, graph, node
        source = node.inputs[0]
        self.base = source.name if is_constant(source) else node.outputs[0].name.lstrip("_")
        self.count = 0

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{self.base}_{kind.lower()}_{self.count}"

    def constant(self, kind: str, array: np.ndarray, dtype: Any = None) -> Value:
        """An initialiser. dtype: an onnx_ir.DataType where NumPy has no such type (INT4)."""
        name = self.name(kind)
        tensor = self.ir.Tensor(array, dtype=dtype, name=name)
        shape = self.ir.Shape(array.shape)
        value = self.ir.Value(name=name, shape=shape, type=self.ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def op(self, kind: str, inputs: Sequence[Value | None], **attributes: Any) -> Value:
        given = [self.ir.Attr(k, _attribute_type(self.ir, v), v) for k, v in attributes.items()]
        name = self.name(kind)
        node = self.ir.Node("", kind, list(inputs), given, name=name, num_outputs=1)
        node.outputs[0].name = name
        self.graph.insert_before(self.node, node)
        return node.outputs[0]


def _attribute_type(ir: Any, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return ir.AttributeType.INTS
    if isinstance(value, str):
        return ir.AttributeType.STRING
    return ir.AttributeType.FLOAT if isinstance(value, float) else ir.AttributeType.INT


def _fake_quantize(build: _Builder, node: Any, calls: Sequence[Rounding], integers: Integers) -> Value:
    x, scale = node.inputs
    number = node.attributes["call"].as_int()
    if number >= len(calls):
        raise Unsupported(
            "the model quantises more often under export than when it runs; make its calls of torch.fake_quantize_* "
            "independent of torch.compiler.is_exporting() and of its input"
        )
    call = calls[number]
    if not is_constant(scale):
        raise Unsupported(
            f"the fake quantisation {node.name} computes its scale from the input; QuantizeLinear takes fixed scales: "
            "calibrate the model first"
        )
    axis = {} if call.axis is None else {"axis": call.axis}
    codes, step = call.codes.numpy(), call.scale.float().numpy()
    zero = call.zero_point.to(call.codes.dtype).numpy()
    wide = codes.dtype == np.int32
    if wide and zero.any():
        raise Unsupported(
            "a 32-bit fake quantisation has a zero point; DequantizeLinear takes 32 bits without one only"
        )
    low_code, high_code = call.low, call.high
    if codes.dtype == np.int8 and integers == "unsigned":
        low_code, high_code = low_code + 128, high_code + 128
    codes, zero = eight_bits(codes, zero, integers)
    scale_value = build.constant("scale", step)
    zero_value = build.constant("zero_point", zero)
    if is_constant(x):
        stored = build.constant("codes", codes)
        # a bias of 32 bits is symmetric by definition
        return build.op("DequantizeLinear", [stored, scale_value, *([] if wide else [zero_value])], **axis)
    if wide:
        raise Unsupported(
            f"an activation is quantised to {call.low}..{call.high}; QuantizeLinear takes ranges within int8 or uint8"
        )
    bounds = (-128, 127) if codes.dtype == np.int8 else (0, 255)
    if (low_code, high_code) != bounds:
        if call.axis is not None:
            raise Unsupported(f"an activation quantised per channel to {call.low}..{call.high}; give it one scale")
        low = np.float32((low_code - int(zero)) * step)
        high = np.float32((high_code - int(zero)) * step)
        x = build.op("Clip", [x, build.constant("low", low.reshape(())), build.constant("high", high.reshape(()))])
    quantized = build.op("QuantizeLinear", [x, scale_value, zero_value], **axis)
    quantized.type = build.ir.TensorType(zero_value.dtype)
    quantized.shape = node.inputs[0].shape
    return build.op("DequantizeLinear", [quantized, scale_value, zero_value], **axis)


def _dequantize(build: _Builder, node: Any, integers: Integers) -> Value:
    codes, scales = node.inputs
    array = codes.const_value.numpy()
    zeros: list[Value] = []
    if node.attributes["bits"].as_int() == 4:
        dtype: Any = build.ir.DataType.INT4
        codes = build.constant("codes", array.astype(dtype.numpy()), dtype)
    elif integers == "unsigned":
        array, zero = eight_bits(array, np.zeros(len(array), np.int8), integers)
        codes, zeros = build.constant("codes", array), [build.constant("zero_point", zero)]
    return build.op("DequantizeLinear", [codes, scales, *zeros], axis=0)


def _unpack(build: _Builder, node: Any) -> Value:
    words, scales = node.inputs  # uint8 [n, blocks, bytes], float32 [n, blocks]
    bits, columns = node.attributes["bits"].as_int(), node.attributes["columns"].as_int()
    zero = node.attributes["zero"].as_float()
    blocks, size = (int(n) for n in words.shape[1:])
    per = 8 // bits
    if bits < 8:
        shifts = build.constant("shifts", (np.arange(per) * bits).astype(np.uint8))
        last = build.constant("axis", np.array([-1], np.int64))
        mask = build.constant("mask", np.array(2**bits - 1, np.uint8))
        shifted = build.op("BitShift", [build.op("Unsqueeze", [words, last]), shifts], direction="RIGHT")
        words = build.op("BitwiseAnd", [shifted, mask])
        words = build.op("Reshape", [words, build.constant("shape", np.array([-1, blocks, size * per], np.int64))])
    numbers = build.op("Cast", [words], to=int(build.ir.DataType.FLOAT))
    centred = build.op("Sub", [numbers, build.constant("zero", np.array(zero, np.float32))])
    wide = build.op("Unsqueeze", [scales, build.constant("axis", np.array([-1], np.int64))])
    values = build.op("Mul", [centred, wide])
    rows = build.op("Reshape", [values, build.constant("shape", np.array([-1, blocks * size * per], np.int64))])
    if columns == blocks * size * per:
        return rows
    bounds = [
        build.constant(name, np.array([n], np.int64)) for name, n in (("start", 0), ("end", columns), ("axis", 1))
    ]
    return build.op("Slice", [rows, *bounds])


def is_constant(value: Value) -> bool:
    """Whether a value is fixed: an initialiser, or computed from initialisers alone."""
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen or current.const_value is not None:
            continue
        seen.add(id(current))
        producer = current.producer()
        if producer is None:
            return False
        if producer.op_type in ("RandomNormal", "RandomUniform"):
            return False
        pending += producer.inputs
    return True


def _clean(model: Any) -> None:
    """Names of the model's own, and nothing of the exporter's stack traces, which hold paths of this machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for values in (model.graph.inputs, model.graph.outputs, model.graph.initializers.values()):
        for value in values:
            value.metadata_props.clear()
    for name, value in list(model.graph.initializers.items()):
        if name.startswith("model."):
            value.name = name.removeprefix("model.")
    model.graph.name = "edgewright"


def _counts(model: Any) -> dict[str, int]:
    kinds = ("MatMulNBits", "DequantizeLinear", "QuantizeLinear", "BitwiseAnd")
    found = dict.fromkeys(kinds, 0)
    for node in model.graph.all_nodes():
        if node.op_type in found:
            found[node.op_type] += 1
    return {kind: count for kind, count in found.items() if count}
