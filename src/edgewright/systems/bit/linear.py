"""Packed binary layers: what a trained BiT layer becomes, 64 signs a word and multiplied as bits; and their ONNX file.

    pack_binary_(student)      # QuantLinear and QuantEmbedding on the binary grid -> the modules below, in place

A layer whose input is binary too multiplies by counting ones (kernels/popcount.py); a layer with other inputs, or none
quantised, unpacks its signs and multiplies as a float layer.

An .onnx file holds the signs as uint8 initialisers, unfolded by a small subgraph in front of MatMul. It is as small as
the words in memory. ONNX Runtime has no kernel for bits: it unfolds the signs into floats when it loads the file, so
the size on disk shrinks, its memory and its arithmetic do not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, one_of
from edgewright.errors import Unsupported, UsageError
from edgewright.export.onnx.exporter import OnnxExport, export_onnx
from edgewright.io.own_forward import has_own_forward, original_class
from edgewright.io.packed import PackedEmbedding, PackedLinear, PackedTensor
from edgewright.kernels.popcount import PATHS, WORD, binary_linear, pack_bits, tile, unpack_bits, unpack_signs
from edgewright.quantization.api import quantized_modules
from edgewright.quantization.elastic import SMALLEST_ALPHA, ElasticQuantizer, elastic_codes
from edgewright.quantization.layers import QuantEmbedding, QuantLinear


class BinaryLinear(nn.Module):
    """A linear layer of signs. float32 [..., in] -> [..., out].

    words: int64 [out, ceil(in / 64)]. alpha_w: [1] or [out]. input_quantizer: the trained quantiser of the input, or
    None. path: see `binary_linear`; it matters only where the input is binary.

    With alpha the scales and c the codes, a binary input gives (alpha_w * alpha_x) * sum(c_x * c_w) + bias: the integer
    sum is exact and rounding happens once, where the float layer rounds in every addition.
    """

    words: Tensor
    alpha_w: Tensor

    def __init__(
        self,
        words: Tensor,
        in_features: int,
        alpha_w: Tensor,
        bias: Tensor | None = None,
        input_quantizer: nn.Module | None = None,
        path: str = "auto",
    ) -> None:
        super().__init__()
        if words.shape[1] != -(-in_features // WORD) or alpha_w.shape not in ((1,), (len(words),)):
            raise UsageError(
                f"words {list(words.shape)} and alpha_w {list(alpha_w.shape)} do not fit {in_features} inputs"
            )
        check("path", path, one_of(*PATHS))
        self.in_features, self.out_features, self.path = in_features, len(words), path
        self.register_buffer("words", words)
        self.register_buffer("alpha_w", alpha_w)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.input_quantizer = None if input_quantizer is None else input_quantizer.requires_grad_(False)
        self._tiles: Tensor | None = None
        self.register_load_state_dict_post_hook(_forget_tiles)

    @property
    def binary_input(self) -> bool:
        """Whether both factors are bits."""
        quantizer = self.input_quantizer
        return isinstance(quantizer, ElasticQuantizer) and quantizer.config.levels == "binary"

    @property
    def weight(self) -> Tensor:
        """The float32 matrix [out, in], built on each access."""
        return unpack_signs(self.words, self.in_features) * self.alpha_w.unsqueeze(1)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.binary_input:
            if self.input_quantizer is not None:
                inputs = self.input_quantizer(inputs)
            return F.linear(inputs, self.weight.to(inputs.dtype), self.bias)
        quantizer: Any = self.input_quantizer
        if self._tiles is None or self._tiles.device != self.words.device:
            self._tiles = tile(self.words)
        return binary_linear(
            inputs,
            self.words,
            alpha_x=quantizer.alpha.clamp(min=SMALLEST_ALPHA),
            alpha_w=self.alpha_w,
            shift=quantizer.shift,
            bias=self.bias,
            signed=quantizer.config.signed,
            tiles=self._tiles,
            path=self.path,
        ).to(inputs.dtype)

    def exportable(self) -> nn.Module:
        """The same layer on the packed layers of the package, which exporters know."""
        if self.binary_input:
            return CodesLinear(self)
        packed = _packed_tensor(self.words, self.in_features, self.alpha_w)
        return PackedLinear(packed, self.bias, self.input_quantizer)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {'binary' if self.binary_input else 'other'} input"


class BinaryEmbedding(nn.Module):
    """An embedding table of signs with one scale a row. int64 [...] -> float32 [..., width]."""

    words: Tensor
    alpha_w: Tensor

    def __init__(self, words: Tensor, width: int, alpha_w: Tensor, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = len(words), width, padding_idx
        self.register_buffer("words", words)
        self.register_buffer("alpha_w", alpha_w)  # [rows]

    def forward(self, tokens: Tensor) -> Tensor:
        flat = tokens.reshape(-1)
        signs = unpack_signs(self.words[flat], self.embedding_dim)
        return (signs * self.alpha_w[flat].unsqueeze(1)).reshape(*tokens.shape, self.embedding_dim)

    def exportable(self) -> nn.Module:
        """The same table as a packed layer of the package."""
        return PackedEmbedding(_packed_tensor(self.words, self.embedding_dim, self.alpha_w), self.padding_idx)


class CodesLinear(nn.Module):
    """A BinaryLinear with binary inputs for exporters: the input's codes times a PackedLinear with both scales."""

    def __init__(self, layer: BinaryLinear) -> None:
        super().__init__()
        quantizer: Any = layer.input_quantizer
        self.quantizer = quantizer
        alpha = quantizer.alpha.clamp(min=SMALLEST_ALPHA)
        self.linear = PackedLinear(_packed_tensor(layer.words, layer.in_features, layer.alpha_w * alpha), layer.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        quantizer: Any = self.quantizer
        shift, config = quantizer.shift, quantizer.config
        alpha = quantizer.alpha.clamp(min=SMALLEST_ALPHA)
        low, high = config.bounds
        return self.linear(elastic_codes(inputs if shift is None else inputs + shift, alpha, low, high, config.signed))


@torch.no_grad()
def pack_binary_(model: nn.Module, path: str = "auto") -> nn.Module:
    """Replace, in place, every layer on the binary grid by its packed form.

    Args:
        model: of `binarize_encoder_`, whose activations have scales.
        path: how layers with binary inputs multiply, see `kernels.popcount.binary_linear`.

    Returns:
        The model.

    Raises:
        UsageError: nothing is binary, or the scale of an activation was never set.
        Unsupported: a binary layer with a forward of its own.
    """
    for name, module in model.named_modules():
        if isinstance(module, ElasticQuantizer) and not module.is_calibrated():
            raise UsageError(f"{name} has no scale yet: run a batch of 16 or more sentences through the model first")
    found = [
        (name, module)
        for name, module in quantized_modules(model)
        if module.quantizer is not None and module.quantizer.config.grid == "binary"
    ]
    if not found:
        raise UsageError("no layer is on the binary grid; pack_binary_ needs a model of binarize_encoder_")
    for name, module in found:
        model.set_submodule(name, _packed(name, module, path).train(module.training))
    return model


def _packed(name: str, module: Any, path: str) -> nn.Module:
    quantizer: Any = module.quantizer
    if has_own_forward(module):
        raise Unsupported(
            f"layer {name} is a quantised {original_class(module).__name__}, whose own forward a binary layer cannot "
            "keep; convert_(model) packs it"
        )
    tensor = quantizer.pack(module.weight)
    if tensor.step.shape[1] != 1:
        raise UsageError(f"layer {name} has {tensor.step.shape[1]} scales a row; packed binary layers have one or none")
    words, alpha = pack_bits(tensor.codes > 0), tensor.step[:, 0].clone()
    if isinstance(module, QuantEmbedding):
        return BinaryEmbedding(words, module.embedding_dim, alpha, module.padding_idx)
    if not isinstance(module, QuantLinear):
        raise UsageError(f"layer {name} is a {type(module).__name__}; only linear layers and embeddings are packed")
    if quantizer.config.granularity == "tensor":
        alpha = alpha[:1].clone()
    return BinaryLinear(words, module.in_features, alpha, module.bias, module.input_quantizer, path)


@dataclass(frozen=True)
class SizeRow:
    """One tensor of a packed model: how many numbers it stands for, its bytes in float32 and as stored."""

    name: str
    kind: str  # "bits", "scale", "threshold" or "float"
    numbers: int
    float_bytes: int
    bytes: int


def size_rows(model: nn.Module) -> list[SizeRow]:
    """The size of every stored tensor. Scales and thresholds, which the float model does not have, count 0 there."""
    rows = []
    binary: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear | BinaryEmbedding)
    }
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        stored = tensor.numel() * tensor.element_size()
        if owner in binary and leaf == "words":
            layer = binary[owner]
            wide = layer.in_features if isinstance(layer, BinaryLinear) else layer.embedding_dim
            numbers = len(tensor) * wide
            rows.append(SizeRow(name, "bits", numbers, 4 * numbers, stored))
        elif leaf in ("alpha_w", "alpha", "calibrated"):
            rows.append(SizeRow(name, "scale", tensor.numel(), 0, stored))
        elif leaf == "shift":
            rows.append(SizeRow(name, "threshold", tensor.numel(), 0, stored))
        else:
            rows.append(SizeRow(name, "float", tensor.numel(), 4 * tensor.numel(), stored))
    return rows


