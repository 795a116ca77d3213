"""Edge decoders as transformers' own classes and back, with the same logits: what other tools can load.

Two identities make it exact. A rotation keeps the length of a head, so normalising a head without weights commutes with
rotary positions: Llama 4's norm behind them is Qwen3's norm before them with weights of one. And rotary positions on
pairs of rows are rotary positions on halves after sorting the rows of queries and keys. Where no class of transformers
can hold a model, `NotRepresentable` says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from edgewright.errors import Unsupported, UsageError
from edgewright.io.packed import PackedEmbedding, PackedLinear, PackedStack, PackedTensor
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.native_configs import FAMILIES, native_config

ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")  # whose rows follow the order of the rotary positions
NO_SINK = -1e30  # the score of a sink that nothing attends to


class NotRepresentable(Unsupported):
    """No class of transformers, or not the one asked for, computes what this model computes."""


def to_native(model: Any, target: str = "auto") -> PreTrainedModel:
    """The model as a class of transformers, which any tool loads: same logits, weights copied, shared blocks unrolled.

    target: "auto" for the nearest, or one of FAMILIES ("llama", "qwen2", "qwen3", "llama4_text", "glm4_moe",
    "granite_swa"). Skipped attention becomes attention whose output matrix is zero: the same logits, no time saved.
    Packed layers stay packed. Raises NotRepresentable with the reason, UsageError for an unknown target.
    """
    if target != "auto" and target not in FAMILIES:
        raise UsageError(f"target={target!r}; choose 'auto' or one of {', '.join(FAMILIES)}")
    config = native_config(model.config, target, NotRepresentable)
    with no_init_weights():
        native = AutoModelForCausalLM.from_config(config)
    native = native.to(dtype=model.dtype, device=model.device)
    order = _row_order(model.config, config.model_type == "llama4_text")
    _place_packed(model, native, order)
    given = _executed_state(model, order)
    wanted = native.state_dict()
    state = {}
    for name, tensor in wanted.items():
        source = edge_name(name)
        if source in given:
            state[name] = given[source]
        elif name.endswith("sinks"):
            state[name] = torch.full_like(tensor, NO_SINK)
        elif name.endswith(("norm.weight", "layernorm.weight")):
            state[name] = torch.ones_like(tensor)
        else:  # biases that are not there, attention that is skipped
            state[name] = torch.zeros_like(tensor)
    native.load_state_dict(state)
    native.generation_config = model.generation_config
    return native.train(model.training)


def gguf_form(model: Any) -> PreTrainedModel:
    """The class that `export_gguf` writes: the native one where llama.cpp runs it as it is, else the unrolled decoder.

    Windows go to GraniteSWA, whose sinks are told to attend to nothing. Skipped attention and sizes that differ by
    layer stay, because the file then holds and computes less. Raises NotRepresentable for what has no place there.
    """
    config = model.config
    assert isinstance(config.mixers, list) and isinstance(config.ffn_types, list)
    sizes = [getattr(config, name) for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads")]
    own = "skip_attention" in config.mixers or not all(isinstance(size, int) or len(set(size)) == 1 for size in sizes)
    if own and set(config.mixers) <= {"full_attention", "skip_attention"} and set(config.ffn_types) == {"mlp"}:
        if config.qk_norm != "none" or config.qkv_bias:
            raise NotRepresentable("llama.cpp has no architecture with layers of different kinds and these heads")
        return unroll(model)
    return to_native(model, "granite_swa" if "sliding_attention" in config.mixers else "auto")


def in_halves(model: Any) -> Any:
    """The model with rotary positions on halves: itself, or a copy whose rows of queries and keys are sorted.

    A compiler for devices need not know how to sort a tensor's last axis. Shared blocks stay shared, packed ones
    packed.
    """
    order = _row_order(model.config, native_pairs=False)
    if order is None:
        return model
    copied = copy.deepcopy(model)
    copied.config.rope_interleaved = False
    for block in copied.model.layers:
        for name in ROTATED:
            layer: Any = getattr(getattr(block, "self_attn", None), name, None)
            for tensor in () if layer is None else (*layer.parameters(), *layer.buffers()):
                tensor.data = tensor.data[order(model.config.head_dim, len(tensor)).to(tensor.device)]  # type: ignore[arg-type]
    return copied


def unroll(model: Any) -> Any:
    """A copy in which every executed layer has weights of its own, positions on halves: same logits, no sharing."""
    settings = model.config.to_dict()
    settings |= {"share_map": None, "rope_interleaved": False}
    order = _row_order(model.config, native_pairs=False)
    with no_init_weights():
        wide: Any = type(model)(EdgeDecoderConfig(**settings))
    wide = wide.to(dtype=model.dtype, device=model.device)
    _place_packed(model, wide, order)
    wide.load_state_dict(without_copies(_executed_state(model, order), wide), strict=False)
    wide.generation_config = model.generation_config
    return wide.train(model.training)


def share_blocks(model: PreTrainedModel, every: int = 2) -> PreTrainedModel:
    """A model whose stored blocks run several times in a row: each keeps the weights it had. It needs training again.

    MobileLLM (arXiv 2402.14905) trains such models from scratch; starting from a trained one is our addition.

    Args:
        model: an EdgeDecoder; left as it is.
        every: how often each block runs, at least twice.

    Returns:
        The new model.

    Raises:
        UsageError: `every` below 2.
    """
    if every < 2:
        raise UsageError(f"every={every}; a block that runs again runs at least twice")
    old = model.config
    assert old.share_map is not None and isinstance(old.mixers, list) and isinstance(old.ffn_types, list)
    settings = old.to_dict()
    settings["share_map"] = [block for block in old.share_map for _ in range(every)]
    settings["num_hidden_layers"] = len(settings["share_map"])
    for name in ("mixers", "ffn_types", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        value = settings[name]
        settings[name] = [entry for entry in value for _ in range(every)] if isinstance(value, list) else value
    with no_init_weights():
        shared: Any = type(model)(EdgeDecoderConfig(**settings))
    shared = shared.to(dtype=model.dtype, device=model.device)
    shared.load_state_dict(model.state_dict())
    return shared.train(model.training)


def halves_to_pairs(head_dim: int, rows: int) -> Tensor:
    """Order in which rows for positions on halves serve positions on pairs: `weight[order]`. int64 [rows]."""
    return torch.arange(rows).unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten()


def pairs_to_halves(head_dim: int, rows: int) -> Tensor:
    """The other way round."""
    return torch.arange(rows).unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten()


Order = Callable[[int, int], Tensor] | None


def _row_order(config: EdgeDecoderConfig, native_pairs: bool) -> Order:
    if config.rope_interleaved == native_pairs:
        return None
    return pairs_to_halves if config.rope_interleaved else halves_to_pairs


def edge_name(name: str) -> str:
    """Our name of a native parameter: Llama 4 says feed_forward where the others say mlp."""
    return name.replace(".feed_forward.", ".mlp.")


def without_copies(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Only what the model has; anything of the model's that is missing would stay uninitialised, so it is refused."""
    names = model.state_dict().keys()
    if missing := sorted(names - state.keys()):
        raise NotRepresentable(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return {name: tensor for name, tensor in state.items() if name in names}


def _executed_state(model: Any, order: Order) -> dict[str, Tensor]:
    """Float tensors by the name they have where every executed layer is stored, rows sorted by `order`."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
    assert model.config.share_map is not None
    for layer, block in enumerate(model.config.share_map):
        for name, tensor in model.model.layers[block].state_dict().items():
            state[f"model.layers.{layer}.{name}"] = _sorted(name, tensor, model.config, order)
    return state


def _sorted(name: str, tensor: Tensor, config: EdgeDecoderConfig, order: Order) -> Tensor:
    if order is None or not name.startswith("self_attn.") or name.split(".")[1] not in ROTATED:
        return tensor
    assert config.head_dim is not None
    return tensor[order(config.head_dim, len(tensor)).to(tensor.device)]


def _place_packed(model: Any, native: PreTrainedModel, order: Order) -> None:
    """Put packed layers where their float ones would be; their codes and steps are sorted like any row."""
    assert model.config.share_map is not None
    layers = {f"model.layers.{i}": model.model.layers[block] for i, block in enumerate(model.config.share_map)}
    parts = [(prefix, name, m) for prefix, layer in layers.items() for name, m in layer.named_modules()]
    parts += [("", name, m) for name, m in model.named_modules() if ".layers." not in name]
    for prefix, name, module in parts:
        if isinstance(module, PackedStack):
            owner = native.get_submodule(f"{prefix}.{name}".rpartition(".")[0])
            delattr(owner, name.rpartition(".")[2])
            setattr(owner, name.rpartition(".")[2], module)
            native.config._experts_implementation = "eager"  # the one that asks for one matrix at a time
        if not isinstance(module, PackedLinear | PackedEmbedding):
            continue
        if isinstance(module, PackedLinear) and order is not None:
            old = module.packed
            codes, step = (_sorted(name, part, model.config, order) for part in (old.codes, old.step))
            bias = None if module.bias is None else _sorted(name, module.bias, model.config, order)
            module = PackedLinear(PackedTensor(codes, step, old.grid), bias, module.input_quantizer)
        native.set_submodule(f"{prefix}.{name}".lstrip("."), module)
