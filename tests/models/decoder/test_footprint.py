"""Costs of a decoder before it exists: equal to what is counted, written and read afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.io.transformers_names import cache_of
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.design import design_sweep
from edgewright.models.decoder.footprint import footprint
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, new_decoder
from edgewright.systems.mobilellm.presets import SHAPES, mobilellm_config

PUBLISHED = {
    "125M": 124_635_456,
    "350M": 345_355_200,
    "600M": 603_188_352,
    "1B": 1_005_461_760,
    "1.5B": 1_511_188_800,
}


def small(**changes: Any) -> EdgeDecoderConfig:
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    return EdgeDecoderConfig(**{**shape, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})


def counted(config: EdgeDecoderConfig) -> int:
    with torch.device("meta"):
        model = EdgeDecoderForCausalLM(config)
    tied = config.tie_word_embeddings
    return sum(p.numel() for name, p in model.named_parameters() if not (tied and name == "lm_head.weight"))


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes(name: str) -> None:
    config = mobilellm_config(name)
    cost = footprint(config)
    assert cost.stored == counted(config) == PUBLISHED.get(name, cost.stored)
    assert cost.executed == cost.stored and cost.active == cost.stored


def test_sharing_is_explicit_and_runs_each_block_twice() -> None:
    assert mobilellm_config("125M").share_map == list(range(30))
    config = mobilellm_config("125M", layer_sharing=True)
    cost, once = footprint(config, context=1), footprint(mobilellm_config("125M"), context=1)
    assert config.num_hidden_layers == 60 and config.num_stored_layers == 30
    assert cost.stored == once.stored and cost.weight_bytes == once.weight_bytes
    table = 32000 * 576 + 576
    assert cost.executed - table == 2 * (once.executed - table)
    assert cost.kv_bytes_per_token == 2 * once.kv_bytes_per_token == 60 * 2 * 3 * 64 * 2


def test_a_large_table_shows() -> None:
    assert footprint(mobilellm_config("125M", vocab_size=128_256)).embedding_share > 0.4


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    model = new_decoder(small(share_map=[0, 0, 1, 1], tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert footprint(model, weight_bits=32).weight_bytes == pytest.approx(written, rel=0.02)  # a header of 2 kB
    bits = footprint(model, weight_bits=4.5, embedding_bits=8.5)
    vectors = 2 * 2 * 64 + 64
    matrices = counted(model.config) - vectors - 512 * 64
    assert bits.weight_bytes == round((4.5 * matrices + 8.5 * 512 * 64 + 32 * vectors) / 8)


def test_cache_bytes_are_those_of_the_cache() -> None:
    config = small(
        mixers=["full_attention", "sliding_attention", "skip_attention", "full_attention"],
        sliding_window=8,
        num_hidden_layers=4,
    )
    cache = cache_of(new_decoder(config)(torch.zeros(1, 24, dtype=torch.long), use_cache=True))
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.keys is not None]
    window_less_one = 2 * 2 * 16  # transformers keeps the 7 positions that a next token will see beside itself
    assert footprint(config, kv_bits=32, context=24).cache_bytes == 4 * (sum(held) + window_less_one)


def test_operations_are_those_of_the_matrices() -> None:
    config = small()
    cost = footprint(config, context=10)
    weights = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 512 * 64
    assert cost.decode_flops == 2 * weights + 4 * 4 * 64 * 10
    assert cost.prefill_flops == 2 * weights + 4 * 4 * 64 * 5.5
    window = footprint(small(mixers="sliding_attention", sliding_window=3), context=5)
    assert window.prefill_flops == pytest.approx(2 * weights + 4 * 4 * 64 * (1 + 2 + 3 + 3 + 3) / 5)


def test_speed_is_memory_over_bytes() -> None:
    cost = footprint(small(), weight_bits=32, kv_bits=32, context=1)
    assert cost.read_bytes == 4 * cost.stored + cost.cache_bytes
    assert cost.tokens_per_second(1e6) == 1e6 / cost.read_bytes


@pytest.mark.parametrize("arguments", [{"weight_bits": 0}, {"kv_bits": -1}, {"context": 0}])
def test_senseless_questions_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))):
        footprint(small(), **arguments)


@pytest.mark.parametrize(("target", "vocab"), [(1.5e6, 4096), (12e6, 8192), (125e6, 32000)])
def test_designs_have_the_asked_size(target: float, vocab: int) -> None:
    configs = design_sweep(target, (2, 4, 8, 16, 24), vocab)
    assert len(configs) >= 4
    for config in configs:
        assert counted(config) == pytest.approx(target, rel=0.01)
        assert footprint(config).stored == counted(config)
    widths = [config.hidden_size for config in configs]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) > 2


def test_designs_with_shared_blocks_count_stored_weights() -> None:
    (config,) = design_sweep(1.5e6, [4], 4096, layer_sharing=True)
    assert config.share_map == [0, 0, 1, 1, 2, 2, 3, 3] and counted(config) == pytest.approx(1.5e6, rel=0.01)


def test_what_cannot_be_designed_is_refused() -> None:
    with pytest.raises(UsageError, match="the smallest table alone has 1,600,000"):
        design_sweep(1e5, [4], 100_000)
    with pytest.raises(UsageError, match="depths"):
        design_sweep(1e6, [], 4096)
    with pytest.raises(UsageError, match="no shape is called '126M'"):
        mobilellm_config("126M")
