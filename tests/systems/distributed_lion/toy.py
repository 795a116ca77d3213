"""Distributed Lion in several processes: `python lion_toy.py FOLDER [PART...]` leaves tensors and texts there.

Processes are forked from one that has imported torch and never run a backward pass, which autograd would not survive.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from edgewright.errors import EdgewrightError
from edgewright.systems.distributed_lion.checkpoint import consolidated_state, load_replicas, save_replicas
from edgewright.systems.distributed_lion.distributed import (
    DistributedLion,
    LocalGradients,
    disable_gradient_allreduce,
    lion_groups,
    register_distributed_lion_hook,
)
from edgewright.systems.distributed_lion.lion import Lion
from edgewright.training import BlockBatches, TrainConfig, fit
from edgewright.training.checkpoint.files import LocalFiles
from edgewright.training.checkpoint.whole import SavedState
from tests.processes import fork
from tests.systems.distributed_lion.network import (
    CASES,
    DECAY,
    LR,
    STEPS,
    backward,
    gradient,
    model,
    parameters,
    refusal,
    rows,
)
from tests.systems.distributed_lion.refusals import refusals

# -- four processes ----------------------------------------------------------------------------------------------------


def four(rank: int, folder: Path) -> None:
    groups = {world: dist.new_group(list(range(world))) for world in (2, 3, 4)}
    found: dict[str, Tensor] = {}
    stats: dict[str, Any] = {}
    for world, aggregate, topology, zero, reply in CASES:
        if rank < world:
            named, case = parameters(), f"{world} {aggregate} {topology} {zero} {reply}"
            options = {"aggregate": aggregate, "topology": topology, "zero": zero, "reply": reply}
            # a bucket of 100 elements: several of them, and some parameters larger than one
            optimizer = DistributedLion(
                named, LR, weight_decay=DECAY, process_group=groups[world], bucket_mb=4e-4, **options
            )
            for step in range(STEPS):
                for name, parameter in named:
                    parameter.grad = gradient(name, step, rank)
                optimizer.step()
            for name, parameter in named:
                found[f"{case}/{name}"] = parameter.detach()
                found[f"{case}/{name}/momentum"] = optimizer.momentum(parameter)
            stats[case] = optimizer.comm_stats()
    save_file(found, folder / f"cases-{rank}.safetensors")
    (folder / f"stats-{rank}.json").write_text(json.dumps(stats))
    texts = {"one": refusals(rank, groups[4]), "parallel": parallel(rank), "checkpoint": checkpoints(rank, folder)}
    texts["traffic"] = traffic(groups)
    (folder / f"texts-{rank}.json").write_text(json.dumps(texts))


def parallel(rank: int) -> dict[str, Any]:
    """DDP in both forms against processes that train without it; buckets of DDP so small that they are rebuilt."""
    texts: dict[str, Any] = {}
    trained: dict[str, list[Tensor]] = {}
    for aggregate in ("mavo", "avg"):
        for form in ("bare", "local", "hook"):
            network = model()
            optimizer = DistributedLion(lion_groups(network, DECAY), LR, aggregate=aggregate, topology="two_phase")
            wrapped: nn.Module = network
            if form != "bare":
                wrapped = DDP(network, bucket_cap_mb=0.0005)
                if form == "local":
                    disable_gradient_allreduce(wrapped)
                else:
                    register_distributed_lion_hook(wrapped, optimizer)
            for step in range(STEPS):
                if step == 1 and form != "bare":
                    with wrapped.no_sync():  # two backward passes, one exchange
                        backward(wrapped, 50, rank)
                    data = rows(step, rank)
                    F.cross_entropy(wrapped(data[:, :3]), data[:, 3]).backward()
                elif step == 1:
                    backward(wrapped, 50, rank)
                    data = rows(step, rank)
                    F.cross_entropy(wrapped(data[:, :3]), data[:, 3]).backward()
                else:
                    backward(wrapped, step, rank)
                optimizer.step()
            optimizer.replica_checksum()
            momenta = [optimizer.momentum(p) for _, p in optimizer.members()]
            trained[form] = [p.detach() for p in network.parameters()] + momenta
        for form in ("local", "hook"):
            texts[f"{aggregate} {form}"] = all(map(torch.equal, trained["bare"], trained[form]))
    network = model()
    wrapped = DDP(network)
    backward(wrapped, 0, rank)
    texts["ddp without the hook"] = refusal(DistributedLion(network.named_parameters()).step)
    clipping = DistributedLion(network.named_parameters(), clip_local=1.0)
    texts["clip in the hook"] = refusal(lambda: register_distributed_lion_hook(wrapped, clipping))
    texts["no ddp"] = refusal(lambda: disable_gradient_allreduce(network))
    lacking = DistributedLion(list(network.parameters())[1:])
    texts["lacking"] = refusal(lambda: register_distributed_lion_hook(DDP(model()), lacking))

    network = model()
    optimizer = DistributedLion(lion_groups(network), LR)
    wrapped = DDP(network)
    register_distributed_lion_hook(wrapped, optimizer)
    before = [p.detach().clone() for p in network.parameters()]
    data = rows(0, rank)
    (F.cross_entropy(wrapped(data[:, :3]), data[:, 3]) * (torch.inf if rank == 1 else 1.0)).backward()
    optimizer.step()
    texts["infinite in the hook"] = [optimizer.skipped_steps, all(map(torch.equal, before, network.parameters()))]

    long = nn.Parameter(torch.zeros(50))
    optimizer = DistributedLion([long], 1e-3)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(300):
        long.grad = torch.randn(50, generator=generator)
        optimizer.step()
    texts["300 steps"] = optimizer.replica_checksum()
    return texts


def sharded(rank: int, folder: Path) -> None:
    """Weights split over 2 and copied 2 times against two processes that hold them whole; splits alone are refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    texts: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    network = model()
    fully_shard(network, mesh=mesh["shard"])
    group = mesh["replicate"].get_group()
    optimizer = DistributedLion(network.named_parameters(), LR, process_group=group, zero="ternary")
    for step in range(3):  # the two shards of a copy read different rows: their gradients are averaged
        backward(network, step, rank)
        optimizer.step()
    whole = [parameter.full_tensor() for parameter in network.parameters()]
    pair = model()
    both = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])[0]
    reference = DistributedLion(pair.named_parameters(), LR, process_group=both, zero="ternary")
    copy = rank // 2
    for step in range(3):
        halves = []
        for shard in range(2):
            backward(pair, step, 2 * copy + shard)
            halves.append([parameter.grad for parameter in pair.parameters()])
        for parameter, a, b in zip(pair.parameters(), *halves, strict=True):
            parameter.grad = (a + b) / 2
        reference.step()
    texts["same"] = all(map(torch.equal, whole, pair.parameters()))
    texts["moved"] = not any(map(torch.equal, whole, model().parameters()))
    texts["saving"] = refusal(lambda: save_replicas("nowhere", network, optimizer))
    split = model()
    fully_shard(split, mesh=init_device_mesh("cpu", (4,)))
    texts["fsdp"] = refusal(lambda: DistributedLion(split.named_parameters(), LR))
    (folder / f"sharded-{rank}.json").write_text(json.dumps(texts))


