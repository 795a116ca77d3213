"""BiT (arXiv 2205.13016): transformer encoders with binary weights and activations, by distillation in stages."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.bit.distillation import EncoderDistillation as EncoderDistillation
    from edgewright.systems.bit.folder import load_binary as load_binary, save_binary as save_binary
    from edgewright.systems.bit.linear import export_binary_onnx as export_binary_onnx, pack_binary_ as pack_binary_
    from edgewright.systems.bit.model import (
        BitConfig as BitConfig,
        binarize_encoder_ as binarize_encoder_,
        parameter_groups as parameter_groups,
    )

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BitConfig": "edgewright.systems.bit.model",
        "EncoderDistillation": "edgewright.systems.bit.distillation",
        "binarize_encoder_": "edgewright.systems.bit.model",
        "export_binary_onnx": "edgewright.systems.bit.linear",
        "load_binary": "edgewright.systems.bit.folder",
        "pack_binary_": "edgewright.systems.bit.linear",
        "parameter_groups": "edgewright.systems.bit.model",
        "save_binary": "edgewright.systems.bit.folder",
    },
)
