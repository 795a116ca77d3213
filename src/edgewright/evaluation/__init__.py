"""How good a model is, always with a standard error: language metrics and the statistics under them."""

from __future__ import annotations

from edgewright.evaluation.language import (
    LanguageMetrics,
    LogitsFunction,
    engine_logits,
    evaluate_language,
    model_logits,
)
from edgewright.evaluation.statistics import ClusterMean, Estimate, ExactQuantiles, paired_difference, ratio_of_sums

__all__ = [
    "ClusterMean",
    "Estimate",
    "ExactQuantiles",
    "LanguageMetrics",
    "LogitsFunction",
    "engine_logits",
    "evaluate_language",
    "model_logits",
    "paired_difference",
    "ratio_of_sums",
]
