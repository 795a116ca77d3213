"""Gaussian noise on a weight and its clip scales that is drawn again wherever it is needed, instead of being kept.

A fused layer recomputes its quantised weight in backward, and gradient checkpointing runs a forward twice; both must
meet the same noise. So the layer carries a `Noise`, a few numbers from which the perturbed operands follow bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from edgewright.quantization.scales import SMALLEST_ALPHA

# deviation: the noise of a weight is a window of one table of normal numbers, at a random place and with a random sign.
# Drawing them anew costs 7 ns a number on a CPU, three times what the fake quantiser itself takes; a window costs 0.3.
TABLE = 1 << 22
WINDOW = 1 << 21  # at most this much from one place; a longer weight takes several


@dataclass(frozen=True)
class Noise:
    """Noise on a weight and its clip scales (WinQ, arXiv 2605.17471).

    Args:
        seed: names the draw.
        sigma, sigma_scale: standard deviations on the weight and on the clip scales, in the units of the weight.
        shared_scale: the matrix has one clip scale, so one number is added to all of its entries.
    """

    seed: int
    sigma: float
    sigma_scale: float
    shared_scale: bool = False

    @torch.no_grad()
    def perturb(self, weight: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Perturbed operands; what has no noise is returned as it is. A clip scale keeps its sign and at least 1e-5.

        Args:
            weight: [rows, columns].
            alpha: [rows, groups].

        Returns:
            (weight + sigma * N, alpha + sigma_scale * N'), float32
        """
        generator = torch.Generator().manual_seed(self.seed)
        if self.sigma_scale:
            shape = (1, 1) if self.shared_scale else alpha.shape
            drawn = torch.randn(shape, generator=generator).to(alpha.device)
            moved = alpha.float() + self.sigma_scale * drawn
            alpha = torch.where(alpha < 0, moved.clamp(max=-SMALLEST_ALPHA), moved.clamp(min=SMALLEST_ALPHA))
        if self.sigma:
            flat = weight.reshape(-1)
            noisy = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            for part, out in zip(flat.split(WINDOW), noisy.view(-1).split(WINDOW), strict=True):
                start = int(torch.randint(TABLE - part.numel() + 1, (), generator=generator))
                sign = 1 - 2 * int(torch.randint(2, (), generator=generator))
                numbers = _table(str(weight.device))[start : start + part.numel()]
                torch.add(part, numbers, alpha=sign * self.sigma, out=out)
            weight = noisy
        return weight, alpha


@cache
def _table(device: str) -> Tensor:
    """The normal numbers, the same ones on every device; 16 MB of float32."""
    return torch.randn(TABLE, generator=torch.Generator().manual_seed(0)).to(device)
