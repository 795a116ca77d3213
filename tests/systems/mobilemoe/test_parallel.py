"""Experts shared out between two gloo processes: the same training as one process with all of them.

Run as a script, this file is the two processes.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, new_decoder
from edgewright.systems.mobilemoe.layer import MoEConfig
from edgewright.systems.mobilemoe.training import LoadBalancer, parallel_groups, parallelize_experts
from edgewright.training.distributed import sync_gradients
from tests.processes import run_group, run_script

STEPS = 3


def model(seed: int = 0) -> EdgeDecoderForCausalLM:
    moe = {"num_experts": 6, "top_k": 2, "expert_size": 8, "shared_size": 16}
    return new_decoder(
        EdgeDecoderConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=2,
            ffn_types="moe",
            moe=moe,
        ),
        seed,
    ).train()


def batch(step: int) -> Tensor:
    """[4, 10]: two rows a process."""
    return torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(step))


def train(network: EdgeDecoderForCausalLM, rows: slice, mesh: Any = None) -> LoadBalancer:
    """Plain SGD, whose update is the gradient itself, with the balancer; under a mesh, on this process's rows."""
    groups = [{"params": list(network.parameters())}] if mesh is None else parallel_groups(network)
    optimizer = torch.optim.SGD(groups, lr=0.5)
    balancer = LoadBalancer(network, rate=0.02).attach(optimizer)
    for step in range(STEPS):
        ids = batch(step)[rows]
        optimizer.zero_grad()
        network(input_ids=ids, labels=ids).loss.backward()
        if mesh is not None:
            sync_gradients(network, mesh)
        optimizer.step()
    return balancer


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for name, v in state.items()}


def _process(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo")
    for name, shape in (("ep", (1, 2)), ("dp", (2, 1))):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))
        network = parallelize_experts(model(), mesh)
        local = network.model.layers[0].mlp.experts.gate_up_proj.to_local()
        assert len(local) == 6 // shape[1]
        balancer = train(network, slice(2 * rank, 2 * rank + 2), mesh)
        loads = {f"loads.{layer}": counts for layer, counts in balancer.loads.items()}
        state = whole(network.state_dict())
        if rank == 0:
            save_file({k: v for k, v in state.items() if k != "lm_head.weight"} | loads, folder / f"{name}.safetensors")
        if name == "ep":
            dcp.save({"model": network.state_dict()}, checkpoint_id=str(folder / "checkpoint"))
            odd = model()
            odd.model.layers[0].mlp.config = MoEConfig(5, 2, 8, 16)
            try:
                parallelize_experts(odd, mesh)
            except ValueError as error:
                (folder / f"refused-{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    run_script(__file__, folder)
    return folder


@pytest.mark.parametrize("name", ["ep", "dp"])
def test_two_processes_equal_one(folder: Path, name: str) -> None:
    one = model()
    balancer = train(one, slice(0, 4))
    found = load_file(folder / f"{name}.safetensors")
    start = model().state_dict()
    for key, value in one.state_dict().items():
        if key == "lm_head.weight":
            continue
        assert not torch.equal(value, start[key]), key
        # sums over tokens in another order, three steps long: a few units in the last place of weights below 1
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
    for layer, counts in balancer.loads.items():
        assert torch.equal(found[f"loads.{layer}"], counts)


def test_a_checkpoint_holds_whole_experts(folder: Path) -> None:
    """Written by two processes, read by one that has all the experts."""
    one = model(seed=1)
    state = {"model": one.state_dict()}
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"))
    expected = load_file(folder / "ep.safetensors")
    for key, value in one.state_dict().items():
        assert torch.equal(value, expected["model.embed_tokens.weight" if key == "lm_head.weight" else key]), key


def test_experts_that_do_not_divide_are_refused(folder: Path) -> None:
    for rank in range(2):
        assert "num_experts=5 does not divide among 2 processes of ep" in (folder / f"refused-{rank}").read_text()


if __name__ == "__main__":
    run_group(2, partial(_process, Path(sys.argv[1])))
