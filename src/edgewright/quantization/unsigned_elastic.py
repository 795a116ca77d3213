"""Elastic quantisation of tensors that have a floor, such as attention probabilities and the output of a GELU.

TBT (arXiv 2306.01841) at three levels: subtract the minimum, take alpha * clip(round(x / alpha), 0, 2), add the minimum
back; at two levels alpha * clip(round(x / alpha), 0, 1) without a minimum. The published minimum is that of the whole
tensor, so that the other tokens of a batch change the result; what generates token by token needs one of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.quantization.clipped_activation import refuse_nan
from edgewright.quantization.elastic import ElasticConfig, ElasticQuantizer


@dataclass(frozen=True)
class UnsignedElasticConfig:
    """An `InputConfig`. levels: "binary", "ternary" or a width of 2 to 8 bits.

    floor: the minimum that is subtracted: of each "token" (the last dimension), of the "tensor" as published, or
    "zero", which is that of probabilities whether or not a mask put a zero among them.
    deviation: "token" and "zero" make the result for a token independent of all others; training uses them too.
    """

    levels: Literal["binary", "ternary"] | int = "ternary"
    floor: Literal["token", "tensor", "zero"] = "token"

    def __post_init__(self) -> None:
        if self.floor not in ("token", "tensor", "zero"):
            raise UsageError(f"floor={self.floor!r}; choose 'token', 'tensor' or 'zero'")
        ElasticConfig(self.levels, signed=False, shift=False)  # which checks the levels

    def build(self, layer: str, features: int) -> nn.Module:
        return UnsignedElastic(self, layer)


class UnsignedElastic(nn.Module):
    """[..., features] -> the same; one learned scale, which starts from the first batch. Raises FormatError on NaN."""

    def __init__(self, config: UnsignedElasticConfig, layer: str = "") -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.quantizer = ElasticQuantizer(ElasticConfig(config.levels, signed=False, shift=False), layer)

    def forward(self, x: Tensor) -> Tensor:
        refuse_nan(x, self.layer)
        if not self.quantizer.is_calibrated():
            self.quantizer.calibrate(x)  # from the tensor as it is, before any floor
        if self.config.levels == "binary" or self.config.floor == "tensor":
            return self.quantizer(x)
        if self.config.floor == "zero":
            # The quantiser subtracts the minimum of what it gets: a zero beside the probabilities makes that zero.
            return self.quantizer(F.pad(x, (0, 1)))[..., :-1]
        floor = x.detach().amin(-1, keepdim=True)
        return self.quantizer(x - floor) + floor

    def extra_repr(self) -> str:
        return f"floor={self.config.floor}"
