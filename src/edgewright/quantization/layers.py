"""Fake-quantised forms of nn.Linear, nn.Embedding, nn.Conv2d, and of stacks of matrices such as a layer's experts.

Each shares the parameter object of the layer it replaces (same state_dict name, tied weights stay tied) and adds
`weight_scale` [out, groups]: the clip scale alpha, a trained parameter or a fixed buffer, absent where the scale is
recomputed from the weight at every forward.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import FormatError
from edgewright.io.packed import (
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    PackedStack,
    PackedTensor,
    as_matrix,
    as_stack,
)
from edgewright.quantization.config import SCALE_DTYPES, WeightConfig
from edgewright.quantization.fake_quantize import Quantizer, fake_quantize, fake_quantized_linear
from edgewright.quantization.noise import Noise
from edgewright.quantization.scales import DYNAMIC_RULES, grouped, initial_alpha


class WeightQuantizer(nn.Module):
    """The clip scales of one weight matrix and the rule that gives them. Shared by modules that share the weight.

    Args:
        weight: [out, in], [out, in, h, w] or a stack [E, out, in].
        config: grid, groups and scales.
        layer: its name, for errors.
        group_axis: of a stack, the axis along which the groups of a scale run.

    Attributes:
        noise: what linear and convolution layers add to both while they train, or None (see `systems.winq`).

    Raises:
        FormatError: a NaN or infinite weight.
        UsageError: a group that does not divide a row.
    """

    def __init__(self, weight: Tensor, config: WeightConfig, layer: str, group_axis: str = "in") -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.group_axis = group_axis
        self.noise: Noise | None = None
        matrix = as_matrix(weight.detach(), group_axis)
        if not torch.isfinite(matrix).all():
            raise FormatError(f"weight of layer {layer} holds NaN or infinity; it cannot be quantised")
        self.groups = config.groups(matrix.shape[1], layer)
        dynamic = config.scale in DYNAMIC_RULES
        self.quantizer = Quantizer(
            config.grid_object, SCALE_DTYPES[config.scale_dtype], dynamic, config.official_ternary_grad
        )
        self.weight_scale: Tensor | None
        if dynamic:
            self.register_buffer("weight_scale", None)
            return
        rule = config.initial if config.scale == "learned" else config.scale
        alpha = self._alpha_from(matrix, rule)
        if config.scale == "learned":
            self.weight_scale = nn.Parameter(alpha)
        else:
            self.register_buffer("weight_scale", alpha)

    def _alpha_from(self, matrix: Tensor, rule: str) -> Tensor:
        """Alpha [out, groups] float32 by a scale rule, one common value when the granularity is the whole tensor."""
        rows = matrix.shape[0]
        weights = matrix.float()
        if self.config.granularity == "tensor":
            flat = weights.reshape(1, 1, -1)
            return initial_alpha(flat, self.quantizer.grid, rule, self.quantizer.scale_dtype).expand(rows, 1).clone()
        return initial_alpha(grouped(weights, self.groups), self.quantizer.grid, rule, self.quantizer.scale_dtype)

    def alpha(self, weight: Tensor) -> Tensor:
        """Clip scales [out, groups]: the stored ones, or recomputed from the weight (then without gradient)."""
        if self.weight_scale is None:
            return self._alpha_from(as_matrix(weight.detach(), self.group_axis), self.config.scale)
        if self.config.granularity == "tensor":  # one value: the gradient reaches it through the mean over rows
            return self.weight_scale.mean().expand_as(self.weight_scale)
        return self.weight_scale

    def operands(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(matrix [out, in] whose codes are taken, clip scales [out, groups]) of a weight, for any fake quantiser."""
        matrix = as_matrix(weight, self.group_axis)
        alpha = self.alpha(weight)
        return (matrix - matrix.detach().mean() if self.config.center else matrix), alpha

    def values(self, weight: Tensor, noise: Noise | None = None) -> Tensor:
        """The weight as it will ship, in its own shape and dtype, with straight-through gradients; or a noisy one."""
        matrix, alpha = self.operands(weight)
        values = fake_quantize(matrix, alpha, self.quantizer, noise=noise)
        return as_stack(values, weight.shape[0], self.group_axis) if weight.ndim == 3 else values.reshape(weight.shape)

    @torch.no_grad()
    def pack(self, weight: Tensor) -> PackedTensor:
        """Integer codes and rounded scales of the weight."""
        if not torch.isfinite(weight).all():
            raise FormatError(f"weight of layer {self.layer} holds NaN or infinity; it cannot be converted")
        codes, scale = self.quantizer.encode(*self.operands(weight.detach()))
        return PackedTensor(codes.to(torch.int8), scale, self.quantizer.grid.name)


class QuantModule(Protocol):
    """What `quantize_` puts in and `convert_` takes out."""

    weight: Tensor
    quantizer: WeightQuantizer | None

    def packed(self) -> nn.Module: ...


