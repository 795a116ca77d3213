"""Storage of every low-bit tensor of the house: value = step * (code + offset).

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
