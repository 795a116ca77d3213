"""A causal language model of transformers as one exportable program with its key-value cache inside.

    forward(tokens int64 [1, T], start int64 [1], rows int64 [R]) -> float32 logits [R, V]

writes the keys and values of T tokens at the places start .. start + T - 1 of a static cache, attends to all places up
to each token's own, and returns the logits after the asked rows of the T. T and R are free from 1 to `CHUNK`: a long
prompt is a few calls, decoding is calls with T = 1, and both use one copy of the weights. The model class itself is
used; only its attention function is exchanged, through the interface that transformers has for it, while it is traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

CHUNK = 128  # most tokens of one call
ATTENTION = "edgewright_static_cache"
MAX_CONTEXT = 1 << 20
WITHOUT_CACHE = ("moe",)  # transformers' word for a layer without attention


def is_language_model(model: nn.Module) -> bool:
    """Whether the model is a causal language model of transformers."""
    from transformers import PreTrainedModel
    from transformers.generation import GenerationMixin

    return isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)


def check_language_model(model: PreTrainedModel, context: int) -> None:
    """Raise Unsupported for attention that the cached kernel does not compute, UsageError for an impossible context."""
    if not 2 <= context <= MAX_CONTEXT:
        raise UsageError(f"context must be 2 to {MAX_CONTEXT} tokens, got {context}; e.g. context=1024")
    config: Any = model.config
    name = type(model).__name__
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise UsageError(f"{name} was trained for {longest} tokens; context={context} is too long for it")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    sliding = window is not None and 0 < window < context and getattr(config, "use_sliding_window", True)
    if kinds - {"full_attention", "sliding_attention", *WITHOUT_CACHE} or ("sliding_attention" in kinds and sliding):
        raise Unsupported(f"{name} mixes the layer types {', '.join(sorted(kinds))}; only full attention is exported")
    if sliding and not getattr(config, "layer_types", None):
        raise Unsupported(f"{name} attends to a window of {window} tokens; export it with context={window} at most")
    for key in ("attn_logit_softcapping", "num_local_experts", "num_experts"):
        if getattr(config, key, None):
            raise Unsupported(f"{name} with {key}={getattr(config, key)} is not exported to ExecuTorch")
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(
            f"{name} is an encoder-decoder; only decoder-only language models become .pte files with a cache"
        )
    if not getattr(model, "_supports_sdpa", False):
        raise Unsupported(f"{name} has no exchangeable attention function; it cannot be exported with a cache")


class CachedLanguageModel(nn.Module):
    """The program above around a model of transformers."""

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        super().__init__()
        self.model = model
        self.context = context
        for layer, (heads, width) in cache_shapes(model.config).items():
            self.register_buffer(f"keys_{layer}", torch.zeros(1, context, heads, width))
            self.register_buffer(f"values_{layer}", torch.zeros(1, context, heads, width))
        self.layers = list(cache_shapes(model.config))

    def forward(self, tokens: Tensor, start: Tensor, rows: Tensor) -> Tensor:
        first: Any = start.item()
        torch._check(first >= 0)
        torch._check(first < self.context)
        torch._check(first + tokens.shape[1] <= self.context)
        positions = start + torch.arange(tokens.shape[1])
        store = {i: (getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")) for i in self.layers}
        options: dict[str, Any] = {"position_ids": positions[None], "use_cache": False}
        options |= {"first_position": first, "cache_store": store}
        whole: Any = self.model
        if keeps_positions(whole):  # its own forward: what it does behind its head (scales, caps) belongs to it
            logits: Tensor = whole(input_ids=tokens, logits_to_keep=rows, **options).logits[0]
            return logits
        hidden = whole.base_model(input_ids=tokens, **options).last_hidden_state
        logits = whole.get_output_embeddings()(hidden[0].index_select(0, rows))
        return logits


def keeps_positions(model: nn.Module) -> bool:
    """Whether the model's forward takes the positions whose logits are wanted."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise Unsupported for a model that changes the logits behind its head and cannot give those of some positions."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    if keeps_positions(model):
        return
    alone = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)
    if not torch.equal(alone, model(input_ids=ids).logits):
        raise Unsupported(
            f"{type(model).__name__} changes its logits behind its head, and its forward has no logits_to_keep; "
            "it cannot be exported with a cache"
        )


def cache_shapes(config: Any) -> dict[int, tuple[int, int]]:
    """Layer -> (key heads, head width) of every layer that attends."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = [heads] * len(kinds) if isinstance(heads, int) else heads
    return {i: (heads[i], width) for i, kind in enumerate(kinds) if kind not in WITHOUT_CACHE}


def export_language(model: PreTrainedModel, context: int) -> ExportedProgram:
    """The exported program of a prepared model (see `executorch_layers.prepare`)."""
    check_head(model)
    program = CachedLanguageModel(model, context).eval()
    chunk = min(CHUNK, context)
    tokens, rows = torch.export.Dim("tokens", min=1, max=chunk), torch.export.Dim("rows", min=1, max=chunk)
    example = (torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    shapes: Any = ({1: tokens}, {}, {0: rows})
    with torch.no_grad(), cached_attention(model):
        return torch.export.export(program, example, dynamic_shapes=shapes, strict=False)


@contextmanager
def cached_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention write to and read from the `cache_store` that its call was given."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    config: Any = model.config
    before = config._attn_implementation
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *arguments, **options: None)
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
        for table in (AttentionInterface, AttentionMaskInterface):
            table._global_mapping.pop(ATTENTION, None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    first_position: Any = None,
    cache_store: Any = None,
    layer_idx: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Query [1, heads, T, d], key and value [1, key heads, T, d] -> [1, T, heads, d]; causal over the cache.

    layer_idx: of the executed layer, from models whose modules run in several.
    """
    if first_position is None or cache_store is None:
        raise Unsupported(
            f"{type(module).__name__} does not pass its call's arguments on to the attention function; "
            "it cannot be exported with a cache"
        )
    for option in ("s_aux", "softcap"):
        if options.get(option) is not None:
            raise Unsupported(f"{type(module).__name__} uses {option}, which the cached attention kernel lacks")
    keys, values = cache_store[module.layer_idx if layer_idx is None else layer_idx]  # type: ignore[index]
    llama = torch.ops.llama
    llama.update_cache(key.transpose(1, 2), keys, first_position)
    llama.update_cache(value.transpose(1, 2), values, first_position)
    return llama.custom_sdpa(query.transpose(1, 2), keys, values, first_position, None, 0.0, True, scaling), None