def checkpoints(rank: int, folder: Path) -> dict[str, Any]:
    texts: dict[str, Any] = {}
    whole = model()
    first = DistributedLion(lion_groups(whole, DECAY), LR)
    for step in range(STEPS):
        if step == 2:
            save_replicas(folder / "checkpoint", whole, first, {"seen": 2})
        backward(whole, step, rank)
        first.step()
    resumed = model(seed=5)
    second = DistributedLion(lion_groups(resumed, DECAY), LR)
    texts["extra"] = load_replicas(folder / "checkpoint", resumed, second)
    for step in range(2, STEPS):
        backward(resumed, step, rank)
        second.step()
    texts["resumed"] = all(map(torch.equal, whole.parameters(), resumed.parameters()))
    names = [save_replicas(folder / "again", whole, first, {"seen": seen}) for seen in (3, 4)]
    texts["again"] = [len(set(names)), load_replicas(folder / "again", resumed, second)["seen"]]
    state = consolidated_state(first)
    plain = Lion(whole.parameters(), LR)
    plain.load_state_dict({**state, "param_groups": Lion(model().parameters(), LR).state_dict()["param_groups"]})
    mean = first.momentum(whole[2].weight).clone()
    dist.all_reduce(mean)
    place = [id(p) for _, p in first.members()].index(id(whole[2].weight))
    texts["mean"] = torch.equal(mean / 4, state["state"][place]["exp_avg"])
    return texts


