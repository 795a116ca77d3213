"""MLP pruning: order, dead neurons, biases, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edgewright
from edgewright.errors import Unsupported, UsageError
from edgewright.pruning.importance import MLPNames, collect
from edgewright.pruning.width import prune_mlp_
from edgewright.quantization.config import QuantConfig
from tests.toy_llama import make_tiny_llama

TOKENS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def test_dead_neurons_rank_last_and_go_without_a_trace() -> None:
    model = make_tiny_llama()
    dead = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:64]
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[dead] = 0
    stats = collect(model, [TOKENS])
    with torch.no_grad():
        before = model(TOKENS).logits
        kept = prune_mlp_(model, 64, stats, multiple=32)
        after = model(TOKENS).logits
    for index in kept:
        assert not set(index.tolist()) & set(dead.tolist())
        assert index.tolist() == sorted(index.tolist())
    # shorter sums, rounded in another order
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert model.config.intermediate_size == 64
    assert all(layer.mlp.down_proj.in_features == 64 for layer in model.model.layers)


def test_rows_and_columns_are_those_of_the_neurons() -> None:
    model = make_tiny_llama(mlp_bias=True)
    whole = make_tiny_llama(mlp_bias=True)
    score = torch.arange(128).float() % 7
    kept = prune_mlp_(model, 32, [score, -score])
    assert kept[0].tolist() == sorted(torch.sort(score, descending=True, stable=True).indices[:32].tolist())
    for layer, original, index in zip(model.model.layers, whole.model.layers, kept, strict=True):
        for name in ("gate_proj", "up_proj"):
            assert torch.equal(getattr(layer.mlp, name).weight, getattr(original.mlp, name).weight[index])
            assert torch.equal(getattr(layer.mlp, name).bias, getattr(original.mlp, name).bias[index])
        assert torch.equal(layer.mlp.down_proj.weight, original.mlp.down_proj.weight[:, index])
        assert torch.equal(layer.mlp.down_proj.bias, original.mlp.down_proj.bias)


def test_widths_that_do_not_fit_are_refused() -> None:
    model = make_tiny_llama()
    scores = [torch.zeros(128)] * 2
    with pytest.raises(ValueError, match="width=100 is not a multiple of 64, the quantisation group; use 64"):
        prune_mlp_(model, 100, scores, multiple=64)
    for width in (0, 129):
        with pytest.raises(ValueError, match="choose 1 to that many"):
            prune_mlp_(model, width, scores)
    with pytest.raises(UsageError, match="of 1 blocks"):
        prune_mlp_(model, 64, scores[:1])
    with pytest.raises(UsageError, match="its statistics 64"):
        prune_mlp_(model, 64, [torch.zeros(64)] * 2)
    assert model.model.layers[0].mlp.up_proj.out_features == 128


def test_quantised_layers_and_unknown_names_are_refused() -> None:
    model = make_tiny_llama()
    edgewright.quantize_(model, QuantConfig.weights("int4", scale="absmax"))
    with pytest.raises(Unsupported, match="prune the float model first"):
        prune_mlp_(model, 64, [torch.zeros(128)] * 2)
    with pytest.raises(Unsupported, match="no layer 'mlp.fc1'"):
        prune_mlp_(make_tiny_llama(), 64, [torch.zeros(128)] * 2, names=MLPNames("mlp.fc1", "mlp.fc2", None))


class Plain(nn.Module):
    """An MLP with one input projection."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def test_an_mlp_of_other_names_through_an_adapter() -> None:
    model = make_tiny_llama()
    names = MLPNames("mlp.fc1", "mlp.fc2", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in model.model.layers:
            layer.mlp = Plain()
            nn.init.constant_(layer.mlp.fc1.bias[:48].data, -1e3)  # never active
    with torch.no_grad():
        before = model(TOKENS).logits
        prune_mlp_(model, 48, collect(model, [TOKENS], names=names), names=names)
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=1e-6)  # as above
