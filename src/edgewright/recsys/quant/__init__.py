"""Low-precision inference of click models: precision chosen per table and per layer behind an accuracy gate.

The paper is "Low-Precision Hardware Architectures Meet Recommendation Model Inference at Scale" (arXiv 2105.12676).
"""

from edgewright.recsys.quant.bag import RowwiseQuantEmbeddingBag
from edgewright.recsys.quant.examples import Examples, click_slices
from edgewright.recsys.quant.gate import AccuracyGate, Judgement
from edgewright.recsys.quant.model import QuantizedModel
from edgewright.recsys.quant.monitor import Monitor
from edgewright.recsys.quant.numerics import compare_numerics
from edgewright.recsys.quant.recipe import QuantRecipe, apply_recipe, uniform_recipe
from edgewright.recsys.quant.rows import quantize_rows
from edgewright.recsys.quant.search import search

__all__ = [
    "AccuracyGate",
    "Examples",
    "Judgement",
    "Monitor",
    "QuantRecipe",
    "QuantizedModel",
    "RowwiseQuantEmbeddingBag",
    "apply_recipe",
    "click_slices",
    "compare_numerics",
    "quantize_rows",
    "search",
    "uniform_recipe",
]