def traffic(groups: dict[int, Any]) -> dict[str, float]:
    """comm_stats of one step on 10 000 elements, all four processes."""
    parameter = nn.Parameter(torch.zeros(10_000))
    found = {}
    for aggregate in ("mavo", "avg"):
        for topology in ("two_phase", "all_gather"):
            for zero in ("alternate", "ternary"):
                options = {"aggregate": aggregate, "topology": topology, "zero": zero}
                optimizer = DistributedLion([parameter], process_group=groups[4], check_gradients=False, **options)
                parameter.grad = torch.ones_like(parameter)
                optimizer.step()
                stats = optimizer.comm_stats()
                key = f"{aggregate} {topology}" + (" ternary" if zero == "ternary" else "")
                found[key] = stats["sent_bytes"] - stats["pad_bytes"] - stats["control_bytes"]
    return found


def run_state(output: Path) -> dict[str, Any]:
    """What the processes share, and the names of what each has for itself."""
    saved = SavedState(LocalFiles(output / "checkpoints"))
    return {"shared": sorted(saved.state()), "own": sorted(saved.own(0)), "world": saved.manifest.world}


# -- two processes -----------------------------------------------------------------------------------------------------


def two(rank: int, folder: Path) -> None:
    """A checkpoint of four processes goes on in two; `fit` trains, saves and resumes."""
    texts: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    for strategy in ("exact", "mean", "reset"):
        network = model(seed=1)
        optimizer = DistributedLion(lion_groups(network, DECAY), LR)
        if strategy == "exact":
            texts[strategy] = refusal(lambda o=optimizer, n=network: load_replicas(folder / "checkpoint", n, o))
            continue
        load_replicas(folder / "checkpoint", network, optimizer, strategy)
        texts[f"{strategy} steps"] = optimizer.steps
        for number, (_, parameter) in enumerate(optimizer.members()):
            found[f"{strategy}/{number}"] = optimizer.momentum(parameter).clone()
        for step in range(3):
            backward(network, step, rank)
            optimizer.step()
        optimizer.replica_checksum()
    save_file(found, folder / f"elastic-{rank}.safetensors")

    def run(steps: int, output: str | None, stop: int = 0, sync: int = 0, accumulation: int = 1) -> list[Tensor]:
        network, calls = model(seed=rank), [0]

        def loss(module: nn.Module, batch: Tensor) -> Tensor:
            calls[0] += 1
            if calls[0] == stop:
                signal.raise_signal(signal.SIGINT)
            return F.cross_entropy(module(batch[:, :3]), batch[:, 3])

        optimizer = DistributedLion(lion_groups(network, DECAY), LR, momentum_sync_every=sync)
        data = torch.randint(0, 12, (30, 4), generator=torch.Generator().manual_seed(3))
        config = TrainConfig(steps, clip_norm=None, checkpoint_every=2, log_every=2, accumulation=accumulation)
        where = None if output is None else folder / output
        batches = BlockBatches(data, 3, seed=1)
        try:
            fit(network, LocalGradients(loss), batches, config, optimizer=optimizer, output=where, progress=False)
        except KeyboardInterrupt:
            texts["interrupted"] = optimizer.steps
        return [parameter.detach().clone() for parameter in network.parameters()]

    # stopped in a step that ends with shared momenta, in one that does not, and within an accumulated one
    for name, stop, options in (
        ("shared", 4, {"sync": 2}),
        ("own", 3, {"sync": 2}),
        ("within", 4, {"accumulation": 3}),
    ):
        whole = run(6, None, **options)
        run(6, name, stop=stop, **options)
        if name == "own":
            state = run_state(folder / name)
            texts["of its own"] = [state["world"], state["own"], "optimizer" in state["shared"]]
        texts[f"{name} resumes"] = all(map(torch.equal, whole, run(6, name, **options)))
    (folder / f"pair-{rank}.json").write_text(json.dumps(texts))


