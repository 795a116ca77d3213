"""Storage of every low-bit tensor of the package: value = step * (code + offset).

Grids (in `quantization`) produce these, exporters pack the integer codes, and nothing ever re-quantises the floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import Unsupported

# Name -> (lowest code, highest code, offset). The one table that grids, checkpoints and exporters share.
CODE_RANGES: dict[str, tuple[int, int, float]] = {
    "binary": (-1, 1, 0.0),  # only -1 and +1 occur
    "ternary": (-1, 1, 0.0),
    "seq2": (-2, 1, 0.5),
    "int2": (-2, 1, 0.0),
    "int3": (-4, 3, 0.0),
    "int4": (-8, 7, 0.0),
    "int8": (-128, 127, 0.0),
}


@dataclass(frozen=True)
class PackedTensor:
    """Integer codes of a matrix with one step per row or per group of `group` consecutive inputs.

    codes: int8 [out, in]. step: float32 [out, in / group], each exactly representable in bfloat16 unless snapping was
    switched off. Entry (r, c) means `step[r, c // group] * (codes[r, c] + offset)`.
    """

    codes: Tensor
    step: Tensor
    grid: str

    @property
    def offset(self) -> float:
        return CODE_RANGES[self.grid][2]

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.step.shape[1]

    def dequantize(self) -> Tensor:
        """The float32 matrix [out, in] that the codes stand for."""
        rows, columns = self.codes.shape
        values = self.codes.to(torch.float32).reshape(rows, self.step.shape[1], -1)
        if self.offset:
            values.add_(self.offset)
        return values.mul_(self.step.unsqueeze(-1)).reshape(rows, columns)


class _Packed(nn.Module):
    """Codes and steps as buffers; the float matrix exists only inside `forward`.

    input_quantizer: module in front of the layer where its input is quantised too.
    """

    codes: Tensor
    step: Tensor

    def __init__(self, packed: PackedTensor, input_quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.grid = packed.grid
        self.input_quantizer = input_quantizer
        self.register_buffer("codes", packed.codes)
        self.register_buffer("step", packed.step)

    @property
    def packed(self) -> PackedTensor:
        return PackedTensor(self.codes, self.step, self.grid)

    @property
    def weight(self) -> Tensor:
        """The dequantised float32 matrix [out, in], built on each access."""
        return self.packed.dequantize()

    def extra_repr(self) -> str:
        rows, columns = self.codes.shape
        return f"{columns} -> {rows}, grid={self.grid}, group={self.packed.group}"


class PackedLinear(_Packed):
    """A linear layer whose weight is stored as a PackedTensor. Input [..., in], output [..., out]."""

    def __init__(
        self, packed: PackedTensor, bias: Tensor | None = None, input_quantizer: nn.Module | None = None
    ) -> None:
        super().__init__(packed, input_quantizer)
        self.out_features, self.in_features = packed.codes.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            inputs = self.input_quantizer(inputs)
        return F.linear(inputs, self.weight.to(inputs.dtype), self.bias)


class PackedEmbedding(_Packed):
    """An embedding table stored as a PackedTensor. Input int64 [...], output [..., width] in `dtype`."""

    def __init__(
        self, packed: PackedTensor, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim = packed.codes.shape
        self.padding_idx = padding_idx
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        rows = PackedTensor(self.codes[tokens.reshape(-1)], self.step[tokens.reshape(-1)], self.grid).dequantize()
        return rows.reshape(*tokens.shape, self.embedding_dim).to(self.dtype)


class PackedConv2d(_Packed):
    """Convolution, its weight a PackedTensor [out, in / groups * height * width]. [N, C, H, W] -> [N, out, H', W']."""

    def __init__(self, packed: PackedTensor, conv: nn.Conv2d, input_quantizer: nn.Module | None = None) -> None:
        super().__init__(packed, input_quantizer)
        self.kernel_shape = tuple(conv.weight.shape)
        self.stride, self.padding, self.dilation, self.conv_groups = (
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        if conv.padding_mode != "zeros":
            raise Unsupported(f"convolution with padding_mode={conv.padding_mode!r} cannot be packed; only 'zeros' can")
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            inputs = self.input_quantizer(inputs)
        weight = self.weight.reshape(self.kernel_shape).to(inputs.dtype)
        return F.conv2d(inputs, weight, self.bias, self.stride, self.padding, self.dilation, self.conv_groups)


class PackedStack(_Packed):
    """A stack of matrices [E, out, in] as one PackedTensor. Called, it gives all of them; indexed, it decodes one.

    group_axis "in": codes [E * out, in], groups along the inputs; "out": codes [E * in, out], groups along the outputs.
    """

    def __init__(
        self, packed: PackedTensor, count: int, group_axis: str = "in", input_quantizer: nn.Module | None = None
    ) -> None:
        super().__init__(packed, input_quantizer)
        self.count, self.group_axis = count, group_axis

    @property
    def stack_shape(self) -> tuple[int, int, int]:
        rows, columns = self.codes.shape[0] // self.count, self.codes.shape[1]
        return (self.count, rows, columns) if self.group_axis == "in" else (self.count, columns, rows)

    @property
    def weight(self) -> Tensor:
        """The dequantised float32 stack [E, out, in], built on each access."""
        return as_stack(self.packed.dequantize(), self.count, self.group_axis)

    def __getitem__(self, index: int) -> Tensor:
        rows = self.codes.shape[0] // self.count
        part = slice(index * rows, (index + 1) * rows)
        matrix = PackedTensor(self.codes[part], self.step[part], self.grid).dequantize()
        return matrix if self.group_axis == "in" else matrix.t()

    def forward(self) -> Tensor:
        return self.weight


def as_matrix(weight: Tensor, group_axis: str = "in") -> Tensor:
    """Rows whose entries share steps: [out, ...] as [out, in]; [E, out, in] as [E * out, in] or [E * in, out]."""
    if weight.ndim != 3:
        return weight.reshape(weight.shape[0], -1)
    return (weight if group_axis == "in" else weight.transpose(1, 2)).flatten(0, 1)


def as_stack(matrix: Tensor, count: int, group_axis: str = "in") -> Tensor:
    """The stack [E, out, in] that `as_matrix` took apart."""
    stack = matrix.unflatten(0, (count, -1))
    return stack if group_axis == "in" else stack.transpose(1, 2)
