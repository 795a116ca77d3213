"""PARQ around a model: groups of parameters, conversion to packed layers, plots, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from edgewright.errors import Unsupported, UsageError
from edgewright.io.packed import PackedConv2d, PackedEmbedding, PackedLinear
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.parq.lsbq import LSBQ, Uniform
from edgewright.systems.parq.model import convert_parq_, quantized_groups, weight_histogram
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.systems.parq.proximal import ProxHard, ProxPARQ
from tests.systems.parq.toys import adamw, flat, groups_of, network, parq, sgd, train


class Mixed(nn.Module):
    """An embedding tied to the head, a convolution, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(64, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        image = self.table(tokens).reshape(-1, 1, 4, 4)
        return self.head(self.norm(self.mix(self.conv(image).flatten(1))))


def mixed(targets, steps: int = 8, skip=()) -> tuple[Mixed, QuantOptimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed()
    optimizer = QuantOptimizer(
        adamw(
            quantized_groups(model, targets, skip=skip)
            if isinstance(targets, dict)
            else quantized_groups(model, targets)
        ),
        ProxPARQ(0, 6),
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(10)).square().mean().backward()
        optimizer.step()
    return model, optimizer


EXPORTABLE = [
    LSBQ(1),
    LSBQ(0, granularity="tensor"),
    LSBQ(0, optimal=True, scale_dtype="float32"),
    Uniform("seq2"),
    Uniform("symmetric4", "max"),
    Uniform("int4", "mse"),
    Uniform("int8", "range", "tensor"),
]


@pytest.mark.parametrize(
    "targets", EXPORTABLE, ids=lambda t: f"{type(t).__name__} {getattr(t, 'bits', None) or getattr(t, 'grid', 0)}"
)
def test_converted_equals_the_trained_weights_bit_for_bit(targets):
    model, optimizer = mixed({"*": targets})
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(torch.arange(10))
    convert_parq_(model, optimizer)
    assert isinstance(model.table, PackedEmbedding) and isinstance(model.head, PackedLinear)
    assert isinstance(model.conv, PackedConv2d) and isinstance(model.mix, PackedLinear)
    assert model.table.codes is model.head.codes
    for name in ("table", "conv", "mix"):
        layer = model.get_submodule(name)
        assert layer.codes.dtype == torch.int8
        assert torch.equal(layer.weight.reshape(trained[f"{name}.weight"].shape), trained[f"{name}.weight"])
    with torch.no_grad():
        assert torch.equal(model(torch.arange(10)), expected)


def test_one_config_with_module_swap_training(tiny_llama):
    config = QuantConfig(
        rules=(Rule("*mlp*", WeightConfig("ternary", 32, scale="absmean")), Rule("*_proj", WeightConfig("int4")))
    )
    groups = quantized_groups(tiny_llama, config, weight_decay=0.1, lr=1e-3)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert sum(len(part) for part in names) == len(list(tiny_llama.parameters()))
    kinds = {group.get("targets"): part for group, part in zip(groups, names, strict=True)}
    assert (
        all("mlp" in name for name in kinds[Uniform("ternary", "absmean", 32)])
        and len(kinds[Uniform("int4", "mse")]) == 8
    )
    decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert decays["model.norm.weight"] == 0.0 and decays["model.embed_tokens.weight"] == 0.1
    optimizer = QuantOptimizer(torch.optim.AdamW(groups), ProxHard())
    tokens = torch.arange(24).reshape(2, 12)
    tiny_llama(tokens, labels=tokens).loss.backward()
    optimizer.step()
    with torch.no_grad():
        trained = tiny_llama(tokens).logits
        assert torch.equal(convert_parq_(tiny_llama, optimizer)(tokens).logits, trained)


def test_converting_amid_the_annealing_warns_and_packs_hard_weights():
    model, optimizer = mixed({"*": LSBQ(1)}, steps=4)
    with optimizer.hard_weights():
        hard = model.mix.weight.detach().clone()
    with pytest.warns(UserWarning, match="annealing ends at step 6, this is step 4"):
        convert_parq_(model, optimizer)
    assert torch.equal(model.mix.weight, hard)


@pytest.mark.parametrize("targets", [LSBQ(2), Uniform("half4")])
def test_targets_without_an_integer_grid_are_not_converted(targets):
    model, optimizer = mixed({"mix": LSBQ(1), "conv": targets})
    before = dict(model.named_parameters())
    with pytest.raises(UsageError, match=r"conv.weight.*no integer grid.*Uniform\('seq2'\)"):
        convert_parq_(model, optimizer)
    assert dict(model.named_parameters()).keys() == before.keys()


def test_parameters_of_no_packed_layer_are_not_converted():
    attention = nn.MultiheadAttention(8, 2)
    optimizer = QuantOptimizer(sgd([{"params": [attention.in_proj_weight], "targets": LSBQ(1)}]), ProxHard())
    attention.in_proj_weight.grad = torch.ones_like(attention.in_proj_weight)
    optimizer.step()
    with pytest.raises(Unsupported, match="in_proj_weight"):
        convert_parq_(attention, optimizer)


def test_a_bias_by_row_has_one_row():
    bias = nn.Parameter(torch.randn(9, generator=torch.Generator().manual_seed(0)))
    optimizer = QuantOptimizer(sgd([{"params": [bias], "targets": LSBQ(1)}]), ProxHard())
    bias.grad = torch.zeros(9)
    optimizer.step()
    assert bias.detach().abs().unique().numel() == 1


def test_the_histogram_of_hard_weights_has_a_bar_for_each_target():
    soft, hard = (weight_histogram(mixed({"*": LSBQ(0)}, steps)[1]) for steps in (4, 8))
    assert float(soft.sum()) == pytest.approx(1) == float(hard.sum())
    assert (hard > 0).sum() == 3 < (soft > 0).sum()


# -- bad inputs --------------------------------------------------------------------------------------------------------


def matrices(dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(6, 10, dtype=dtype))]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: QuantOptimizer(torch.optim.LBFGS(matrices()), ProxHard()), "LBFGS cannot be wrapped"),
        (lambda: QuantOptimizer(sgd(matrices()), ProxHard()), "no parameter group has 'targets'"),
        (lambda: parq(network(), LSBQ(1), ProxHard(), quant_period=0), "quant_period=0"),
        (lambda: parq(network(), LSBQ(1), ProxHard(), warmup_steps=-1), "warmup_steps=-1"),
        (lambda: parq(network(), LSBQ(1), ProxHard(), anneal_weight_decay=2.0), "anneal_weight_decay=2.0"),
        (
            lambda: parq(network(), LSBQ(1, granularity=7), ProxHard()),
            "rows of 12 weights do not divide into blocks of 7",
        ),
        (lambda: parq(network().half(), LSBQ(1), ProxHard()), "is float16.*TrainConfig"),
        (lambda: parq(network().bfloat16(), LSBQ(1), ProxHard()), "is bfloat16"),
        (lambda: quantized_groups(network(), {"5": LSBQ(1)}), "pattern '5' matches no"),
        (lambda: quantized_groups(network(), {"0": LSBQ(1, granularity=7)}), "layer 0: its rows of 12"),
        (lambda: quantized_groups(network(), {"*": LSBQ(1)}, skip=("*",)), "nothing is selected"),
    ],
)
def test_bad_settings_say_what_is_allowed(build, words):
    with pytest.raises(UsageError, match=words):
        build()


