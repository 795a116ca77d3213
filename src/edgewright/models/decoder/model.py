"""The one decoder of all language models here: per layer a mixer and a feed-forward, blocks that may run twice.

A transformers `PreTrainedModel`: it saves, loads through AutoModelForCausalLM (once edgewright.models.decoder.model is
imported, which `edgewright.load` does) and generates with transformers' caches. Parameter names are those of Llama, so
that a model of full attention and plain feed-forwards has Llama's very state dict.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from edgewright.errors import UsageError
from edgewright.io.transformers_names import (
    cache_name,
    cache_of,
    cache_room,
    mask,
    one_cache,
    records_outputs,
    with_cache,
)
from edgewright.models.decoder.attention import Attention
from edgewright.models.decoder.config import ATTENTION, CACHE_TYPES, EdgeDecoderConfig
from edgewright.models.decoder.kinds import new_layer
from edgewright.models.decoder.native import gguf_form, in_halves
from edgewright.models.decoder.state_cache import HAS_STATES, StateCache
from edgewright.protocols import InitializesWeights


class FeedForward(nn.Module):
    """SwiGLU: down(act(gate(u)) * up(u)), without biases. [B, T, hidden] -> the same."""

    def __init__(self, hidden: int, intermediate: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(u)) * self.up_proj(u))


class EdgeDecoderLayer(GradientCheckpointingLayer):
    """A stored block: x + mixer(norm(x)), then x + feed_forward(norm(x)); either half may be absent.

    Nothing in it knows which executed layer it is, so that it can be several.
    """

    def __init__(self, config: EdgeDecoderConfig, layer: int) -> None:
        super().__init__()
        assert isinstance(config.mixers, list) and isinstance(config.ffn_types, list)
        self.mixer, self.kind = config.mixers[layer], config.ffn_types[layer]
        if self.mixer in ATTENTION:
            self.self_attn = Attention(config, layer)
        elif self.mixer == "longhorn":
            self.longhorn = new_layer("longhorn", config, config.hidden_size)
        if self.mixer != "skip_attention":
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.kind != "none":
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp = _feed_forward(config, layer)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        layer: int = 0,
        sliding_window: int | None = None,
        input_ids: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """x: [B, T, hidden]. attention_mask: of the attention function, or [B, S] of real tokens for other mixers.

        The cache comes under this version's name for it, which is the one that gradient checkpointing takes away.
        """
        cache = options.pop(cache_name(), None)
        if self.mixer in ATTENTION:
            mixed, _ = self.self_attn(
                self.input_layernorm(x),
                position_embeddings,
                attention_mask,
                cache,
                layer,
                sliding_window,
                **options,
            )
            x = x + mixed
        elif self.mixer == "longhorn":
            x = x + self.longhorn(self.input_layernorm(x), attention_mask, cache, layer, options.get("reset"))
        if self.kind == "none":
            return x
        u = self.post_attention_layernorm(x)
        return x + (self.mlp(u, input_ids) if self.kind == "stem" else self.mlp(u))


class EdgeDecoderPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the model."""

    config: EdgeDecoderConfig
    config_class = EdgeDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EdgeDecoderLayer"]
    _skip_keys_device_placement = [cache_name()]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["gate"]  # routers: a rounded score flips the choice of experts
    _can_record_outputs = {"hidden_states": EdgeDecoderLayer, "attentions": Attention}

    @property
    def _is_stateful(self) -> bool:  # type: ignore[override]
        """Whether assisted generation is to be refused: a recurrent state cannot give tokens back."""
        return "longhorn" in self.config.mixers  # type: ignore[operator]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range) and ones, as in Llama; a layer with another rule brings `init_weights(config)`."""
        if isinstance(module, InitializesWeights) and not isinstance(module, PreTrainedModel):
            module.init_weights(self.config)
        else:
            super()._init_weights(module)


