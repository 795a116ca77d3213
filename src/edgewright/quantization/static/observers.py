"""Ranges of activations: watched while a model runs, then turned into the scale and zero point of its integers.

Source: arXiv 1806.08342, section 2.5: activations are quantised per layer, their range a moving average of the
extremes of each batch; weights need no observer, their true extremes are known.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgewright.checks import check_fields, number, one_of
from edgewright.errors import FormatError, UsageError
from edgewright.quantization.affine import AffineScheme, fake_quantize
from edgewright.quantization.static.freezing import FreezeClock

MODES = ("ema", "minmax", "percentile")
PERCENTILE_SAMPLES = 1 << 20  # values of a batch that a percentile is taken from, evenly spaced


@dataclass(frozen=True)
class ObserverConfig:
    """How the range of an activation is watched.

    Args:
        mode: "ema" (moving average of batch extremes), "minmax" (widest seen) or "percentile" (average of the batches'
            quantiles, which leaves out the share 1 - percentile at each end).
        decay: of the moving average, corrected for its start.
        percentile: above 0.5.

    Raises:
        UsageError: a field breaks its rule.
    """

    mode: str = "ema"
    decay: float = 0.999
    percentile: float = 0.9999

    def __post_init__(self) -> None:
        rules = {"mode": one_of(*MODES), "decay": number(above=0, below=1), "percentile": number(above=0.5, most=1)}
        check_fields(self, rules)


class RangeObserver(nn.Module):
    """The range of what passes, float32 buffers `low` and `high`, and `count`, the number of batches seen.

    fixed: a range that is known beforehand, such as (0, 6) behind ReLU6; nothing is then watched.
    Under torch.distributed each batch's extremes are those over all processes.
    """

    low: Tensor
    high: Tensor
    count: Tensor

    def __init__(self, name: str, config: ObserverConfig, fixed: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.name, self.config, self.fixed = name, config, fixed
        low, high = fixed or (0.0, 0.0)
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take the range of one batch into account. Raises FormatError when it holds NaN or infinity."""
        if self.fixed is not None:
            return
        extremes = self._extremes(x.detach())
        _across_processes(extremes)
        if not bool(torch.isfinite(extremes).all()):
            raise FormatError(f"the activation {self.name} holds NaN or infinity; its range cannot be set")
        low, high = -extremes[0], extremes[1]
        self.count += 1
        if self.config.mode == "minmax":
            weight = torch.ones_like(low)
            low = torch.where(self.count > 1, torch.minimum(low, self.low), low)
            high = torch.where(self.count > 1, torch.maximum(high, self.high), high)
        elif self.config.mode == "ema":
            # deviation: the average is corrected for its start, else 100 batches would hardly move the first one's.
            weight = ((1 - self.config.decay) / (1 - self.config.decay ** self.count.double())).float()
        else:
            weight = 1 / self.count.float()
        self.low.lerp_(low, weight)
        self.high.lerp_(high, weight)

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high), 0-dimensional. Raises UsageError when nothing was seen."""
        if self.fixed is None and int(self.count) == 0:
            raise UsageError(
                f"the activation {self.name} has no range yet; run calibrate_(model, batches) with at least one batch"
            )
        return self.low, self.high

    def _extremes(self, x: Tensor) -> Tensor:
        """[-low, high] of one batch, so that one maximum over processes settles both."""
        flat = x.float().reshape(-1)
        if self.config.mode != "percentile":
            low, high = torch.aminmax(flat)
        else:
            flat = flat[:: max(1, -(-flat.numel() // PERCENTILE_SAMPLES))].sort().values  # NaN sorts last
            last = flat.numel() - 1
            cut = round((1 - self.config.percentile) * last)
            low, high = flat[cut], torch.where(flat[last].isnan(), flat[last], flat[last - cut])
        return torch.stack((-low, high))

    def extra_repr(self) -> str:
        return f"{self.name}, {self.low.item():.4g}..{self.high.item():.4g}"


class ActivationQuantizer(nn.Module):
    """Watches and fake-quantises one activation, the same shape out as in.

    `watching` and `quantizing` switch the two halves. In training it always watches until `clock` freezes it.
    """

    def __init__(
        self,
        name: str,
        scheme: AffineScheme,
        config: ObserverConfig,
        fixed: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.scheme = name, scheme
        self.observer = RangeObserver(name, config, fixed)
        self.watching, self.quantizing = False, True
        self.clock = FreezeClock()

    def parameters_of_codes(self) -> tuple[Tensor, Tensor]:
        """(scale, zero point), 0-dimensional."""
        return self.scheme.parameters(*self.observer.range(), self.name)

    def warn_if_constant(self) -> bool:
        """True, with a warning that names the activation, when it was zero throughout."""
        low, high = self.observer.range()
        if float(low) == 0.0 and float(high) == 0.0:
            warnings.warn(
                f"the activation {self.name} was 0 in every calibration batch; its scale is set to the smallest one",
                stacklevel=3,
            )
            return True
        return False

    def forward(self, x: Tensor) -> Tensor:
        if (self.training and self.clock.tick()) or (self.watching and not bool(self.clock.frozen)):
            self.observer.observe(x)
        if not self.quantizing:
            return x
        return fake_quantize(x, *self.parameters_of_codes(), self.scheme)

    def extra_repr(self) -> str:
        return f"bits={self.scheme.bits}"


class FixedActivation(nn.Module):
    """An activation's fake quantisation with constants, as converted models and exporters want it."""

    def __init__(self, name: str, scheme: AffineScheme, scale: float, zero: int) -> None:
        super().__init__()
        self.name, self.scheme, self.scale, self.zero = name, scheme, scale, zero
        self.lowest, self.highest = scheme.code_range

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, self.lowest, self.highest)

    def extra_repr(self) -> str:
        return f"{self.name}, scale={self.scale:.4g}, zero={self.zero}, codes {self.lowest}..{self.highest}"


def _across_processes(extremes: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
