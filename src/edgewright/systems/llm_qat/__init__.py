"""LLM-QAT (arXiv 2305.17888): low-bit weights, activations and KV cache, trained on text that the model writes.

The parts serve other systems too: quantisation, distillation and self-generation are core packages.
"""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.distillation.language import LanguageDistillation as LanguageDistillation
    from edgewright.distillation.self_generation import self_generate as self_generate
    from edgewright.systems.llm_qat.quant_cache import QuantCache as QuantCache

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "LanguageDistillation": "edgewright.distillation.language",
        "QuantCache": "edgewright.systems.llm_qat.quant_cache",
        "self_generate": "edgewright.distillation.self_generation",
    },
)
