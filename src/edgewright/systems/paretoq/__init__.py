"""ParetoQ (arXiv 2502.02631): one recipe and one family of grids for weights of 1 to 4 bits.

The grids and the training are the core's; here are their names and a reader of the published checkpoints.
"""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.quantization.api import convert_ as convert_, quantize_ as quantize_
    from edgewright.quantization.config import QuantConfig as QuantConfig, WeightConfig as WeightConfig
    from edgewright.quantization.grids import Grid as Grid, grid_for_bits as grid_for_bits, grid_named as grid_named
    from edgewright.systems.paretoq.checkpoint import load_paretoq_state as load_paretoq_state

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Grid": "edgewright.quantization.grids",
        "QuantConfig": "edgewright.quantization.config",
        "WeightConfig": "edgewright.quantization.config",
        "convert_": "edgewright.quantization.api",
        "grid_for_bits": "edgewright.quantization.grids",
        "grid_named": "edgewright.quantization.grids",
        "load_paretoq_state": "edgewright.systems.paretoq.checkpoint",
        "quantize_": "edgewright.quantization.api",
    },
)