class EdgeDecoderModel(EdgeDecoderPreTrainedModel):
    """Table, executed layers, last norm."""

    def __init__(self, config: EdgeDecoderConfig) -> None:
        super().__init__(config)
        assert config.share_map is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            EdgeDecoderLayer(config, config.share_map.index(block)) for block in range(config.num_stored_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @records_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids: [B, T] int64, or inputs_embeds: [B, T, hidden]; attention_mask: [B, S], 1 at real tokens.

        cache, past_key_values: the newer and the older name of one argument.
        reset (among the options): bool [B, T], true at the first token of each document of a packed row. No layer sees
        the document before, and positions begin anew. A model with attention then takes and gives no cache, for a cache
        does not know where its documents begin.
        """
        cache = one_cache(cache, past_key_values)
        config = self.config
        assert isinstance(config.mixers, list) and isinstance(config.ffn_types, list) and config.share_map is not None
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            _check_ids(input_ids, config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        elif "stem" in config.ffn_types:
            raise UsageError("STEM layers look rows up by token: give input_ids, not inputs_embeds")
        assert inputs_embeds is not None
        attends = any(mixer in ATTENTION for mixer in config.mixers)  # else nothing here depends on positions
        reset = options.get("reset") if attends else None
        if reset is not None:
            _check_reset(reset, inputs_embeds, cache, attention_mask, config)
            use_cache = False
        if use_cache and cache is None:
            cache = StateCache(config) if "longhorn" in config.mixers else DynamicCache(config=config)
        seen = cache.get_seq_length() if cache is not None and attends else 0
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
            if reset is not None:  # behind the latest first token
                position_ids = position_ids - (position_ids * reset).cummax(1).values
        self._check_length(seen, inputs_embeds.shape[1], cache)
        masks = self._masks(inputs_embeds, attention_mask, cache, position_ids, reset)
        rotary = self.rotary_emb(inputs_embeds, position_ids)

        x = inputs_embeds
        for layer, block in enumerate(config.share_map):
            mixer = config.mixers[layer]
            x = self.layers[block](
                x,
                attention_mask=masks.get(
                    CACHE_TYPES.get(mixer, mixer), None if isinstance(attention_mask, dict) else attention_mask
                ),
                position_embeddings=rotary,
                layer=layer,
                sliding_window=config.sliding_window if mixer == "sliding_attention" else None,
                input_ids=input_ids,
                **with_cache(cache),
                **options,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **with_cache(cache))

    def _masks(
        self,
        inputs_embeds: Tensor,
        attention_mask: Any,
        cache: Cache | None,
        position_ids: Tensor,
        reset: Tensor | None = None,
    ) -> dict[str, Tensor | None]:
        """The mask of each kind of attention among the layers; `generate` may bring them ready."""
        if isinstance(attention_mask, dict):
            return attention_mask
        arguments: dict[str, Any] = {
            "config": self.config,
            "embeddings": inputs_embeds,
            "attention_mask": attention_mask,
            "cache": cache,
            "positions": position_ids,
        }
        if reset is not None:
            document = reset.long().cumsum(1)  # that a token belongs to
            # transformers finds documents in positions that begin anew; with that and ours together it cuts them wrong
            arguments["positions"] = torch.arange(reset.shape[1], device=reset.device)[None]
            arguments["and_mask_function"] = lambda b, head, q, kv: document[b, q] == document[b, kv]
        makers: dict[str, Any] = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        return {kind: mask(make, **arguments) for kind, make in makers.items() if kind in self.config.mixers}  # type: ignore[operator]

    def _check_length(self, seen: Any, new: int, cache: Cache | None) -> None:
        """Warn once beyond the trained context; refuse what a cache of fixed size cannot hold."""
        if torch.compiler.is_compiling() or (isinstance(seen, Tensor) and seen.device.type != "cpu"):
            return  # a fixed cache counts on its device, and asking would wait for it
        total, limit = int(seen) + new, self.config.max_position_embeddings
        room = cache_room(cache) if cache is not None else -1
        if 0 < room < total and "sliding_attention" not in self.config.mixers:  # type: ignore[operator]
            raise UsageError(f"{total} tokens do not fit into a cache of {room}")
        if total > limit and not getattr(self, "_warned", False):
            self._warned = True
            warnings.warn(f"{total} tokens are more than the model was made for ({limit})", stacklevel=2)


class EdgeDecoderForCausalLM(EdgeDecoderPreTrainedModel, GenerationMixin):
    """The decoder with its head. `EdgeDecoderForCausalLM(config)` draws weights from torch's global generator;
    `new_decoder(config, seed)` from one of its own.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EdgeDecoderConfig) -> None:
        super().__init__(config)
        self.model = EdgeDecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """labels: [B, T] int64, shifted here, -100 where nothing is to be predicted. logits: [B, T, vocab].

        cache, past_key_values: the newer and the older name of one argument.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **with_cache(cache_of(output)),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **options: Any
    ) -> None:
        """Transformers' own choice; for a model of states alone in a form that counts tokens, as `generate` must."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **options)  # type: ignore[misc]
        cache = model_kwargs.get(cache_name())
        attends = any(mixer in ATTENTION for mixer in self.config.mixers)  # type: ignore[union-attr]
        if cache is not None and (not attends or (self._is_stateful and not HAS_STATES)):
            model_kwargs[cache_name()] = StateCache.around(cache, self.config)

    def for_executorch(self) -> PreTrainedModel:
        """The form of this model that `export_executorch` traces."""
        return in_halves(self)

    def for_gguf(self) -> PreTrainedModel:
        """The form of this model that `export_gguf` writes."""
        return gguf_form(self)


