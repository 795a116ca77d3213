"""Gloo processes with a share of the tables' columns each, started by test_stem_parallel.py: a module of its own, so
that what they import is torch and the package alone."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from edgewright.systems.stem.layer import stem_blocks
from edgewright.systems.stem.training import shard_tables, sharded_groups
from edgewright.training.distributed import sync_gradients
from tests.processes import run_group
from tests.systems.stem.toys import stem, tokens

STEPS = 3


def batch(step: int) -> Tensor:
    """[4, 10]: one row or two a process."""
    return tokens(4, 10, seed=step)


def train(model: Any, rows: slice, mesh: Any = None) -> None:
    """Plain SGD, whose update is the gradient itself; under a mesh, on this process's rows."""
    groups = [{"params": list(model.parameters())}] if mesh is None else sharded_groups(model)
    optimizer = torch.optim.SGD(groups, lr=0.5)
    for step in range(STEPS):
        ids = batch(step)[rows]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if mesh is not None:
            sync_gradients(model, mesh)
        optimizer.step()


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for name, v in state.items()}


def _process(world: int, folder: Path, rank: int) -> None:
    dist.init_process_group("gloo")
    share = 4 // world
    for shape in [(1, world), (2, world // 2)] if world == 4 else [(1, world), (world, 1)]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "stem"))
        model = shard_tables(stem(seed=0 if mesh["stem"].get_local_rank() == 0 else 9), mesh)
        if mesh["stem"].get_local_rank():  # only the tables come from the first process
            first = stem(seed=0).state_dict()
            model.load_state_dict({k: v for k, v in first.items() if "table" not in k}, strict=False)
        local: Any = stem_blocks(model)[1].table.weight  # type: ignore[union-attr]
        assert local.to_local().shape == (64, 48 // shape[1])
        train(model, slice(share * rank, share * (rank + 1)), mesh)
        state = whole(model.state_dict())
        if rank == 0:
            kept = {k: v.contiguous() for k, v in state.items() if k != "lm_head.weight"}
            save_file(kept, folder / f"{world}-{shape[0]}.safetensors")
        if shape[0] == 1:
            dcp.save({"model": model.state_dict()}, checkpoint_id=str(folder / f"checkpoint-{world}"))
    try:
        odd = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "stem"))
        shard_tables(stem(intermediate_size=50 if world == 4 else 49), odd)
    except ValueError as error:
        (folder / f"refused-{world}-{rank}").write_text(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    for size in (2, 4):
        run_group(size, partial(_process, size, Path(sys.argv[1])))
