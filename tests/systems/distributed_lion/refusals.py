"""What Distributed Lion refuses between processes, as texts: each a call that all of them make."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from edgewright.systems.distributed_lion.distributed import DistributedLion
from edgewright.systems.distributed_lion.lion import Lion
from tests.systems.distributed_lion.network import LR, STEPS, gradient, parameters, refusal


def refusals(rank: int, group: Any) -> dict[str, Any]:
    texts: dict[str, Any] = {}

    def fresh(**options: Any) -> tuple[list[tuple[str, nn.Parameter]], DistributedLion]:
        named = parameters()
        return named, DistributedLion(named, LR, process_group=group, **options)

    def give(named: list[tuple[str, nn.Parameter]], who: int) -> None:
        for name, parameter in named:
            parameter.grad = gradient(name, 0, who)

    named, optimizer = fresh()
    give(named, 0)
    texts["averaged"] = refusal(optimizer.step)

    same, optimizer = fresh(check_gradients=False, zero="ternary")
    alone = parameters()
    lion = Lion([parameter for _, parameter in alone], LR)
    for step in range(STEPS):
        for pairs in (same, alone):
            for name, parameter in pairs:
                parameter.grad = gradient(name, step, 0)
        optimizer.step()
        lion.step()
    texts["identical"] = all(torch.equal(a, b) for (_, a), (_, b) in zip(same, alone, strict=True))

    named, optimizer = fresh()
    if rank == 2:
        named[1][1].data[3, 4] += 1e-7
    give(named, rank)
    texts["different"] = refusal(optimizer.step)

    named, optimizer = fresh()
    before = [parameter.detach().clone() for _, parameter in named]
    give(named, rank)
    if rank == 3:
        named[1][1].grad[0, 0] = torch.inf
    optimizer.step()
    untouched = all(torch.equal(p, b) for (_, p), b in zip(named, before, strict=True))
    texts["infinite"] = [optimizer.skipped_steps, optimizer.steps, untouched]

    named, optimizer = fresh()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    give(named, rank)
    for _, parameter in named:
        if parameter.grad is not None:
            parameter.grad.mul_(4.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    plain, other = fresh()
    give(plain, rank)
    other.step()
    texts["scaled"] = all(torch.equal(a, b) for (_, a), (_, b) in zip(named, plain, strict=True))

    named, optimizer = fresh(momentum_sync_every=2)
    for step in range(2):
        give(named, rank)
        optimizer.step()
        holder = optimizer.state_dict()["param_groups"][0]["momentum_of"]
        texts[f"holder {step}"] = holder
    total = optimizer.momentum(named[1][1]).clone()
    dist.all_reduce(total, dist.ReduceOp.MAX, group=group)
    texts["synced"] = torch.equal(total, optimizer.momentum(named[1][1]))

    clipped, optimizer = fresh(clip_local=0.01)
    give(clipped, rank)
    optimizer.step()
    norm = torch.nn.utils.get_total_norm([p.grad for _, p in clipped if p.grad is not None])
    texts["clipped"] = float(norm)

    other_state = {**optimizer.state_dict()}
    other_state["param_groups"] = [{**g, "momentum_of": "process 1 of 7"} for g in other_state["param_groups"]]
    texts["other"] = refusal(lambda: optimizer.load_state_dict(other_state))
    return texts
