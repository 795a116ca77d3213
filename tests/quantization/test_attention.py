"""Quantisers inside attention: equal to eager attention without them, to a slow loop with them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from edgewright.errors import UsageError
from edgewright.io.transformers_names import CACHE_NAMES
from edgewright.quantization.attention import (
    ATTENTION_NAME,
    AttentionQuantizers,
    attention_modules,
    quantize_attention_,
    quantized_attention,
)
from tests.toy_encoder_decoders import FAMILIES, tiny_batch, tiny_encoder_decoder


def flat(output: Any) -> list[torch.Tensor]:
    """Every tensor of a model's output, tuples of them opened."""
    found = []
    for name in output.keys():  # noqa: SIM118
        if name not in CACHE_NAMES:
            found += [output[name]] if isinstance(output[name], torch.Tensor) else list(output[name])
    return found


def bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel(config).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "llama", "bert"])
def test_without_quantisers_it_is_eager_attention(family: str, request: pytest.FixtureRequest) -> None:
    batch = tiny_batch()
    if family in ("llama", "bert"):
        model = request.getfixturevalue("tiny_llama") if family == "llama" else bert()
        model.set_attn_implementation("eager")
        del batch["labels"]
    else:
        model = tiny_encoder_decoder(family)
    ours = copy.deepcopy(model)
    names = quantize_attention_(ours, lambda name, module: AttentionQuantizers())
    assert len(names) == (2 if family in ("llama", "bert") else 6)
    wanted = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected, got = flat(model(**batch, **wanted)), flat(ours(**batch, **wanted))
    assert len(expected) == len(got) > 4
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


class Round(nn.Module):
    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x / self.step) * self.step


def test_each_tensor_passes_its_own_quantiser() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=generator)
    key, value = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))  # two key heads for four
    mask = torch.zeros(2, 1, 3, 5)
    mask[1, :, :, 4] = torch.finfo(torch.float32).min
    module = nn.Module()
    steps = {"query": 0.5, "key": 0.25, "value": 0.125, "probabilities": 0.0625}
    module.attention_quantizers = AttentionQuantizers(**{name: Round(step) for name, step in steps.items()})
    output, probabilities = quantized_attention(module, query, key, value, mask, scaling=0.3)

    def near(x: torch.Tensor, name: str) -> torch.Tensor:
        return (x.double() / steps[name]).round() * steps[name]

    for b in range(2):
        for head in range(4):
            q, k, v = near(query[b, head], "query"), near(key[b, head // 2], "key"), near(value[b, head // 2], "value")
            p = torch.softmax(q @ k.t() * 0.3 + mask[b, 0].double(), -1)
            # float32 against float64
            torch.testing.assert_close(probabilities[b, head].double(), p, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(output[b, :, head].double(), near(p, "probabilities") @ v, rtol=1e-5, atol=1e-6)


def test_the_maps_given_back_are_neither_quantised_nor_dropped() -> None:
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    module = nn.Module().train()
    module.attention_quantizers = AttentionQuantizers(probabilities=Round(0.5))
    _, maps = quantized_attention(module, x, x, x, None, dropout=0.5)
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 2, 4), rtol=1e-6, atol=0)
    torch.testing.assert_close(maps, torch.softmax(x @ x.transpose(2, 3) / math.sqrt(8), -1), rtol=1e-6, atol=1e-7)


def test_a_copy_has_quantisers_of_its_own() -> None:
    model = tiny_encoder_decoder()
    quantize_attention_(model, lambda name, module: AttentionQuantizers(query=Round(0.5)))
    other = copy.deepcopy(model)
    assert other.config._attn_implementation == ATTENTION_NAME
    for (_, ours), (_, theirs) in zip(attention_modules(model), attention_modules(other), strict=True):
        assert ours.attention_quantizers is not theirs.attention_quantizers


def test_only_the_named_modules_and_those_wanted() -> None:
    model = tiny_encoder_decoder()
    name = "model.decoder.layers.1.encoder_attn"
    assert quantize_attention_(model, lambda *_: AttentionQuantizers(), [name]) == [name]
    untouched = tiny_encoder_decoder()
    assert quantize_attention_(untouched, lambda *_: None) == []
    assert untouched.config._attn_implementation == "eager"


def test_bad_models_are_refused_and_left_alone() -> None:
    with pytest.raises(UsageError, match="no attention module any"):
        quantize_attention_(nn.Linear(2, 2), lambda *_: AttentionQuantizers())
    model = tiny_encoder_decoder()
    with pytest.raises(UsageError, match="no attention module decoder.nothing"):
        quantize_attention_(model, lambda *_: AttentionQuantizers(), ["decoder.nothing"])
    count = len(attention_modules(model))
    quantize_attention_(model, lambda *_: AttentionQuantizers(Round(1), Round(1), Round(1)))
    assert len(attention_modules(model)) == count  # the quantisers are not taken for projections
    with pytest.raises(UsageError, match="quantised already"):
        quantize_attention_(model, lambda *_: AttentionQuantizers())
    plain = nn.Module()
    plain.q, plain.k, plain.v = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(UsageError, match="give a transformers PreTrainedModel"):
        quantize_attention_(plain, lambda *_: AttentionQuantizers())
    assert not hasattr(plain, "attention_quantizers")
