"""The int8 whitepaper (arXiv 1806.08342): integer-only networks, after training or with it.

The method itself serves the main job and is in `edgewright.quantization.static`; here are its names and its study.
"""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.quantization.static.config import StaticConfig as StaticConfig
    from edgewright.quantization.static.integer import IntegerExecutor as IntegerExecutor
    from edgewright.quantization.static.network import (
        calibrate_ as calibrate_,
        convert_static as convert_static,
        quantize_static as quantize_static,
        static_report as static_report,
    )
    from edgewright.quantization.static.sqnr import feature_sqnr as feature_sqnr, sqnr_report as sqnr_report
    from edgewright.quantization.static.training import StaticTraining as StaticTraining, train_static as train_static

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "IntegerExecutor": "edgewright.quantization.static.integer",
        "StaticConfig": "edgewright.quantization.static.config",
        "StaticTraining": "edgewright.quantization.static.training",
        "calibrate_": "edgewright.quantization.static.network",
        "convert_static": "edgewright.quantization.static.network",
        "feature_sqnr": "edgewright.quantization.static.sqnr",
        "quantize_static": "edgewright.quantization.static.network",
        "sqnr_report": "edgewright.quantization.static.sqnr",
        "static_report": "edgewright.quantization.static.network",
        "train_static": "edgewright.quantization.static.training",
    },
)
