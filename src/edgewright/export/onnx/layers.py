"""Packed layers as an ONNX graph sees them: the codes of a PackedTensor laid out for a runtime's operator.

A code c becomes a stored unsigned number q = c + shift, and its value (q - zero) * scale. With steps per row or per
group that is exact: `scale` is the step, or the step times a power of two where the offset of the grid is a half.

    4 bits    q = c + 8 (seq2: 2c + 1 + 8, half the step)   MatMulNBits, its default zero point
    8 bits    q = c + 128                                   MatMulNBits, its default zero point
    2 bits    q = c + 2, zero 2 (seq2: 1.5)                 MatMulNBits with 2 bits, a zero point in floating point
    1 bit     q = (c + 1) / 2, zero 0.5, twice the step     a small subgraph that unpacks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import Unsupported
from edgewright.io.bits import pack_codes, unpack_codes
from edgewright.io.own_forward import refuse_own_forwards
from edgewright.io.packed import CODE_RANGES, PackedConv2d, PackedEmbedding, PackedLinear, PackedTensor

Storage = Literal["nibbles", "smallest"]
TWO_BIT_RUNTIME = (1, 27)  # the first version of ONNX Runtime whose MatMulNBits takes 2 bits on a CPU

DOMAIN = "edgewright"  # of the placeholders that `onnx_graph` replaces; no file keeps one
BLOCKS = (16, 32, 64, 128, 256)  # block sizes that MatMulNBits computes fast
SCALE_BYTES = 4
TRUE_BITS = {"binary": 1, "ternary": 2, "seq2": 2, "int2": 2, "int3": 4, "int4": 4, "int8": 8}  # int3 has no packing


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, columns] in blocks along its rows.

    words: uint8 [rows, blocks, block * bits / 8], the first code in the low bits. scales: float32 [rows, blocks].
    The last block of a row is filled up with codes of value zero where `columns` does not divide.
    """

    words: Tensor
    scales: Tensor
    bits: int
    zero: float
    columns: int

    @property
    def block(self) -> int:
        return self.words.shape[2] * 8 // self.bits

    def unpack(self) -> Tensor:
        """The float32 matrix that the blocks stand for: what `MatMulNBits` multiplies by."""
        codes = unpack_codes(self.words, self.bits)  # [rows, blocks, block]
        values = (codes.float() - self.zero) * self.scales.unsqueeze(-1)
        return values.reshape(len(self.words), -1)[:, : self.columns]


def stored_numbers(packed: PackedTensor, bits: int) -> tuple[Tensor, Tensor, float]:
    """(q int32 [rows, columns], scales float32 [rows, groups], zero) of a packed matrix at `bits` a code."""
    codes, step = packed.codes.to(torch.int32), packed.step.to(torch.float32)
    if bits == 1:
        return (codes + 1) // 2, step * 2, 0.5
    half = 2 ** (bits - 1)
    if packed.offset and bits == 2:
        return codes + half, step, half - packed.offset
    if packed.offset:
        return 2 * codes + 1 + half, step / 2, float(half)
    return codes + half, step, float(half)


