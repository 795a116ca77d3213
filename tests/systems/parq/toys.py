"""A small network under PARQ, and two processes that train it sharded.

python toys.py FOLDER      two processes over gloo: FSDP2 shards against what one process computes
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.systems.parq.lsbq import LSBQ, TargetConfig, Uniform
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.systems.parq.proximal import ProxMap, ProxPARQ
from tests.processes import run_group

STEPS = 50
SHARDED = {
    "row": LSBQ(2),
    "tensor": LSBQ(1, granularity="tensor"),
    "max": Uniform("int4", "max", "tensor"),
    "block": LSBQ(0, granularity=4),
}


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(16, 12, generator=generator), torch.randn(16, 7, generator=generator)


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.01)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def groups_of(model: nn.Module, key: str, value: Any) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": matrices, key: value}, {"params": [p for p in model.parameters() if p.ndim == 1]}]


def parq(
    model: nn.Module, targets: TargetConfig, prox: ProxMap, base: Callable[[Any], Any] = adamw, **options: Any
) -> QuantOptimizer:
    return QuantOptimizer(base(groups_of(model, "targets", targets)), prox, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int = 0, stop: int = STEPS) -> list[Tensor]:
    """All parameters after each step, flat."""
    seen = []
    for step in range(start, stop):
        x, y = batch(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        seen.append(flat(model))
    return seen


def flat(model: nn.Module) -> Tensor:
    """Every parameter, gathered whole where it is sharded."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return torch.cat([p.detach().flatten() for p in whole])


def _one_of_two(folder: Path, rank: int) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for name, targets in SHARDED.items():
        model, again = network(), network()
        for part in (model[0], model[2], model, again[0], again[2], again):
            fully_shard(part, mesh=mesh)
        optimizer = parq(model, targets, ProxPARQ(2, 10), sgd)
        train(model, optimizer, 0, 6)
        saved = copy.deepcopy(optimizer.state_dict())  # torch shares loaded tensors with the state they came from
        assert get_optimizer_state_dict(model, optimizer)["state"]["0.weight"]["parq_latent"].shape == (20, 12)
        resumed = parq(again, targets, ProxPARQ(2, 10), sgd)
        resumed.load_state_dict(saved)
        with torch.no_grad():
            for p, q in zip(model.parameters(), again.parameters(), strict=True):
                if p.ndim == 1:
                    q.to_local().copy_(p.to_local())
        for part, copied in ((model, optimizer), (again, resumed)):
            train(part, copied, 6, 12)
        whole = flat(model)
        assert torch.equal(whole, flat(again))
        with optimizer.latent_weights():
            latent = flat(model)
        if rank == 0:
            torch.save({"whole": whole, "latent": latent}, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_group(2, partial(_one_of_two, Path(sys.argv[1])))
