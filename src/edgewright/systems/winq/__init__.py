"""WinQ (arXiv 2605.17471): low-bit training that has stalled, moved on by weight interpolation and noise."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.winq.spectrum import (
        Spectrum as Spectrum,
        hessian_spectrum as hessian_spectrum,
        quantized_spectrum as quantized_spectrum,
    )
    from edgewright.systems.winq.training import WinQ as WinQ

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Spectrum": "edgewright.systems.winq.spectrum",
        "WinQ": "edgewright.systems.winq.training",
        "hessian_spectrum": "edgewright.systems.winq.spectrum",
        "quantized_spectrum": "edgewright.systems.winq.spectrum",
    },
)