# -- a process that dies -----------------------------------------------------------------------------------------------


DEATHS = ("killed", "stopped", "hook")


def dying(how: str) -> Callable[[int, Path], None]:
    def process(rank: int, folder: Path) -> None:
        named = [(name, parameter) for name, parameter in parameters() if name != "absent"]
        form = "hook" if how == "hook" else "plain"
        network = model()
        if form == "hook":
            optimizer = DistributedLion(lion_groups(network), LR, timeout=1.0)
            wrapped = DDP(network)
            register_distributed_lion_hook(wrapped, optimizer)
        else:
            optimizer = DistributedLion(named, LR, timeout=1.0)
        for step in range(3):
            if rank == 2 and step == 2:
                os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
            began = time.monotonic()
            try:
                if form == "hook":
                    backward(wrapped, step, rank)
                else:
                    for name, parameter in named:
                        parameter.grad = gradient(name, step, rank)
                before = [p.detach().clone() for _, p in optimizer.members()]
                optimizer.step()
            except EdgewrightError as error:
                same = (
                    all(torch.equal(p, b) for (_, p), b in zip(optimizer.members(), before, strict=True))
                    if (form == "plain")
                    else True
                )
                seconds = time.monotonic() - began
                text = {"step": step, "seconds": seconds, "error": f"{type(error).__name__}: {error}", "same": same}
                (folder / f"{how}-{rank}.json").write_text(json.dumps(text))
                raise

    return process


# -- frame -------------------------------------------------------------------------------------------------------------


def launch(world: int, process: Callable[[int, Path], None], folder: Path) -> tuple[list[int], float]:
    """Exit codes of `world` processes and the seconds until the last one that was not stopped or killed was gone."""

    def member(rank: int) -> None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        process(rank, folder)
        dist.barrier()
        dist.destroy_process_group()

    children = fork(world, member, quiet=(EdgewrightError,))
    began, codes = time.monotonic(), {}
    while len(codes) < world:
        child, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            stopped = child
            codes[children.index(stopped)] = -signal.SIGSTOP
        elif children.index(child) not in codes:
            codes[children.index(child)] = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    for rank, code in codes.items():
        if code == -signal.SIGSTOP:
            os.kill(children[rank], signal.SIGKILL)
            os.waitpid(children[rank], 0)
    return [codes[rank] for rank in range(world)], seconds


def import_everything() -> None:
    """What the processes would each import, before they are forked."""
    import accelerate.utils  # noqa: F401
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp

    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    DistributedLion([parameter]).step()


def main(folder: Path, names: list[str]) -> None:
    runs = {"four": (4, four), "two": (2, two), "sharded": (4, sharded)} | {how: (3, dying(how)) for how in DEATHS}
    ends = {name: launch(*runs[name], folder) for name in names or runs}  # type: ignore[call-arg]
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    import_everything()
    main(Path(sys.argv[1]), sys.argv[2:])
