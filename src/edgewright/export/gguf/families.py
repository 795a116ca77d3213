"""Which models can be written as GGUF; how each family lies in the file says `io.gguf_families`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgewright.errors import Unsupported
from edgewright.io.gguf.families import BY_MODEL_TYPE, Family
from edgewright.protocols import HasGGUFForm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def writer(model: PreTrainedModel) -> Family:
    """How a model is written. Raises Unsupported naming the class or setting that is not known."""
    config = model.config
    kind = str(getattr(config, "model_type", ""))
    family = BY_MODEL_TYPE.get(kind)
    if family is None or family.class_name != type(model).__name__:
        names = ", ".join(known.class_name for known in BY_MODEL_TYPE.values())
        other = "--to onnx writes other classes, heads for classification among them"
        if getattr(config, "is_encoder_decoder", False):
            other = "--to hf writes encoder-decoders as a folder"
        raise Unsupported(f"{type(model).__name__} cannot be written as GGUF; {names} can; {other}")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise Unsupported(f"hidden_act={config.hidden_act!r} cannot be written as GGUF; llama.cpp computes 'silu' here")
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if kind != "granite_swa" and (windows or getattr(config, "use_sliding_window", False)):
        raise Unsupported(
            f"{kind} with sliding windows cannot be written as GGUF: llama.cpp has no windows for this family; "
            "--to onnx keeps them"
        )
    return family


def native_form(model: Any) -> PreTrainedModel:
    """The model to write: a model that knows a better form of itself for GGUF (the edge decoder) is asked for it."""
    return model.for_gguf() if isinstance(model, HasGGUFForm) else model