def pack_blocks(packed: PackedTensor, bits: int, block: int) -> Blocks:
    """Lay out a matrix; `block` divides the groups of the steps, or is free where a row has one step."""
    numbers, scales, zero = stored_numbers(packed, bits)
    rows, columns = numbers.shape
    count = -(-columns // block)
    if count * block > columns:
        # zero is a stored number only where it is whole; elsewhere what stands there meets no input
        numbers = F.pad(numbers, (0, count * block - columns), value=int(zero))
    words = pack_codes(numbers.reshape(rows, count, block), bits)
    return Blocks(words, scales.repeat_interleave(count // scales.shape[1], dim=1).contiguous(), bits, zero, columns)


def matmul_block(columns: int, group: int, bits: int, zero_bytes: int = 0) -> int | None:
    """The block size of the fewest bytes for MatMulNBits, or None where no power of two fits the groups."""

    def row_bytes(block: int) -> int:
        return -(-columns // block) * (block * bits // 8 + SCALE_BYTES + zero_bytes)

    fitting = [block for block in BLOCKS if group == columns or group % block == 0]
    return min(fitting, key=lambda block: (row_bytes(block), -block)) if fitting else None


def linear_bits(packed: PackedTensor, storage: Storage) -> int:
    """Bits of a code in the file of a linear layer."""
    true = TRUE_BITS[packed.grid]
    return true if storage == "smallest" or true == 8 else 4


def _check_kernel(bits: int) -> None:
    """Raise Unsupported where the ONNX Runtime at hand cannot multiply codes of so many bits."""
    import onnxruntime

    version = onnxruntime.__version__
    if bits == 2 and tuple(map(int, version.split(".")[:2])) < TWO_BIT_RUNTIME:
        raise Unsupported(
            f"onnxruntime {version} cannot multiply codes of 2 bits; use storage='nibbles' or onnxruntime 1.27 or newer"
        )


def symbolic(op: str, inputs: list[Tensor | None], shape: list[Any], **attributes: Any) -> Tensor:
    """A node of another domain in a graph under export; float32 out."""
    attributes = {name: value for name, value in attributes.items() if value is not None}
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=torch.float32, shape=shape, version=1)


class _Blocked(nn.Module):
    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.bits, self.zero, self.columns, self.block = blocks.bits, blocks.zero, blocks.columns, blocks.block
        self.register_buffer("codes", blocks.words)
        self.register_buffer("scales", blocks.scales)

    def unpacked(self, words: Any, scales: Any) -> Tensor:
        """Rows [n, columns] of words [n, blocks, bytes] and scales [n, blocks]."""
        attributes = {"bits": self.bits, "zero": self.zero, "columns": self.columns}
        return symbolic(f"{DOMAIN}::Unpack", [words, scales], [words.shape[0], self.columns], **attributes)


class BlockedLinear(_Blocked):
    """PackedLinear as MatMulNBits, or as an unpacked weight where a code has one bit."""

    def __init__(self, layer: PackedLinear, blocks: Blocks) -> None:
        super().__init__(blocks)
        self.bias, self.input_quantizer = layer.bias, layer.input_quantizer
        self.rows = layer.out_features
        whole = blocks.zero == 2 ** (blocks.bits - 1)
        points = None if whole or blocks.bits == 1 else torch.full_like(blocks.scales, blocks.zero)
        self.register_buffer("zero_points", points)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        if self.bits == 1:
            return F.linear(x, self.unpacked(self.codes, self.scales), self.bias)
        stored: list[Any] = [self.codes, self.scales, self.zero_points]
        y = symbolic(
            "com.microsoft::MatMulNBits",
            [x, *(part for part in stored if part is not None)],
            [*x.shape[:-1], self.rows],
            K=self.columns,
            N=self.rows,
            bits=self.bits,
            block_size=self.block,
        )
        return y if self.bias is None else y + self.bias


class BlockedEmbedding(_Blocked):
    """PackedEmbedding as a gather of words, unpacked after it: only the rows in use become floats."""

    def forward(self, tokens: Tensor) -> Tensor:
        flat = tokens.reshape(-1)
        codes: Any = self.codes
        scales: Any = self.scales
        rows = self.unpacked(codes.index_select(0, flat), scales.index_select(0, flat))
        return rows.reshape(*tokens.shape, self.columns)


class _Dequantized(nn.Module):
    """A weight as DequantizeLinear of signed codes: one scale a row, or a group as a row of its own."""

    def __init__(self, layer: PackedConv2d | PackedLinear, shape: tuple[int, ...]) -> None:
        super().__init__()
        packed = layer.packed
        high = CODE_RANGES[packed.grid][1]
        codes = 2 * packed.codes + 1 if packed.offset else packed.codes
        self.shape, self.bias, self.input_quantizer = shape, layer.bias, layer.input_quantizer
        # integer kernels take 8-bit weights only, and they are used where the input is of integers too
        self.bits = 4 if high <= 7 and layer.input_quantizer is None else 8
        rows = packed.step.numel()
        self.register_buffer("codes", codes.reshape(shape if rows == shape[0] else (rows, packed.group)).contiguous())
        self.register_buffer("scales", (packed.step / 2 if packed.offset else packed.step).reshape(-1).contiguous())

    def weight(self) -> Tensor:
        codes: Any = self.codes
        scales: Any = self.scales
        values = symbolic(f"{DOMAIN}::Dequantize", [codes, scales], list(codes.shape), bits=self.bits)
        return values if codes.shape == self.shape else values.reshape(self.shape)


class DequantizedConv2d(_Dequantized):
    """PackedConv2d as DequantizeLinear and Conv."""

    def __init__(self, layer: PackedConv2d) -> None:
        super().__init__(layer, layer.kernel_shape)
        self.options: Any = (layer.stride, layer.padding, layer.dilation, layer.conv_groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return F.conv2d(x, self.weight(), self.bias, *self.options)


class DequantizedLinear(_Dequantized):
    """PackedLinear whose groups fit no block of MatMulNBits: DequantizeLinear and MatMul."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__(layer, (layer.out_features, layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return F.linear(x, self.weight(), self.bias)


def replace_packed_(model: nn.Module, storage: Storage) -> list[str]:
    """Replace, in place, the packed layers of a model that is about to be exported; returns their names.

    Layers that share codes (a tied embedding and head) share them in the file too.
    """
    refuse_own_forwards(model, "an ONNX file")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _PACKED)]
    tables: dict[int, nn.Module] = {}
    for name, layer in sorted(layers, key=lambda item: isinstance(item[1], PackedEmbedding)):  # linear layers choose
        replacement = _REPLACEMENTS[type(layer)](layer, storage, tables.get(layer.codes.data_ptr()))
        if isinstance(replacement, _Blocked):
            tables.setdefault(layer.codes.data_ptr(), replacement)
        replacement.train(layer.training)
        model.set_submodule(name, replacement)
    return [name for name, _ in layers]


def _linear(layer: PackedLinear, storage: Storage, shared: Any) -> nn.Module:
    packed = layer.packed
    bits = linear_bits(packed, storage)
    half_offset = SCALE_BYTES if bits == 2 and packed.offset else 0
    block = matmul_block(layer.in_features, packed.group, bits, half_offset)
    if block is None:
        return DequantizedLinear(layer)
    _check_kernel(bits)
    return BlockedLinear(layer, shared_blocks(shared) or pack_blocks(packed, bits, block))


def _embedding(layer: PackedEmbedding, storage: Storage, shared: Any) -> nn.Module:
    packed = layer.packed
    bits = TRUE_BITS[packed.grid]
    while packed.group * bits % 8:  # a group that ends inside a byte takes wider codes
        bits *= 2
    return BlockedEmbedding(shared_blocks(shared) or pack_blocks(packed, bits, packed.group))


def shared_blocks(replacement: Any) -> Blocks | None:
    """The blocks that another module of the same codes holds."""
    return (
        None
        if replacement is None
        else Blocks(replacement.codes, replacement.scales, replacement.bits, replacement.zero, replacement.columns)
    )


_PACKED = (PackedLinear, PackedEmbedding, PackedConv2d)
_REPLACEMENTS: dict[type, Callable[[Any, Storage, Any], nn.Module]] = {
    PackedLinear: _linear,
    PackedEmbedding: _embedding,
    PackedConv2d: lambda layer, storage, shared: DequantizedConv2d(layer),
}