def _check_reset(reset: Tensor, x: Tensor, cache: Any, attention_mask: Any, config: EdgeDecoderConfig) -> None:
    if tuple(reset.shape) != tuple(x.shape[:2]) or reset.dtype != torch.bool:
        raise UsageError(f"reset is {reset.dtype} {list(reset.shape)}; give bool {list(x.shape[:2])}, one a token")
    if cache is not None or isinstance(attention_mask, dict):
        raise UsageError("reset marks documents of a packed row, which attention reads whole: give no cache with it")
    if "flash" in str(config._attn_implementation):
        raise UsageError(f"reset needs a mask, which {config._attn_implementation} does not take; use sdpa or eager")


def new_decoder(config: EdgeDecoderConfig, seed: int = 0) -> EdgeDecoderForCausalLM:
    """A decoder with random weights that the seed alone decides; torch's global generator is left as it was.

    Args:
        config: its shape.
        seed: of the weights.

    Returns:
        The model, in float32 on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EdgeDecoderForCausalLM(config)


def _feed_forward(config: EdgeDecoderConfig, layer: int) -> nn.Module:
    assert isinstance(config.ffn_types, list)
    kind, width = config.ffn_types[layer], config.of_layer("intermediate_size", layer)
    if kind == "moe":
        return new_layer("moe", config, config.hidden_size)
    if kind == "stem":
        return new_layer("stem", config, config.hidden_size, width, config.vocab_size)
    return FeedForward(config.hidden_size, width, config.hidden_act)


def _check_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Raise UsageError for ids outside the table; on devices where asking costs a wait, the lookup itself fails."""
    if input_ids.numel() == 0 or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (int(value) for value in torch.aminmax(input_ids))
    if low < 0 or high >= vocabulary:
        raise UsageError(f"input_ids hold {low if low < 0 else high}; the vocabulary is 0 to {vocabulary - 1}")


AutoConfig.register(EdgeDecoderConfig.model_type, EdgeDecoderConfig, exist_ok=True)
AutoModelForCausalLM.register(EdgeDecoderConfig, EdgeDecoderForCausalLM, exist_ok=True)
