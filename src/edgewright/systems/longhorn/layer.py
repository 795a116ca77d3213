"""Longhorn (arXiv 2407.14207): a layer with a memory of fixed size, for `mixers="longhorn"` of the edge decoder.

    [v, z] = W_in h          x = SiLU(causal depthwise convolution of v)          [r, k, q] = W_x x
    beta = sigmoid(W_b r + b)            o = recurrence(x, k, q, beta, D)          out = W_out (o * SiLU(z))

The recurrence is in `longhorn_scan`. What a sequence leaves behind is its last inputs of the convolution [B, d, w] and
the state [B, d, m]: as many bytes after 8192 tokens as after one. transformers' caches keep both, so that `generate`,
beam search and `DynamicCache` work as with attention. A cache cannot be cropped: what was absorbed cannot be taken out
again; `state_cache.snapshot` keeps a copy to go back to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from edgewright.checks import check, check_fields, number, one_of, optional, whole
from edgewright.errors import UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.state_cache import STATE_TYPES, pack_state, unpack_state
from edgewright.systems.longhorn.scan import CHUNK, MODES, SCAN_BUDGET, longhorn_scan, longhorn_step

# name: (hidden_size, blocks). A block is a mixer alone, so that N layers of a transformer are 2 N blocks.
LONGHORN_SIZES = {"120M": (768, 24), "350M": (1024, 48), "1.3B": (2048, 48)}
VOCABULARY = 50257  # GPT-2's
CONTEXT = 1024
HEAD_DIM = 64  # only for attention layers that are mixed in


@dataclass(frozen=True)
class LonghornConfig:
    """Shape of a layer, by default the paper's.

    Args:
        d_state: numbers of each channel.
        d_conv: taps of the convolution.
        expand: expand * d_model channels.
        dt_rank: width of what beta is made from, "auto" for ceil(d_model / 16).
        mode: of the recurrence, "diagonal" or "exact".
        state_dtype: "float32", or "int8" with a scale a channel, rounded again at every call.
        fixed_beta: a number from 0 up for all steps in place of the learned ones (an ablation).
        chunk: see `longhorn_scan`.
        scan_budget: see `longhorn_scan`.

    Raises:
        UsageError: a value outside these.
    """

    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = "auto"
    mode: str = "diagonal"
    state_dtype: str = "float32"
    fixed_beta: float | None = None
    chunk: int = CHUNK
    scan_budget: int = SCAN_BUDGET

    def __post_init__(self) -> None:
        check_fields(self, dict.fromkeys(("d_state", "d_conv", "expand", "chunk", "scan_budget"), whole(1)))
        if self.dt_rank != "auto":
            check("LonghornConfig dt_rank", self.dt_rank, whole(1), "or 'auto'")
        check_fields(self, {"mode": one_of(*MODES), "state_dtype": one_of(*STATE_TYPES)})
        check_fields(self, {"fixed_beta": optional(number(0))})


class Longhorn(nn.Module):
    """The layer (arXiv 2407.14207). B batch, T tokens, d = expand * d_model channels, m = d_state, w = d_conv.

    The state bytes of a sequence are 4 d (m + w), or d (m + 4) + 4 d w with an int8 state.

    Args:
        d_model: width of its inputs and outputs.
        config: its shape.
    """

    def __init__(self, d_model: int, config: LonghornConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LonghornConfig()
        self.d_model, self.d_inner = d_model, config.expand * d_model
        self.rank = math.ceil(d_model / 16) if config.dt_rank == "auto" else int(config.dt_rank)
        d, w = self.d_inner, config.d_conv
        self.in_proj = nn.Linear(d_model, 2 * d, bias=False)
        self.conv1d = nn.Conv1d(d, d, w, groups=d)
        self.x_proj = nn.Linear(d, self.rank + 2 * config.d_state, bias=False)
        self.beta_proj = nn.Linear(self.rank, d)
        self.out_proj = nn.Linear(d, d_model, bias=False)
        self.D = nn.Parameter(torch.ones(d))  # one axis: the loop's parameter groups do not decay it, nor the biases
        nn.init.zeros_(self.beta_proj.bias)

    def init_weights(self, config: Any) -> None:
        """PyTorch's own draws, biases of linear layers 0 (beta starts near 0.5), W_out / sqrt(number of blocks).

        Args:
            config: of the decoder, for its number of blocks.
        """
        with torch.no_grad():
            for layer in (self.in_proj, self.x_proj, self.beta_proj, self.out_proj, self.conv1d):
                init.kaiming_uniform_(layer.weight, a=math.sqrt(5))  # type: ignore[arg-type]
            init.zeros_(self.beta_proj.bias)
            bound = self.config.d_conv**-0.5  # of a convolution over one channel
            init.uniform_(self.conv1d.bias, -bound, bound)  # type: ignore[arg-type]
            init.ones_(self.D)
            init.copy_(self.out_proj.weight, self.out_proj.weight / math.sqrt(config.num_hidden_layers))

    def forward(
        self,
        h: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        layer: int = 0,
        reset: Tensor | None = None,
    ) -> Tensor:
        """The layer on T tokens.

        Args:
            h: [B, T, d_model].
            attention_mask: [B, S >= T], 1 at real tokens, of which the last T columns belong to h; zeros only before
                them.
            cache: a transformers cache, whose slot `layer` is read and written (without gradient).
            layer: the slot.
            reset: [B, T], true at the first token of each document of a packed row: nothing before it is seen.

        Returns:
            [B, T, d_model].

        Raises:
            UsageError: a mask or a cache that does not fit.
        """
        mask = token_mask(attention_mask, h)
        window = state = None
        if cache is not None:
            if not hasattr(cache, "get_recurrent_state"):
                raise UsageError(
                    f"a {type(cache).__name__} of this transformers keeps no states; make a StateCache(model.config)"
                )
            state, window = cache.get_recurrent_state(layer), cache.get_conv_state(layer)
            _check_cache(state, h)
        S = unpack_state(state)
        out, inputs, S = self.advance(h, window, S, mask, reset)
        if cache is not None:
            cache.update_conv_state(inputs.detach().transpose(1, 2), layer, conv_kernel_size=self.config.d_conv)
            cache.update_recurrent_state(pack_state(S.detach(), self.config.state_dtype), layer)
        return out

    def advance(
        self,
        h: Tensor,
        window: Tensor | None = None,
        S: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer without a cache.

        Args:
            h: [B, T, d_model].
            window: [B, d, at least w - 1], inputs of the convolution before these tokens.
            S: the state before them, [B, d, m].
            mask: [B, T, 1], 0 at padding, which leaves the state as it is and is 0 to the convolution.
            reset: as `forward` has it.

        Returns:
            (out [B, T, d_model], convolution inputs [B, T, d], last state [B, d, m]).
        """
        m = self.config.d_state
        if mask is not None:
            h = h * mask.to(h.dtype)
        inputs, z = self.in_proj(h).chunk(2, dim=-1)
        x = F.silu(self._convolve(inputs, window, reset))
        rank, k, q = self.x_proj(x).split((self.rank, m, m), dim=-1)
        beta = torch.sigmoid(self.beta_proj(rank))
        if self.config.fixed_beta is not None:
            beta = torch.full_like(beta, self.config.fixed_beta)
        if mask is not None:
            x, beta = x * mask.to(x.dtype), beta * mask.to(beta.dtype)
        if S is not None and h.shape[1] == 1 and reset is None:
            y, S = longhorn_step(x[:, 0], k[:, 0], q[:, 0], beta[:, 0], self.D, S, self.config.mode)
            o = y[:, None]
        else:
            o, S = longhorn_scan(
                x, k, q, beta, self.D, S, self.config.mode, self.config.chunk,
                reset=reset, scan_budget=self.config.scan_budget,
            )  # fmt: skip
        assert S is not None
        return self.out_proj(o * F.silu(z)), inputs, S

    def _convolve(self, inputs: Tensor, window: Tensor | None, reset: Tensor | None) -> Tensor:
        """Causal depthwise convolution of [B, T, d]; with `reset` no tap reaches into the document before."""
        w, T = self.config.d_conv, inputs.shape[1]
        bias: Tensor = self.conv1d.bias  # type: ignore[assignment]
        rows = inputs.transpose(1, 2)  # [B, d, T]
        if window is not None and w > 1:
            rows = torch.cat([window[..., 1 - w :].to(rows.dtype), rows], dim=-1)
        rows = F.pad(rows, (w - 1 + T - rows.shape[-1], 0))
        if reset is None and T == 1:  # a product and a sum: starting a convolution takes longer than computing it
            return ((rows * self.conv1d.weight[:, 0]).sum(-1) + bias)[:, None]
        if reset is None:
            return self.conv1d(rows).transpose(1, 2)
        document = F.pad(reset.long().cumsum(1), (w - 1, 0))  # number of the document that a token belongs to
        taps = self.conv1d.weight[:, 0]  # [d, w], the last for the token itself
        total = bias[:, None].expand_as(inputs.transpose(1, 2))
        for tap in range(w):
            here = slice(tap, tap + T)
            same = (document[:, here] == document[:, w - 1 :])[:, None]
            total = total + taps[:, tap, None] * rows[..., here] * same
        return total.transpose(1, 2)


