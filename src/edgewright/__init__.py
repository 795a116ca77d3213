"""edgewright: models for the device in your hand. Shrink them, train them cheaply, check them, ship them.

The public names below are imported on first use, so that `import edgewright` costs nothing and loads no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "edgewright.io.models",
    "fit": "edgewright.training.loop",
    "TrainConfig": "edgewright.training.loop",
    "quantize_": "edgewright.quantization.api",
    "convert_": "edgewright.quantization.api",
    "dequantize_": "edgewright.quantization.api",
    "WeightConfig": "edgewright.quantization.config",
    "ActivationConfig": "edgewright.quantization.config",
    "KVConfig": "edgewright.quantization.config",
    "QuantConfig": "edgewright.quantization.config",
    "export_gguf": "edgewright.export.gguf",
    "export_executorch": "edgewright.export.executorch",
    "export_onnx": "edgewright.export.onnx",
    "open_engine": "edgewright.runtime.engine",
    "open_program": "edgewright.runtime.program",
    "evaluate_language": "edgewright.evaluation.language",
    "Report": "edgewright.measure.report",
    "EdgewrightError": "edgewright.errors",
    "run_recipe": "edgewright.recipes.recipe",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgewright' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
