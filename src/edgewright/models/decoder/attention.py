"""Causal attention of the edge decoder: grouped heads, rotary positions, three kinds of normalised queries and keys."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

from edgewright.io.transformers_names import attention_function
from edgewright.models.decoder.config import EdgeDecoderConfig


class Attention(nn.Module):
    """Grouped-query attention, with the parameter names of Llama and Qwen.

    B batch, T positions, H query heads, G key heads, h head width. The function that computes it is the one that the
    configuration names (`attn_implementation`), as in every transformers model.
    """

    def __init__(self, config: EdgeDecoderConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim: int = config.head_dim  # type: ignore[assignment]
        heads, groups = (config.of_layer(name, layer) for name in ("num_attention_heads", "num_key_value_heads"))
        self.num_key_value_groups = heads // groups  # read by transformers' attention functions
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        if config.qk_norm == "rms":
            self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Any = None,
        layer: int = 0,
        sliding_window: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x: [B, T, hidden]; cos and sin: [B, T, h]; layer: the cache slot. Returns ([B, T, hidden], probabilities)."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        q = self._normed("q_norm", self.q_proj(x).view(shape)).transpose(1, 2)  # [B, H, T, h]
        k = self._normed("k_norm", self.k_proj(x).view(shape)).transpose(1, 2)  # [B, G, T, h]
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if self.config.rope_interleaved:
            # Pairs (0, 1), (2, 3), ... become halves. Queries and keys change order alike, so their products do not.
            q, k = (t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for t in (q, k))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, layer)
        attend = attention_function(self.config._attn_implementation, eager_attention_forward)
        options |= {"scaling": self.scaling, "sliding_window": sliding_window, "layer_idx": layer}
        mixed, probabilities = attend(self, q, k, v, attention_mask, dropout=0.0, **options)  # [B, T, H, h]
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), probabilities

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """Weightless normalisation comes before the rotation too: a rotation does not change a head's length."""
        if self.config.qk_norm == "l2":
            return F.rms_norm(x.float(), (self.head_dim,), eps=self.config.rms_norm_eps).to(x.dtype)
        return getattr(self, name)(x) if self.config.qk_norm == "rms" else x