def token_mask(attention_mask: Tensor | None, h: Tensor) -> Tensor | None:
    """[B, T, 1] of the last T columns of a [B, S] mask; None where nothing is padded. Raises UsageError."""
    if attention_mask is None:
        return None
    B, T = h.shape[:2]
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise UsageError(
            f"the attention mask is {tuple(attention_mask.shape)}; for inputs of {B} rows and {T} tokens a Longhorn "
            f"layer takes [{B}, {T} or more] with 1 at real tokens"
        )
    if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling():
        real = attention_mask != 0
        if bool((real[:, :-1] & ~real[:, 1:]).any()):
            raise UsageError(
                "the attention mask has padding behind a real token; a Longhorn layer takes padding on the left only: "
                "set tokenizer.padding_side = 'left'"
            )
        if bool(real[:, -T:].all()):
            return None
    return attention_mask[:, -T:, None]


def _check_cache(state: Tensor | None, h: Tensor) -> None:
    if state is None:
        return
    if state.shape[0] != h.shape[0]:
        raise UsageError(
            f"the cache holds {state.shape[0]} sequences and the input {h.shape[0]}; start with a cache of its own, or "
            "repeat it with cache.batch_repeat_interleave"
        )
    if state.device != h.device:
        raise UsageError(f"the cache is on {state.device} and the input on {h.device}; move them to one device")
    if state.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(torch.isfinite(state).all()):
        raise UsageError("the cache holds NaN or infinity, which would never leave it; start with a new one")


def longhorn_config(name: str, **changes: Any) -> EdgeDecoderConfig:
    """The configuration of a pure Longhorn model: no feed-forwards, head tied to the table, vocabulary padded to 8.

    Args:
        name: "120M", the paper's, or "350M" or "1.3B", which follow Mamba's ladder.
        changes: fields of EdgeDecoderConfig; `mixers` with "full_attention" among them gives a hybrid, `longhorn` the
            fields of LonghornConfig.

    Returns:
        The configuration, for `new_decoder`.

    Raises:
        UsageError: an unknown name.
    """
    check("Longhorn model", name, one_of(*LONGHORN_SIZES))
    width, blocks = LONGHORN_SIZES[name]
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": max(1, width // HEAD_DIM),
        "mixers": "longhorn",
        "ffn_types": "none",
        "max_position_embeddings": CONTEXT,
        **changes,
    }
    return EdgeDecoderConfig(**{**fields, "vocab_size": -(-fields["vocab_size"] // 8) * 8})
