"""edgewright: models for the device in your hand. Shrink them, train them cheaply, check them, ship them.

The public names below are imported on first use, so that `import edgewright` costs nothing and loads no torch.
"""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.compression.pipeline import compress as compress
    from edgewright.compression.settings import CompressSettings as CompressSettings
    from edgewright.distillation.language import LanguageDistillation as LanguageDistillation
    from edgewright.distillation.self_generation import self_generate as self_generate
    from edgewright.errors import (
        EdgewrightError as EdgewrightError,
        FormatError as FormatError,
        UsageError as UsageError,
    )
    from edgewright.evaluation.language import evaluate_language as evaluate_language
    from edgewright.export.executorch.exporter import export_executorch as export_executorch
    from edgewright.export.gguf.exporter import export_gguf as export_gguf
    from edgewright.export.huggingface import save_quantized as save_quantized
    from edgewright.export.onnx.exporter import export_onnx as export_onnx
    from edgewright.io.models import load as load
    from edgewright.io.text import load_texts as load_texts, token_blocks as token_blocks
    from edgewright.measure.report import Report as Report
    from edgewright.models.decoder.config import EdgeDecoderConfig as EdgeDecoderConfig
    from edgewright.models.decoder.model import new_decoder as new_decoder
    from edgewright.models.decoder.pretrain import PretrainSettings as PretrainSettings, pretrain as pretrain
    from edgewright.pruning.depth import prune_depth_ as prune_depth_
    from edgewright.pruning.width import prune_mlp_ as prune_mlp_
    from edgewright.quantization.api import convert_ as convert_, dequantize_ as dequantize_, quantize_ as quantize_
    from edgewright.quantization.config import (
        ActivationConfig as ActivationConfig,
        KVConfig as KVConfig,
        QuantConfig as QuantConfig,
        Rule as Rule,
        WeightConfig as WeightConfig,
    )
    from edgewright.quantization.gptq import gptq_ as gptq_
    from edgewright.runtime.benchmark import benchmark_files as benchmark_files
    from edgewright.runtime.engine import open_engine as open_engine
    from edgewright.runtime.program import open_program as open_program
    from edgewright.systems.recipe import load_recipe as load_recipe, run_recipe as run_recipe
    from edgewright.training.batches import BlockBatches as BlockBatches
    from edgewright.training.config import TrainConfig as TrainConfig
    from edgewright.training.loop import (
        TrainingInterrupted as TrainingInterrupted,
        TrainResult as TrainResult,
        fit as fit,
    )

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "ActivationConfig": "edgewright.quantization.config",
        "BlockBatches": "edgewright.training.batches",
        "CompressSettings": "edgewright.compression.settings",
        "EdgeDecoderConfig": "edgewright.models.decoder.config",
        "EdgewrightError": "edgewright.errors",
        "FormatError": "edgewright.errors",
        "KVConfig": "edgewright.quantization.config",
        "LanguageDistillation": "edgewright.distillation.language",
        "PretrainSettings": "edgewright.models.decoder.pretrain",
        "QuantConfig": "edgewright.quantization.config",
        "Report": "edgewright.measure.report",
        "Rule": "edgewright.quantization.config",
        "TrainConfig": "edgewright.training.config",
        "TrainResult": "edgewright.training.loop",
        "TrainingInterrupted": "edgewright.training.loop",
        "UsageError": "edgewright.errors",
        "WeightConfig": "edgewright.quantization.config",
        "benchmark_files": "edgewright.runtime.benchmark",
        "compress": "edgewright.compression.pipeline",
        "convert_": "edgewright.quantization.api",
        "dequantize_": "edgewright.quantization.api",
        "evaluate_language": "edgewright.evaluation.language",
        "export_executorch": "edgewright.export.executorch.exporter",
        "export_gguf": "edgewright.export.gguf.exporter",
        "export_onnx": "edgewright.export.onnx.exporter",
        "fit": "edgewright.training.loop",
        "gptq_": "edgewright.quantization.gptq",
        "load": "edgewright.io.models",
        "load_recipe": "edgewright.systems.recipe",
        "load_texts": "edgewright.io.text",
        "new_decoder": "edgewright.models.decoder.model",
        "open_engine": "edgewright.runtime.engine",
        "open_program": "edgewright.runtime.program",
        "pretrain": "edgewright.models.decoder.pretrain",
        "prune_depth_": "edgewright.pruning.depth",
        "prune_mlp_": "edgewright.pruning.width",
        "quantize_": "edgewright.quantization.api",
        "run_recipe": "edgewright.systems.recipe",
        "save_quantized": "edgewright.export.huggingface",
        "self_generate": "edgewright.distillation.self_generation",
        "token_blocks": "edgewright.io.text",
    },
)
__all__.append("__version__")