def _forget_tiles(module: nn.Module, _: Any) -> None:
    assert isinstance(module, BinaryLinear)
    module._tiles = None


def _packed_tensor(words: Tensor, n: int, alpha: Tensor) -> PackedTensor:
    """The package's form of packed signs: int8 codes and one scale a row."""
    codes = unpack_bits(words, n).to(torch.int8) * 2 - 1
    return PackedTensor(codes, alpha.detach().float().expand(len(words)).unsqueeze(1).clone(), "binary")


# A sum in another order moves a value across a threshold now and then, and one flipped bit moves a whole unit.
FLIPPED_TOLERANCE = 0.5


def export_binary_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    tolerance: float = FLIPPED_TOLERANCE,
) -> OnnxExport:
    """Write a packed model as .onnx, run the file in ONNX Runtime and compare.

    Args:
        model: that went through `pack_binary_`.
        path: of the file.
        example_inputs: by name; by default what `export_onnx` takes for the model.
        tolerance: largest difference allowed, relative to the largest value of an output.

    Returns:
        What `export_onnx` returns.

    Raises:
        UsageError: the model has no packed binary layer.
    """
    exported = copy.deepcopy(model)
    found = [(name, module) for name, module in exported.named_modules() if hasattr(module, "exportable")]
    if not found:
        raise UsageError("the model has no packed binary layer; call pack_binary_(model) first, or export_onnx")
    for name, module in found:
        exported.set_submodule(name, module.exportable())
    return export_onnx(exported, path, example_inputs=example_inputs, tolerance=tolerance, storage="smallest")
