"""Small networks and gradients for the tests of APOLLO; run as a script, two gloo processes that share the weights."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from edgewright.errors import CheckFailed
from edgewright.systems.apollo import APOLLO, apollo_param_groups
from edgewright.training.loop import TrainConfig, fit
from tests.processes import run_group

SHARDED = {
    "smaller": {"rank": 4, "update_proj_gap": 3},
    "local": {"rank": 4, "side": "local", "scale": "auto"},
    "tensor": {"rank": 1, "scale_type": "tensor", "scale": 16.0},
}


def network(seed: int = 0) -> nn.Sequential:
    """A tall, a wide and a square matrix, with biases and a norm; rows that two processes cannot share evenly."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(12, 21), nn.Tanh(), nn.LayerNorm(21), nn.Linear(21, 16), nn.Tanh(), nn.Linear(16, 16)
        )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(32, 12, generator=generator)
    return x, torch.cat([x.sin(), x[:, :4] * x[:, 4:8]], 1)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step)
    return (model(x) - y).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> list[float]:
    losses = []
    for step in range(begin, end):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def apollo(model: nn.Module, **options) -> APOLLO:
    rank = options.pop("rank", 4)
    return APOLLO(apollo_param_groups(model, rank, r"weight$", **options), lr=1e-2)


def flat(model: nn.Module) -> torch.Tensor:
    """Every parameter, gathered whole where it is split."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return torch.cat([p.detach().flatten() for p in whole])


def _one_of_two(folder: Path, rank: int) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def split(seed: int) -> nn.Module:
        model = network(seed)
        for part in (model[0], model[3], model):
            fully_shard(part, mesh=mesh)
        return model

    for name, options in SHARDED.items():
        model = split(0)
        optimizer = apollo(model, **options)
        train(model, optimizer, 0, 6)
        again = split(0)
        with torch.no_grad():
            for p, q in zip(model.parameters(), again.parameters(), strict=True):
                q.to_local().copy_(p.to_local())
        saved = get_optimizer_state_dict(model, optimizer)
        dcp.save({"optimizer": saved}, checkpoint_id=str(folder / name))
        resumed = apollo(again, **options)
        target = {"optimizer": copy.deepcopy(get_optimizer_state_dict(again, resumed))}
        dcp.load(target, checkpoint_id=str(folder / name))
        set_optimizer_state_dict(again, resumed, target["optimizer"])
        for part, copied in ((model, optimizer), (again, resumed)):
            train(part, copied, 6, 12)
        whole = flat(model)
        assert torch.equal(whole, flat(again)), name
        if rank == 0:
            torch.save(whole, folder / f"{name}.pt")
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if rank == 1:
            model[3].weight.grad.to_local().fill_(float("nan"))  # one process alone: both must stop
        try:
            optimizer.step()
        except CheckFailed as error:
            assert "is not finite" in str(error)
        else:
            raise AssertionError("a gradient that is not finite went through")
        assert torch.equal(whole, flat(model))
    through_the_loop(folder, split)
    dist.destroy_process_group()


class Steps:
    """The batches of `batch`, from any step on."""

    def __init__(self) -> None:
        self.step = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.step += 1
        return self.step - 1

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def through_the_loop(folder: Path, split: Callable[[int], nn.Module]) -> None:
    """edgewright's loop writes the sketches of split weights, and goes on from them to the same bits."""
    settings = TrainConfig(12, 1e-2, warmup_steps=0, schedule="constant", checkpoint_every=5)
    for name, options in SHARDED.items():
        found = []
        for stops in ([None], [5, None]):
            for stop in stops:
                model, where = split(0), folder / f"loop-{name}-{len(stops)}"
                loss, optimizer = _Stopping(stop), apollo(model, **options)
                with contextlib.suppress(InterruptedError):
                    fit(model, loss, Steps(), settings, optimizer=optimizer, output=where, progress=False)
            found.append(flat(model))
        assert torch.equal(*found), name


class _Stopping:
    """The loss, which stops a run after so many updates: the processes have batches of their own."""

    def __init__(self, after: int | None) -> None:
        self.left = after

    def __call__(self, model: nn.Module, step: int) -> torch.Tensor:
        if self.left == 0:
            raise InterruptedError
        self.left = None if self.left is None else self.left - 1
        return loss_of(model, step)


if __name__ == "__main__":
    run_group(2, partial(_one_of_two, Path(sys.argv[1])))
