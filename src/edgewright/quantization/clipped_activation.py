"""Clipped min-max activations: cut to [-c, c], then quantised over the range that is left, straight-through.

TBT (arXiv 2306.01841) at 8 bits: clamp to [-2.5, 2.5], then the dynamic min-max of `activations.py`, symmetric or with
one zero point; dL/dx = 0 where |x| >= 2.5. The cut suits encoder-decoders with layer norms behind every block. It is
off wherever the package decides for itself about a decoder-only model, whose outliers carry meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from edgewright.checks import check_fields, number, optional
from edgewright.quantization.activations import fake_quantize_activation
from edgewright.quantization.config import ActivationConfig
from edgewright.quantization.elastic import refuse_nan

PUBLISHED_CLIP = 2.5


@dataclass(frozen=True)
class ClippedActivationConfig:
    """An `InputConfig` (TBT, arXiv 2306.01841).

    Args:
        bits: 2 to 16.
        clip: where activations are cut, above 0; None: nowhere. Published is 2.5.
        granularity: one scale per "tensor" as published, which lets the other sentences of a batch change the result,
            or per "token".
        symmetric: False is for tensors of one sign and refuses NaN by the layer's name.

    Raises:
        UsageError: a setting out of its range.
    """

    bits: int = 8
    clip: float | None = PUBLISHED_CLIP
    granularity: Literal["token", "tensor"] = "token"
    symmetric: bool = True
    plain: ActivationConfig = field(init=False, repr=False)  # what happens after the cut

    def __post_init__(self) -> None:
        check_fields(self, {"clip": optional(number(above=0))})
        plain = ActivationConfig(self.bits, self.granularity, self.symmetric, official_clip_grad=self.clip)
        object.__setattr__(self, "plain", plain)

    def build(self, layer: str, features: int) -> nn.Module:
        return ClippedActivation(self, layer)


class ClippedActivation(nn.Module):
    """Cut and quantise; no state. [..., features] -> the same."""

    def __init__(self, config: ClippedActivationConfig, layer: str = "") -> None:
        super().__init__()
        self.config = config
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if not self.config.symmetric:
            refuse_nan(x, self.layer)
        if self.config.clip is not None:
            # The clamp's own gradient is one at the ends; the quantiser, which sees |x| = clip there, makes it zero.
            x = x.clamp(-self.config.clip, self.config.clip)
        return fake_quantize_activation(x, self.config.plain, layer=self.layer)

    def extra_repr(self) -> str:
        return f"bits={self.config.bits}, clip={self.config.clip}, per {self.config.granularity}"
