"""quantize_ and convert_ on whole models: same bits, tied weights, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.packed import PackedEmbedding, PackedLinear
from edgewright.quantization.api import codes_of, convert_, dequantize_, quantize_, quantized_modules, scale_parameters
from edgewright.quantization.config import ActivationConfig, QuantConfig, Rule, WeightConfig
from edgewright.quantization.grids import GRIDS
from edgewright.quantization.layers import QuantLinear

TOKENS = torch.arange(24).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def everything(grid: str, **settings) -> QuantConfig:
    weight = WeightConfig(grid, 32, **settings)
    return QuantConfig(rules=(Rule("*", weight),), skip=(), tied="together")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale", ["learned", "absmax", "absmean", "mse"])
def test_converted_equals_fake_quantised_bit_for_bit(tiny_llama, grid, scale):
    quantize_(tiny_llama, everything(grid, scale=scale))
    trained = logits(tiny_llama)
    convert_(tiny_llama)
    assert torch.equal(logits(tiny_llama), trained)
    dequantize_(tiny_llama)
    assert torch.equal(logits(tiny_llama), trained)
    assert tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight


@pytest.mark.parametrize("granularity", ["row", "tensor", 16])
def test_granularities(tiny_llama, granularity):
    quantize_(tiny_llama, QuantConfig.weights("int4", granularity))
    loss = tiny_llama(TOKENS, labels=TOKENS).loss
    loss.backward()
    layer = tiny_llama.model.layers[0].mlp.up_proj
    assert layer.weight.grad.abs().sum() > 0 and layer.quantizer.weight_scale.grad.abs().sum() > 0
    trained = logits(tiny_llama)
    packed = convert_(tiny_llama).model.layers[0].mlp.up_proj.packed
    assert packed.step.shape == (128, 4 if granularity == 16 else 1)
    if granularity == "tensor":
        assert packed.step.unique().numel() == 1
    assert torch.equal(logits(tiny_llama), trained)


def test_parameters_keep_their_names_and_objects(tiny_llama):
    before = dict(tiny_llama.named_parameters())
    quantize_(tiny_llama, QuantConfig.weights("int4"))
    after = dict(tiny_llama.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = set(after) - set(before)
    assert len(added) == len(scale_parameters(tiny_llama)) == 14
    assert all(name.endswith("weight_scale") for name in added)


def test_embedding_and_head_are_skipped_by_default_and_shared_when_tied(tiny_llama):
    plain = quantize_(copy.deepcopy(tiny_llama), QuantConfig.weights("int4"))
    assert type(plain.lm_head) is nn.Linear
    with pytest.raises(UsageError, match="shares its weight with"):
        quantize_(copy.deepcopy(tiny_llama), QuantConfig((Rule("*", WeightConfig()),), skip=()))
    tied = convert_(quantize_(copy.deepcopy(tiny_llama), everything("int8", scale="absmax")))
    assert isinstance(tied.model.embed_tokens, PackedEmbedding) and isinstance(tied.lm_head, PackedLinear)
    assert tied.lm_head.codes is tied.model.embed_tokens.codes
    config = QuantConfig((Rule("*embed_tokens", WeightConfig("int8", scale="absmax")),), skip=(), tied="untie")
    untied = quantize_(copy.deepcopy(tiny_llama), config)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert not untied.config.tie_word_embeddings


def test_first_matching_rule_wins_and_activations_alone_are_possible(tiny_llama):
    rules = (
        Rule("*.mlp.*", WeightConfig("seq2")),
        Rule("*.q_proj", activation=ActivationConfig(8)),
        Rule("*", WeightConfig("int4", 32)),
    )
    quantize_(tiny_llama, QuantConfig(rules))
    layer = tiny_llama.model.layers[0]
    assert layer.mlp.up_proj.quantizer.config.grid == "seq2"
    assert layer.self_attn.q_proj.quantizer is None and layer.self_attn.q_proj.input_quantizer.config.bits == 8
    assert layer.self_attn.k_proj.quantizer.config.grid == "int4"
    before = logits(tiny_llama)
    assert torch.equal(logits(convert_(tiny_llama)), before)


def test_activations_that_are_not_finite_name_their_layer(tiny_llama):
    rule = Rule("*.down_proj", activation=ActivationConfig(8, check_finite=True))
    quantize_(tiny_llama, QuantConfig((rule,)))
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(FormatError, match="model.layers.1.mlp.down_proj"):
        tiny_llama(TOKENS)


def test_convolutions_and_biases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    inputs = torch.randn(2, 4, 6, 6)
    quantize_(model, QuantConfig.weights("int4"))
    model(inputs).sum().backward()
    assert model[0].weight.grad is not None and model[0].quantizer.weight_scale.grad is not None
    before = model(inputs)
    assert torch.equal(convert_(model)(inputs), before)
    assert torch.equal(dequantize_(model)(inputs), before)
    assert isinstance(model[0], nn.Conv2d) and isinstance(model[3], nn.Linear)


def test_training_moves_codes_and_scales(tiny_llama):
    quantize_(tiny_llama, QuantConfig.weights("int4", 32))
    start = codes_of(tiny_llama)
    optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tiny_llama(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    flipped = sum((codes_of(tiny_llama)[name] != codes).sum().item() for name, codes in start.items())
    assert flipped > 0


def test_refusals_change_nothing(tiny_llama):
    before = logits(tiny_llama)
    with pytest.raises(UsageError, match="matches no linear"):
        quantize_(tiny_llama, QuantConfig((Rule("*.conv", WeightConfig()),)))
    with pytest.raises(UsageError, match=r"q_proj.*64.*groups of 48.*32"):
        quantize_(tiny_llama, QuantConfig.weights("int4", 48))
    with pytest.raises(UsageError, match="convert_ needs a model"):
        convert_(tiny_llama)
    assert torch.equal(logits(tiny_llama), before) and not quantized_modules(tiny_llama)
    quantize_(tiny_llama, QuantConfig.weights("int4"))
    with pytest.raises(UsageError, match="already"):
        quantize_(tiny_llama, QuantConfig.weights("int4"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tiny_llama, bad):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.down_proj.weight[3, 5] = bad
    with pytest.raises(FormatError, match="model.layers.1.mlp.down_proj"):
        quantize_(tiny_llama, QuantConfig.weights("int4"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: WeightConfig("int5"), "binary, ternary"),
        (lambda: WeightConfig(scale="best"), "absmax"),
        (lambda: WeightConfig(granularity=0), "granularity=0; it must be 'row', 'tensor'"),
        (lambda: WeightConfig(granularity="column"), "'row', 'tensor'"),
        (lambda: WeightConfig.for_bits(1.5), "1.58"),
        (lambda: ActivationConfig(1), "from 2 to 16"),
        (lambda: ActivationConfig(17), "from 2 to 16"),
    ],
)
def test_settings_that_cannot_work_say_what_can(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_all_zero_and_huge_and_bfloat16_weights_stay_valid():
    model = nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 32))
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].weight[1] *= 1e6
    for grid in GRIDS:
        copied = quantize_(copy.deepcopy(model).bfloat16(), QuantConfig.weights(grid))
        out = copied(torch.randn(3, 32).bfloat16())
        assert torch.isfinite(out).all()
        assert isinstance(copied[0], QuantLinear)
        packed = convert_(copied)[0].packed
        assert torch.isfinite(packed.step).all() and packed.codes.dtype == torch.int8