def test_a_name_is_in_the_message_where_groups_have_names():
    groups = [{"params": [("layer.weight", p) for p in matrices()], "targets": LSBQ(1, granularity=4)}]
    with pytest.raises(UsageError, match="parameter layer.weight: its rows of 10"):
        QuantOptimizer(sgd(groups), ProxHard())


def test_checkpoints_that_do_not_fit_are_refused_before_anything_changes():
    model = network()
    optimizer = parq(model, LSBQ(1), ProxPARQ(0, 20))
    train(model, optimizer, 0, 5)
    good, before = optimizer.state_dict(), flat(model)
    bare = sgd(groups_of(network(), "ignored", None)).state_dict()
    without = {
        **good,
        "state": {k: {n: v for n, v in e.items() if n != "parq_latent"} for k, e in good["state"].items()},
    }
    small = nn.Sequential(nn.Linear(12, 3), nn.Linear(3, 7))
    other = parq(small, LSBQ(1), ProxPARQ(0, 20))
    train(small, other, 0, 2)
    for state, words in [
        (bare, "bare one without latent weights"),
        (without, "parameter 0 has no latent weights in the saved optimizer, which did 5 steps"),
        ({**good, "param_groups": good["param_groups"][:1]}, "1 parameter groups, this one 2"),
        (parq(network(), LSBQ(0), ProxPARQ(0, 20)).state_dict(), "saved with targets"),
        (parq(network(), LSBQ(1), ProxPARQ(0, 30)).state_dict(), "'anneal_end': 30"),
        (other.state_dict(), r"parameter 0 was saved as \[3, 12\], now it is \[20, 12\]"),
    ]:
        with pytest.raises(UsageError, match=words):
            optimizer.load_state_dict(state)
    assert torch.equal(flat(model), before) and optimizer.steps == 5
    optimizer.load_state_dict(good)
    assert torch.equal(flat(model), before)


def test_no_two_settings_share_a_name():
    names = [str(t.to_dict()) for t in EXPORTABLE]
    assert all(a != b for a, b in itertools.combinations(names, 2))
