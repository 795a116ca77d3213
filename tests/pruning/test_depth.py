"""Depth pruning: which blocks go, that nothing else changes, and the published parameter counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edgewright.errors import UsageError
from edgewright.io.transformers_names import cache_of, with_cache
from edgewright.measure.size import parameter_counts
from edgewright.pruning.depth import lowest_blocks, prune_depth_
from edgewright.pruning.importance import Importance, collect
from edgewright.pruning.width import prune_mlp_
from tests.toy_llama import make_tiny_llama

TOKENS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def identity_(block: nn.Module) -> None:
    nn.init.zeros_(block.self_attn.o_proj.weight)
    nn.init.zeros_(block.mlp.down_proj.weight)


def stats_of(*importance: float) -> Importance:
    return Importance(1 - torch.tensor(importance, dtype=torch.float64), 1, (), 1)


def test_the_least_important_go_and_protected_stay() -> None:
    stats = stats_of(0.1, 0.5, 0.2, 0.2, 0.9, 0.0)
    assert lowest_blocks(stats, 4) == (0, 1, 4, 5)
    assert lowest_blocks(stats, 4, protect=()) == (1, 2, 3, 4)
    assert lowest_blocks(stats, 5, protect=()) == (0, 1, 2, 3, 4)
    assert lowest_blocks(stats, 3, protect=(2, 5)) == (2, 4, 5)
    assert lowest_blocks(stats, 5, protect=(5,)) == (1, 2, 3, 4, 5)
    with pytest.raises(UsageError, match="cannot hold the 2 protected blocks"):
        lowest_blocks(stats, 1)


def test_removing_an_identity_changes_nothing() -> None:
    model = make_tiny_llama(num_hidden_layers=4)
    identity_(model.model.layers[2])
    with torch.no_grad():
        before = model(TOKENS).logits
        kept = prune_depth_(model, 3, collect(model, [TOKENS]))
        assert kept == (0, 1, 3)
        assert torch.equal(model(TOKENS).logits, before)


def test_layers_are_renumbered_so_that_the_cache_works() -> None:
    model = make_tiny_llama(num_hidden_layers=4)
    prune_depth_(model, keep=(0, 3))
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    with torch.no_grad():
        whole = model(TOKENS, use_cache=False).logits
        part = model(TOKENS[:, :8], use_cache=True)
        rest = model(TOKENS[:, 8:], **with_cache(cache_of(part))).logits
    # attention over a cache runs other kernels
    torch.testing.assert_close(rest, whole[:, 8:], rtol=1e-4, atol=1e-5)


def test_keeping_all_is_a_no_op() -> None:
    model = make_tiny_llama()
    with torch.no_grad():
        before = model(TOKENS).logits
        stats = collect(model, [TOKENS])
        assert prune_depth_(model, 2, stats) == (0, 1)
        prune_mlp_(model, 128, stats)
        assert torch.equal(model(TOKENS).logits, before)


def test_one_at_a_time_measures_again() -> None:
    model = make_tiny_llama(num_hidden_layers=5)
    seen = []

    def measure(part: nn.Module) -> Importance:
        stats = collect(part, [TOKENS], neurons=False)
        seen.append(len(stats.cosines))
        return stats

    whole = list(model.model.layers)
    kept = prune_depth_(model, 3, iterative=measure)
    assert seen == [5, 4] and kept[0] == 0 and kept[-1] == 4 and len(kept) == 3
    assert [whole.index(layer) for layer in model.model.layers] == list(kept)


def test_the_cut_model_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = make_tiny_llama(num_hidden_layers=4)
    stats = collect(model, [TOKENS])
    prune_depth_(model, 3, stats)
    prune_mlp_(model, 64, [stats.neurons[i] for i in (0, 1, 3)])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.config.num_hidden_layers, again.config.intermediate_size) == (3, 64)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("layers", [0, 5, -1, None])
def test_impossible_numbers_are_refused(layers: int | None) -> None:
    model = make_tiny_llama(num_hidden_layers=4)
    with pytest.raises(ValueError, match="the model has 4 blocks; choose a number from 1 to 4"):
        prune_depth_(model, layers, stats_of(0.1, 0.2, 0.3, 0.4))
    assert len(model.model.layers) == 4


def test_impossible_choices_are_refused() -> None:
    model = make_tiny_llama()
    for keep in ((), (1, 0), (0, 0), (0, 2), (-1,)):
        with pytest.raises(UsageError, match="keep"):
            prune_depth_(model, keep=keep)
    with pytest.raises(UsageError, match="needs stats"):
        prune_depth_(model, 1)
    with pytest.raises(UsageError, match="of 3 blocks, the model has 2"):
        prune_depth_(model, 2, stats_of(1, 2, 3))


def test_published_parameter_counts() -> None:
    """Section 6: 16 layers of 8192 against 12 of 6400, from a model without memory."""
    settings = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=16, intermediate_size=8192, **settings))
        assert parameter_counts(model).total == 973_146_112 + 2 * 262_668_288
        prune_depth_(model, keep=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15])
        prune_mlp_(model, 6400, [torch.zeros(8192, device="cpu")] * 12, multiple=256)
    assert parameter_counts(model).total == 597_739_520 + 2 * 262_668_288 == 1_123_076_096
    model.lm_head = nn.Linear(2048, 20, bias=False, device="meta")
    weights = parameter_counts(model).total
    assert weights == 597_739_520 + 262_668_288 + 20 * 2048
    body = weights - sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    for scale_bytes, megabytes in ((2, 437), (4, 444)):  # one scale per 256 weights
        assert round((body / 2 + body / 256 * scale_bytes) / 1e6) == pytest.approx(megabytes, abs=1)
