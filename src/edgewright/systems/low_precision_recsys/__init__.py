"""Low-precision inference of click models: precision chosen per table and per layer behind an accuracy gate.

The paper is "Low-Precision Hardware Architectures Meet Recommendation Model Inference at Scale" (arXiv 2105.12676).
"""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.low_precision_recsys.export import export_quantized as export_quantized
    from edgewright.systems.low_precision_recsys.gate import (
        AccuracyGate as AccuracyGate,
        Examples as Examples,
        Judgement as Judgement,
        click_slices as click_slices,
    )
    from edgewright.systems.low_precision_recsys.model import (
        QuantizedModel as QuantizedModel,
        QuantRecipe as QuantRecipe,
        apply_recipe as apply_recipe,
        choices_report as choices_report,
        uniform_recipe as uniform_recipe,
    )
    from edgewright.systems.low_precision_recsys.monitor import Monitor as Monitor, compare_numerics as compare_numerics
    from edgewright.systems.low_precision_recsys.precision_search import search as search
    from edgewright.systems.low_precision_recsys.tables import (
        RowwiseQuantEmbeddingBag as RowwiseQuantEmbeddingBag,
        quantize_rows as quantize_rows,
    )

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "AccuracyGate": "edgewright.systems.low_precision_recsys.gate",
        "Examples": "edgewright.systems.low_precision_recsys.gate",
        "Judgement": "edgewright.systems.low_precision_recsys.gate",
        "Monitor": "edgewright.systems.low_precision_recsys.monitor",
        "QuantRecipe": "edgewright.systems.low_precision_recsys.model",
        "QuantizedModel": "edgewright.systems.low_precision_recsys.model",
        "RowwiseQuantEmbeddingBag": "edgewright.systems.low_precision_recsys.tables",
        "apply_recipe": "edgewright.systems.low_precision_recsys.model",
        "choices_report": "edgewright.systems.low_precision_recsys.model",
        "click_slices": "edgewright.systems.low_precision_recsys.gate",
        "compare_numerics": "edgewright.systems.low_precision_recsys.monitor",
        "export_quantized": "edgewright.systems.low_precision_recsys.export",
        "quantize_rows": "edgewright.systems.low_precision_recsys.tables",
        "search": "edgewright.systems.low_precision_recsys.precision_search",
        "uniform_recipe": "edgewright.systems.low_precision_recsys.model",
    },
)
