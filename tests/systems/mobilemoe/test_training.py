"""Balancing, the router's z-loss, counts by domain."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.io.transformers_names import checkpoint_activations
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, new_decoder
from edgewright.systems.mobilemoe.layer import moe_layers
from edgewright.systems.mobilemoe.training import (
    ExpertUsage,
    LoadBalancer,
    MoELoss,
    expert_usage,
    record_routing,
    router_z_loss,
)
from edgewright.training import TrainConfig, fit
from edgewright.training.batches import BlockBatches
from edgewright.training.optimizer import default_optimizer


def model(**changes: Any) -> EdgeDecoderForCausalLM:
    moe = {"num_experts": 8, "top_k": 2, "expert_size": 8, "shared_size": 16}
    fields = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return new_decoder(EdgeDecoderConfig(**{**fields, "ffn_types": "moe", "moe": moe, **changes})).train()


def tokens(rows: int = 4, length: int = 10, low: int = 0, high: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_a_step_of_the_balancer_is_the_sign_rule() -> None:
    network = model()
    balancer = LoadBalancer(network, rate=0.01)
    network(tokens())
    network(tokens(seed=1))  # a second micro batch counts too
    counts = {name: value.clone() for name, value in balancer.counts.items()}
    network.eval()(tokens(seed=2))  # evaluation does not
    balancer.step()
    for name, layer in moe_layers(network).items():
        n = counts[name].double()
        assert n.sum() == 2 * 4 * 10 * 2 and torch.equal(balancer.loads[name], counts[name])
        expected = 0.01 * torch.sign(n.mean() - n)
        torch.testing.assert_close(layer.gate.e_score_correction_bias.double(), expected, rtol=1e-6, atol=0)
        assert not balancer.counts[name].any()
    assert not any("bias" in name for name, p in network.named_parameters())
    balancer.close()
    network.train()(tokens())
    assert not any(counts.any() for counts in balancer.counts.values())


def test_balancing_evens_the_load_out() -> None:
    """Only the bias moves here: with frozen weights it must find equal loads by itself."""
    network = model()
    balancer, ids = LoadBalancer(network, rate=0.002), tokens(16, 16)
    with torch.no_grad():
        loads = []
        for _ in range(60):
            network(ids)
            balancer.step()
            loads.append(balancer.max_load())
    assert min(loads[0].values()) > 1.4 and max(loads[-1].values()) < 1.3


def test_checkpointed_blocks_count_once() -> None:
    plain, again = model(), model()
    counted = []
    for network in (plain, again):
        balancer = LoadBalancer(network)
        if network is again:
            checkpoint_activations(network)
        network(tokens(), labels=tokens(), use_cache=False).loss.backward()
        counted.append(balancer.counts)
    assert all(torch.equal(a, counted[1][name]) for name, a in counted[0].items())


def test_the_z_loss_is_the_mean_squared_logsumexp() -> None:
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    expected = sum(float(torch.log(row.double().exp().sum())) ** 2 for row in logits) / 7
    assert float(router_z_loss(logits)) == pytest.approx(expected, rel=1e-6)
    assert float(router_z_loss(logits[:0])) == 0


def test_the_loss_reaches_the_router() -> None:
    network = model()
    loss, metrics = MoELoss(lambda m, b: m(b, labels=b).loss, z_weight=3.0)(network, tokens())
    plain = network(tokens(), labels=tokens()).loss
    torch.testing.assert_close(loss, plain + 3.0 * metrics["z_loss"])
    assert 1 <= metrics["max_load"] <= 4
    with record_routing(network) as routings:
        network(tokens())
    assert [name for name, _ in routings] == list(moe_layers(network))
    router_z_loss(routings[0][1].logits).backward()
    assert network.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_a_run_resumes_with_its_balance(tmp_path: Path) -> None:
    def run(folder: Path, steps: int) -> EdgeDecoderForCausalLM:
        network = model()
        optimizer = default_optimizer(network, 1e-3)
        loss = MoELoss(lambda m, b: m(b, labels=b).loss, LoadBalancer(network, 0.01).attach(optimizer))
        config = TrainConfig(4, 1e-3, accumulation=2, checkpoint_every=2)
        stop = _Stop(BlockBatches(tokens(32), 4), steps)
        try:
            fit(network, loss, stop, config, optimizer=optimizer, output=folder, progress=False)
        except ZeroDivisionError:
            pass
        return network

    whole = run(tmp_path / "whole", 99)
    run(tmp_path / "cut", 5)
    for name, value in run(tmp_path / "cut", 99).state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    assert whole.model.layers[0].mlp.gate.e_score_correction_bias.abs().sum() > 0


class _Stop(BlockBatches):
    """Batches that break off: what a crash leaves is the last checkpoint."""

    def __init__(self, inner: BlockBatches, count: int) -> None:
        super().__init__(inner.blocks, inner.batch_size)
        self.left = count

    def __next__(self) -> Any:
        self.left -= 1
        return super().__next__() if self.left >= 0 else 1 / 0


def test_the_balancer_s_state_is_its_counts() -> None:
    network = model()
    balancer = LoadBalancer(network, 0.25)
    network(tokens())
    other = LoadBalancer(copy.deepcopy(model()), 0.5)
    other.load_state_dict(balancer.state_dict())
    assert other.rate == 0.25 and all(torch.equal(v, other.counts[k]) for k, v in balancer.counts.items())
    with pytest.raises(UsageError, match="disagree on layer 'model.layers.1.mlp'"):
        LoadBalancer(model(num_hidden_layers=1)).load_state_dict(balancer.state_dict())
    with pytest.raises(UsageError, match="rate=-1"):
        LoadBalancer(network, -1)
    with pytest.raises(UsageError, match="has no SparseMoE layer"):
        LoadBalancer(model(ffn_types="mlp"))


def test_usage_tells_domains_apart(tmp_path: Path) -> None:
    network = model()
    domains = {"low": tokens(24, high=8).split(8), "high": [{"input_ids": tokens(24, low=56)}]}
    usage = expert_usage(network, domains)
    assert network.training and usage.sequences.shape == (48, 2, 8)
    assert (usage.counts.sum(-1) == 24 * 10 * 2).all()
    torch.testing.assert_close(usage.share.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    assert usage.divergence() > float(usage.shuffled_divergence(50).max())
    assert usage.plot(tmp_path / "usage.png").stat().st_size > 0
    with pytest.raises(UsageError, match="domain 'empty' has no batches"):
        expert_usage(network, {"empty": []})


def test_usage_on_a_hand_case() -> None:
    """One layer of four experts; two domains that share nothing: one bit apart."""
    usage = ExpertUsage(("a", "b"), ("layer",), torch.tensor([[[2, 2, 0, 0]], [[0, 0, 4, 0]]]), torch.tensor([0, 1]))
    assert usage.divergence() == pytest.approx(1.0)
    assert usage.dead == [("layer", 3)] and float(usage.max_load[0]) == 2.0
    assert float(usage.variation[0]) == pytest.approx((0 + 0 + 4 + 4) ** 0.5 / 4**0.5 / 2)