class QuantLinear(nn.Linear):
    """Linear layer computing with its quantised weight and, if asked, a quantised input. [..., in] -> [..., out].

    Args:
        linear: whose parameters it shares.
        quantizer: of the weight; None: the weight stays.
        input_quantizer: [..., in] -> the same; None: the input stays.
    """

    original: type[nn.Module] = nn.Linear

    def __init__(
        self,
        linear: nn.Linear,
        quantizer: WeightQuantizer | None,
        input_quantizer: nn.Module | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own constructor would allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.quantizer = quantizer
        self.input_quantizer = input_quantizer
        self.train(linear.training)

    @property
    def latent(self) -> Tensor:
        """The float weight that training changes; see `io.own_forward` for layers whose `weight` may be another."""
        return self.weight

    def forward(self, inputs: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            inputs = self.input_quantizer(inputs)
        if self.quantizer is None:
            return F.linear(inputs, self.latent, self.bias)
        matrix, alpha = self.quantizer.operands(self.latent)
        noise = self.quantizer.noise if self.training else None
        return fake_quantized_linear(inputs, matrix, alpha, self.bias, self.quantizer.quantizer, noise)

    def packed(self) -> nn.Module:
        """The converted layer: codes instead of floats; the plain layer where only the input was quantised."""
        if self.quantizer is None:
            return self
        return PackedLinear(self.quantizer.pack(self.weight), self.bias, self.input_quantizer)


class QuantEmbedding(nn.Embedding):
    """Embedding whose rows are quantised as they are looked up. int64 [...] -> [..., width].

    Args:
        embedding: whose table it shares.
        quantizer: of the table.
    """

    original: type[nn.Module] = nn.Embedding

    def __init__(self, embedding: nn.Embedding, quantizer: WeightQuantizer) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.weight = embedding.weight
        self.quantizer = quantizer
        self.train(embedding.training)

    @property
    def latent(self) -> Tensor:
        """The float weight that training changes; see `io.own_forward` for layers whose `weight` may be another."""
        return self.weight

    def forward(self, tokens: Tensor) -> Tensor:
        flat = tokens.reshape(-1)
        weight = self.latent
        rows = F.embedding(flat, weight, self.padding_idx)  # [tokens, width]
        scale = self.quantizer.weight_scale
        if scale is None and self.quantizer.config.granularity != "tensor":
            alpha = self.quantizer.alpha(rows)  # a row's own scale needs only that row
        else:
            alpha = F.embedding(flat, self.quantizer.alpha(weight))
        if self.quantizer.config.center:
            rows = rows - weight.detach().mean()
        values = fake_quantize(rows, alpha, self.quantizer.quantizer, weight.numel())
        return values.reshape(*tokens.shape, self.embedding_dim)

    def packed(self) -> nn.Module:
        return PackedEmbedding(self.quantizer.pack(self.weight), self.padding_idx, self.weight.dtype)


class QuantConv2d(nn.Conv2d):
    """2-D convolution with a quantised weight; rows are output channels. [N, C, H, W] -> [N, out, H', W'].

    Args:
        conv: whose parameters it shares.
        quantizer: of the weight; None: the weight stays.
        input_quantizer: [N, C, H, W] -> the same; None: the input stays.
    """

    original: type[nn.Module] = nn.Conv2d

    def __init__(
        self,
        conv: nn.Conv2d,
        quantizer: WeightQuantizer | None,
        input_quantizer: nn.Module | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in conv.__dict__.items() if k not in ("_parameters", "_modules")})
        self._parameters = dict(conv._parameters)
        self._modules = {}
        self.quantizer = quantizer
        self.input_quantizer = input_quantizer

    @property
    def latent(self) -> Tensor:
        """The float weight that training changes; see `io.own_forward` for layers whose `weight` may be another."""
        return self.weight

    def forward(self, inputs: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            inputs = self.input_quantizer(inputs)
        weight = self.latent
        if self.quantizer is not None:
            weight = self.quantizer.values(weight, self.quantizer.noise if self.training else None)
        return self._conv_forward(inputs, weight, self.bias)

    def packed(self) -> nn.Module:
        if self.quantizer is None:
            return self
        return PackedConv2d(self.quantizer.pack(self.weight), self, self.input_quantizer)


class WeightStack(nn.Module):
    """A parameter [E, out, in] seen as a layer. A module offers such parameters by naming them in `weight_stacks`.

    The owner takes the quantised stack in the parameter's place.

    Args:
        weight: [E, out, in].
        group_axis: the owner's, "in" where it has none.
        foreign: the owner is a class of transformers (`io.expert_stacks`).
    """

    def __init__(self, weight: nn.Parameter, group_axis: str = "in", foreign: bool = False) -> None:
        super().__init__()
        self.weight, self.group_axis, self.foreign = weight, group_axis, foreign


class QuantStack(nn.Module):
    """A stack of matrices [E, out, in] under quantisation; called without arguments it gives them as they will ship.

    The owner multiplies, and puts its inputs through `input_quantizer` where there is one.

    Args:
        stack: whose parameter it shares.
        quantizer: of the matrices; None: they stay.
        input_quantizer: [..., in] -> the same; None: inputs stay.
    """

    def __init__(
        self, stack: WeightStack, quantizer: WeightQuantizer | None, input_quantizer: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.weight, self.group_axis = stack.weight, stack.group_axis
        self.quantizer = quantizer
        self.input_quantizer = input_quantizer

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def forward(self) -> Tensor:
        if self.quantizer is None:
            return self.weight
        return self.quantizer.values(self.weight, self.quantizer.noise if self.training else None)

    def packed(self) -> nn.Module:
        if self.quantizer is None:
            return self
        codes = self.quantizer.pack(self.weight)
        return PackedStack(codes, self.weight.shape[0], self.group_axis, self.input_quantizer)
