"""Models of transformers' own classes as edge decoders; the way back is `native.to_native`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM
from edgewright.models.decoder.native import NO_SINK, NotRepresentable, edge_name, without_copies
from edgewright.models.decoder.native_configs import edge_settings


def from_native(model: PreTrainedModel) -> EdgeDecoderForCausalLM:
    """An edge decoder with the weights and logits of a model of one of the FAMILIES.

    The weights are copied. Raises NotRepresentable naming the setting that the decoder does not have.
    """
    config = EdgeDecoderConfig(**edge_settings(model.config, NotRepresentable))
    with no_init_weights():
        edge: Any = EdgeDecoderForCausalLM(config)
    edge = edge.to(dtype=model.dtype, device=model.device)
    state = {edge_name(name): tensor for name, tensor in model.state_dict().items()}
    sinks = {name: tensor for name, tensor in state.items() if name.endswith("self_attn.sinks")}
    if any(float(tensor.max()) > NO_SINK / 2 for tensor in sinks.values()):
        raise NotRepresentable("the attention sinks of this GraniteSWA model take part in attention")
    state = {name: tensor for name, tensor in state.items() if name not in sinks}
    edge.load_state_dict(without_copies(state, edge), strict=False)
    edge.generation_config = model.generation_config
    return edge.train(model.training)
