"""TBT (arXiv 2306.01841): ternary and binary encoder-decoders that still generate text."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.ternary_binary_nlg.distillation import (
        SequenceLossConfig as SequenceLossConfig,
        SequenceToSequenceDistillation as SequenceToSequenceDistillation,
    )
    from edgewright.systems.ternary_binary_nlg.model import (
        ActivationSet as ActivationSet,
        quantize_encoder_decoder_ as quantize_encoder_decoder_,
    )

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "ActivationSet": "edgewright.systems.ternary_binary_nlg.model",
        "SequenceLossConfig": "edgewright.systems.ternary_binary_nlg.distillation",
        "SequenceToSequenceDistillation": "edgewright.systems.ternary_binary_nlg.distillation",
        "quantize_encoder_decoder_": "edgewright.systems.ternary_binary_nlg.model",
    },
)
