"""Quantised queries, keys, values and probabilities inside the attention of any transformers model.

transformers lets a model name the function that computes its attention. `quantize_attention_` registers one, selects
it, and hangs an `AttentionQuantizers` on every attention module; the function looks there for what to apply. No
modelling file is copied, so checkpoints load and `generate()` works as before. Attention runs in its eager form:
low-bit probabilities exist only where they are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError

ATTENTION_NAME = "edgewright_quantized"
# Names of the query, key and value projections in one attention module: BART and Llama, BERT, T5, DistilBERT.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
)


class AttentionQuantizers(nn.Module):
    """Quantisers of one attention module, None where a tensor stays as it is.

    Keys and values arrive from the cache unquantised and pass their quantiser at every step; one whose result for a
    token depends on that token alone makes cached and uncached generation equal.

    Args:
        query, key, value: modules over [B, heads, T, head width].
        probabilities: over [B, heads, T, S], after softmax and dropout.
    """

    def __init__(
        self,
        query: nn.Module | None = None,
        key: nn.Module | None = None,
        value: nn.Module | None = None,
        probabilities: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.probabilities = query, key, value, probabilities


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention through the module's quantisers: (output [B, T, heads, D], probabilities [B, heads, T, S]).

    query: [B, heads, T, D]; key, value: [B, key heads, S, D], repeated to the query's heads; mask and bias are added to
    the scores. The returned probabilities are those before dropout and quantisation, which is what distillation
    compares. Without quantisers this is transformers' eager attention, bit for bit.
    """
    quantizers = getattr(module, "attention_quantizers", None)
    query, key, value = (_through(quantizers, n, x) for n, x in (("query", query), ("key", key), ("value", value)))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    # float32 whatever the model's type, as Llama does; BART, BERT and T5 train in float32 anyway.
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    used = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    output = torch.matmul(_through(quantizers, "probabilities", used), value)
    return output.transpose(1, 2).contiguous(), probabilities


def quantize_attention_(
    model: nn.Module, build: Callable[[str, nn.Module], AttentionQuantizers | None], names: Iterable[str] | None = None
) -> list[str]:
    """Give attention modules quantisers and switch the model to `quantized_attention`, in place.

    Args:
        model: of transformers.
        build: (dotted name, attention module) -> its quantisers, or None to leave it alone.
        names: only these modules; None: all.

    Returns:
        The names that got quantisers.

    Raises:
        UsageError: a model without attention modules of a known form, one that cannot change its attention function,
            and one that has quantisers already.
    """
    modules = dict(attention_modules(model))
    chosen = list(modules) if names is None else list(names)
    if not modules or not set(chosen) <= set(modules):
        missing = ", ".join(sorted(set(chosen) - set(modules))) or "any"
        raise UsageError(
            f"no attention module {missing}: a transformers model with q_proj/k_proj/v_proj, query/key/value or q/k/v "
            f"is needed; this one has {', '.join(list(modules)[:3]) or 'none'}"
        )
    if any(hasattr(module, "attention_quantizers") for module in modules.values()):
        raise UsageError("the model's attention is quantised already; start from a model without attention quantisers")
    built = {name: quantizers for name in chosen if (quantizers := build(name, modules[name])) is not None}
    if built:
        _select(model)
        for name, quantizers in built.items():
            modules[name].attention_quantizers = quantizers.train(modules[name].training)
    return list(built)


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(dotted name, module) of every module that holds a query, a key and a value projection, in model order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if not isinstance(module, AttentionQuantizers)  # whose parts have BERT's names
        and any(all(isinstance(getattr(module, part, None), nn.Module) for part in names) for names in PROJECTIONS)
    ]


def _through(quantizers: nn.Module | None, name: str, x: Tensor) -> Tensor:
    quantizer = getattr(quantizers, name, None)
    return x if quantizer is None else quantizer(x)


def _select(model: Any) -> None:
    """Make our function known to transformers under its name (with eager's masks), and select it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if not hasattr(model, "set_attn_implementation"):
        raise UsageError(f"{type(model).__name__} cannot change its attention; give a transformers PreTrainedModel")
    AttentionInterface.register(ATTENTION_NAME, quantized_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, eager_mask)
    model.set_attn_implementation(ATTENTION_NAME)
    if getattr(model.config, "_attn_implementation", None) != ATTENTION_NAME:
        raise UsageError(f"{type(model).__name__} has a fixed attention function, which cannot be quantised")
