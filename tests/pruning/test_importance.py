"""Importance statistics against a naive two-loop version, their sums, and the decoders they refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from edgewright.errors import FormatError, Unsupported, UsageError
from edgewright.pruning.importance import Importance, MLPNames, _Tally, collect


def padded_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Three sequences of 9, 5 and 0 real tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 250, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 5, 0]).unsqueeze(1)
    return {"tokens": tokens.masked_fill(~mask, 2), "mask": mask}


def keeping(into: list[torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    return lambda _, inputs: into.append(inputs[0])


def naive(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[list[float], list[list[float]]]:
    """BI and neuron norms, sequence by sequence without padding, token by token."""
    layers = model.model.layers
    cosines, tokens = [0.0] * len(layers), 0
    norms = [[0.0] * layer.mlp.down_proj.in_features for layer in layers]
    sequences = 0
    for ids, mask in zip(batch["tokens"], batch["mask"], strict=True):
        real = ids[mask]
        if not len(real):
            continue
        sequences, tokens = sequences + 1, tokens + len(real)
        hidden: list[torch.Tensor] = []
        streams: list[torch.Tensor] = []
        handles = [layer.mlp.down_proj.register_forward_pre_hook(keeping(hidden)) for layer in layers]
        handles += [part.register_forward_pre_hook(keeping(streams)) for part in (*layers, model.model.norm)]
        with torch.no_grad():
            model(real.unsqueeze(0))
        for handle in handles:
            handle.remove()
        for i in range(len(layers)):
            for x, y in zip(streams[i][0], streams[i + 1][0], strict=True):
                cosines[i] += float(x.double() @ y.double() / (x.double().norm() * y.double().norm()))
            for j in range(hidden[i].shape[-1]):
                norms[i][j] += float(hidden[i][0, :, j].double().norm())
    return [1 - c / tokens for c in cosines], [[n / sequences for n in row] for row in norms]


def test_against_two_loops_with_padding(tiny_llama: nn.Module) -> None:
    batch = padded_batch()
    stats = collect(tiny_llama, [batch])
    blocks, neurons = naive(tiny_llama, batch)
    assert (stats.tokens, stats.sequences) == (14, 2)
    # padded and unpadded attention round differently
    torch.testing.assert_close(stats.blocks, torch.tensor(blocks, dtype=torch.float64), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.stack(stats.neurons), torch.tensor(neurons).double(), rtol=1e-4, atol=1e-6)


def test_the_papers_vector() -> None:
    tally = _Tally(1)
    tally.begin(torch.ones(1, 1, dtype=torch.bool))
    tally.block(0, torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]))
    assert float(tally.result().blocks) == pytest.approx(0.292893, abs=1e-6)


def test_an_identity_block_has_exactly_no_importance(tiny_llama: nn.Module) -> None:
    block = tiny_llama.model.layers[1]
    nn.init.zeros_(block.self_attn.o_proj.weight)
    nn.init.zeros_(block.mlp.down_proj.weight)
    stats = collect(tiny_llama, [padded_batch()], neurons=False)
    # a mean of cosines that are exactly one each
    assert float(stats.blocks[1]) == 0.0 and float(stats.blocks[0]) > 0
    with pytest.raises(UsageError, match="neurons were not measured"):
        _ = stats.neurons


def test_batches_add_up_and_survive_a_file(tiny_llama: nn.Module, tmp_path: Path) -> None:
    first, second = padded_batch(0), padded_batch(1)
    both = collect(tiny_llama, [first, second])
    summed = collect(tiny_llama, [first]) + collect(tiny_llama, [second])
    assert torch.equal(both.cosines, summed.cosines) and both.tokens == summed.tokens == 28
    both.save(tmp_path / "stats.safetensors")
    again = Importance.load(tmp_path / "stats.safetensors")
    assert torch.equal(again.cosines, both.cosines) and again.sequences == both.sequences
    assert all(torch.equal(a, b) for a, b in zip(again.norms, both.norms, strict=True))
    with pytest.raises(FormatError):
        (tmp_path / "junk.safetensors").write_bytes(b"nothing")
        Importance.load(tmp_path / "junk.safetensors")


def _process(rank: int, store: str, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part = Importance(torch.tensor([1.0 + rank, 2.0]).double(), 3 + rank, (torch.arange(3).double(),) * 2, 1)
    part.reduced().save(Path(folder) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_processes_reduce_to_the_sum(tmp_path: Path) -> None:
    processes.spawn(_process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        total = Importance.load(tmp_path / f"{rank}.safetensors")
        assert total.cosines.tolist() == [3.0, 4.0] and (total.tokens, total.sequences) == (7, 2)
        assert total.norms[1].tolist() == [0.0, 2.0, 4.0]


def test_other_names_need_an_adapter(tiny_llama: nn.Module) -> None:
    for layer in tiny_llama.model.layers:
        layer.mlp.renamed = layer.mlp.down_proj
    stats = collect(tiny_llama, [padded_batch()], names=MLPNames(down="mlp.renamed"))
    assert torch.equal(torch.stack(stats.norms), torch.stack(collect(tiny_llama, [padded_batch()]).norms))
    with pytest.raises(Unsupported, match=r"block 0 .* has no layer 'mlp.fc2'.*MLPNames"):
        collect(tiny_llama, [padded_batch()], names=MLPNames("mlp.up_proj", "mlp.fc2", None))


def test_only_padding_is_refused(tiny_llama: nn.Module) -> None:
    batch = padded_batch()
    batch["mask"] = torch.zeros_like(batch["mask"])
    with pytest.raises(ValueError, match="no real token"):
        collect(tiny_llama, [batch])
    with pytest.raises(ValueError, match="no real token"):
        collect(tiny_llama, [])


def test_experts_and_parallel_blocks_are_refused(tiny_llama: nn.Module) -> None:
    with pytest.raises(NotImplementedError, match=r"no blocks at .model.layers"):
        collect(nn.Linear(2, 2), [torch.zeros(1, 1, dtype=torch.int64)])
    for key, value, complaint in (("num_local_experts", 8, "experts"), ("parallel_attn", True, "in parallel")):
        config = LlamaConfig(
            hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=1, **{key: value}
        )
        model = LlamaForCausalLM(config)
        with pytest.raises(NotImplementedError, match=complaint):
            collect(model, [torch.zeros(1, 1, dtype=torch.int64)])
