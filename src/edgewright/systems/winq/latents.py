"""The trained float weights behind quantised ones, wherever they live, and the pull towards their grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.io.bits import pack_codes, unpack_codes
from edgewright.quantization.api import PACKED, quantized_modules
from edgewright.quantization.layers import QuantEmbedding, WeightQuantizer
from edgewright.systems.parq.proximal import ProxHard


@dataclass(frozen=True)
class PackedCodes:
    """Integer codes of one weight at `width` bits each (1, 2, 4 or 8), for counting later which ones changed."""

    data: Tensor  # uint8, on the CPU
    width: int

    @classmethod
    def of(cls, codes: Tensor, low: int, width: int) -> PackedCodes:
        """From int8 codes of any shape whose smallest value is `low`."""
        flat = (codes.reshape(-1) - low).view(torch.uint8).cpu()  # wraps around as it should at 8 bits
        return cls(pack_codes(flat, width), width)

    def differing(self, other: PackedCodes) -> int:
        """How many codes are not the same."""
        return int(unpack_codes(self.data ^ other.data, self.width).count_nonzero())


@dataclass(frozen=True)
class Latent:
    """One weight under training and how it is quantised.

    values: from a weight like it to its quantised values, without noise. quantizer: of the layer that it belongs to, or
    None. rotation: orthogonal H [in, in] of a quantiser that acts on the rows w of the weight as H w, or None. held:
    where the latent is now, for an optimizer that keeps it outside of the parameter.
    """

    name: str
    parameter: Tensor
    values: Callable[[Tensor], Tensor]
    quantizer: WeightQuantizer | None = None
    rotation: Tensor | None = None
    held: Callable[[], Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The latent weight itself, not a copy."""
        return self.parameter if self.held is None else self.held()

    @property
    def dynamic(self) -> bool:
        """The clip scales follow the weight."""
        return self.quantizer is not None and self.quantizer.quantizer.identity_gradient

    @property
    def code_width(self) -> int:
        if self.quantizer is None:
            return 8
        grid = self.quantizer.quantizer.grid
        return next(width for width in (1, 2, 4, 8) if grid.high - grid.low < 2**width)

    def codes(self) -> PackedCodes:
        """Codes of the weight as it is now; only for layers of this package."""
        assert self.quantizer is not None
        low = self.quantizer.quantizer.grid.low
        return PackedCodes.of(self.quantizer.pack(self.weight).codes, low, self.code_width)

    @torch.no_grad()
    def gap(self) -> float:
        """|W - Q(W)|^2 (of HW where there is a rotation)."""
        matrix = _rotated(self.weight, self.rotation)
        return float((self.values(matrix).float() - matrix.float()).square().sum())

    @torch.no_grad()
    def sizes(self) -> tuple[float, float]:
        """Mean |W| and mean |alpha|."""
        assert self.quantizer is not None
        return float(self.weight.float().abs().mean()), float(self.quantizer.alpha(self.weight).float().abs().mean())


@torch.no_grad()
def interpolate_(
    weight: Tensor, values: Callable[[Tensor], Tensor], pull: float, rotation: Tensor | None = None
) -> Tensor:
    """W <- (1 - pull) W + pull Q(W) in place; with H = rotation: W <- H^T ((1 - pull) H W + pull Q(H W)).

    H acts on the input side, each row w of W counting as H w. `lerp_` and not two products: its rounding can not carry
    a weight over the border of its cell.
    """
    if rotation is None:
        return weight.lerp_(values(weight).to(weight.dtype), pull)
    rotated = _rotated(weight, rotation)
    rotated.lerp_(values(rotated).to(rotated.dtype), pull)
    return weight.copy_((rotated @ rotation.to(rotated)).reshape(weight.shape))


def latent_weights(model: nn.Module, optimizer: Any = None) -> list[Latent]:
    """Every trainable weight under quantisation, each once: those of linear and convolution layers, and of PARQ.

    Embeddings are left out, as in the paper; so is a head that shares their table. Raises UsageError if there is none.
    """
    modules = quantized_modules(model)
    seen = {id(module.weight) for _, module in modules if isinstance(module, QuantEmbedding)}
    latents: list[Latent] = []
    for name, module in modules:
        if module.quantizer is None or id(module.weight) in seen or not module.weight.requires_grad:
            continue
        seen.add(id(module.weight))
        latents.append(Latent(name, module.weight, _values_of(module.quantizer), module.quantizer))
    if hasattr(optimizer, "hard_tensors"):
        latents += _optimizer_latents(model, optimizer)
    if not latents:
        packed = any(isinstance(module, PACKED) for module in model.modules())
        reason = "its layers are packed integers" if packed else "no linear or convolution layer is under quantisation"
        raise UsageError(
            f"the model has no quantised weight that trains ({reason}); call quantize_(model, config) and leave "
            "requires_grad on"
        )
    return latents


def _values_of(quantizer: WeightQuantizer) -> Callable[[Tensor], Tensor]:
    def values(weight: Tensor) -> Tensor:
        quantized = quantizer.values(weight.detach())
        # a centred weight is pulled within its own coordinates, so that its mean stays out of it
        return quantized + weight.detach().mean() if quantizer.config.center else quantized

    return values


def _optimizer_latents(model: nn.Module, optimizer: Any) -> Iterator[Latent]:
    """Those of a `parq.QuantOptimizer`: before its map begins the parameters themselves, afterwards its own copies.

    The model's weights follow at the next step of the optimizer, which maps the latents again.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def latent_of(parameter: nn.Parameter, group: dict[str, Any]) -> Latent:
        def values(weight: Tensor) -> Tensor:
            if parameter not in optimizer.targets:
                optimizer.hard_tensors()  # fits the targets that are missing
            shrink = max(1.0, group["cumulative_lr"]) if optimizer.quant_shrink else 1.0
            hard = optimizer.map_(parameter, weight.detach(), group, ProxHard(), 0, torch.empty_like(weight))
            return hard * shrink if shrink != 1.0 else hard

        def held() -> Tensor:
            return optimizer.latents.get(parameter, parameter)

        return Latent(names.get(id(parameter), "weight"), parameter, values, held=held)

    for group in optimizer.quantized_groups():
        for parameter in group["params"]:
            if parameter.requires_grad:
                yield latent_of(parameter, group)


def _rotated(weight: Tensor, rotation: Tensor | None) -> Tensor:
    if rotation is None:
        return weight.detach()
    matrix = weight.detach().reshape(weight.shape[0], -1).float()
    return matrix @ rotation.to(matrix).t()
