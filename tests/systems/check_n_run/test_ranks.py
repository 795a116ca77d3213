"""Several gloo processes, one checkpoint: any number of them restores it, and one that dies takes nothing along.

Run as a script, this file is the processes: `test_ranks.py FOLDER`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgewright.errors import OutputError, UsageError
from edgewright.systems.check_n_run import CheckpointConfig, DiffCheckpointer, RowShard, restore
from edgewright.systems.dlrm.optimizers import RowwiseAdagrad
from tests.processes import fork, run_script

ROWS, DIM = 23, 4  # rows that neither two nor three processes divide
STEPS = 6


class Part(nn.Module):
    """This process's rows of a table, and a layer that is the same everywhere."""

    def __init__(self, rank: int, world: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randn(ROWS, DIM, generator=generator)
        self.first = rank * -(-ROWS // world)
        self.rows = nn.Parameter(whole[self.first : self.first + -(-ROWS // world)].clone())
        self.top = nn.Linear(DIM, 1)
        with torch.no_grad():
            self.top.weight.normal_(generator=generator)
            self.top.bias.zero_()

    @property
    def shard(self) -> RowShard:
        return RowShard(self.rows, "table", self.first, ROWS)


def make(rank: int, world: int, seed: int = 0) -> tuple[Part, list[torch.optim.Optimizer]]:
    model = Part(rank, world, seed)
    return model, [RowwiseAdagrad([model.rows], lr=0.3), torch.optim.Adam(model.top.parameters(), lr=0.1)]


def train(model: Part, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """One update whose result does not depend on how many processes there are."""
    ids = torch.randint(0, ROWS, (5,), generator=torch.Generator().manual_seed(step)).unique()
    mine = ids[(ids >= model.first) & (ids < model.first + len(model.rows))] - model.first
    values = (model.rows.detach()[mine] * 0.1 + step).sin()
    model.rows.grad = torch.sparse_coo_tensor(mine.unsqueeze(0), values, model.rows.shape, check_invariants=True)
    for parameter in model.top.parameters():
        parameter.grad = torch.full_like(parameter, 0.1 * step)
    for optimizer in optimizers:
        optimizer.step()


def whole(model: Part, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    adam = optimizers[1].state[model.top.weight]
    return {"rows": model.rows.detach(), "sum": optimizers[0].state[model.rows]["sum"],
            "weight": model.top.weight.detach(), "exp_avg": adam["exp_avg"], "step": adam["step"]}  # fmt: skip


def expected(steps: int) -> dict[str, Tensor]:
    """The same training in one process."""
    model, optimizers = make(0, 1)
    for step in range(1, steps + 1):
        train(model, optimizers, step)
    return whole(model, optimizers)


def check(model: Part, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    wanted, part = expected(steps), slice(model.first, model.first + len(model.rows))
    for name, value in whole(model, optimizers).items():
        assert torch.equal(value, wanted[name][part] if name in ("rows", "sum") else wanted[name]), name


def config(policy: str = "consecutive") -> CheckpointConfig:
    return CheckpointConfig(policy=policy, bits="none", every_steps=2, keep=9, timeout_seconds=20)  # type: ignore[arg-type]


def process(world: int, folder: Path, task: str, rank: int) -> None:
    dist.init_process_group("gloo")
    model, optimizers = make(rank, world, seed=0 if task in ("save", "die", "full disk") else 5)
    if task in ("save", "die", "full disk"):
        checkpointer = DiffCheckpointer(folder, model, optimizers, config=config(), shards=[model.shard])
        began = time.monotonic()
        try:
            for step in range(1, STEPS + 1):
                if task == "die" and step == 5:
                    checkpointer.wait()
                if task == "die" and step == 5 and rank == world - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                if task == "full disk" and step == 5 and rank == 1:
                    checkpointer.files = _Full(folder)
                train(model, optimizers, step)
                checkpointer.step()
            checkpointer.close()
            assert [one.kind for one in checkpointer.history] == ["full", "diff", "diff"]
            assert task == "save"
        except OutputError as error:
            assert task != "save" and time.monotonic() - began < 60
            (folder / f"said-{rank}.txt").write_text(str(error))
    else:
        info = restore(folder, model, optimizers, shards=[model.shard], timeout=20)
        check(model, optimizers, info.step)
        assert info.random == (world == 2)
        again = DiffCheckpointer(folder / "on", model, optimizers, config=config("full"), shards=[model.shard])
        again.save(now=True)  # and these processes save as well
        again.close()
        with pytest.raises(UsageError, match="is another|rows is|of another model"):
            restore(folder, model, optimizers, timeout=20)  # without saying which rows these are
    if task != "die":
        dist.destroy_process_group()


class _Full:
    """A disk that is full for one process."""

    renames = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def mkdir(self, path: str) -> None:
        raise OSError(28, "No space left on device")

    def names(self, path: str) -> list[str]:
        return []


def dlrm(world: int, folder: Path, task: str, rank: int) -> None:
    """A DLRM whose tables are split by whole tables when it saves, by rows when one process more restores."""
    from edgewright.systems.dlrm.clicks import jagged
    from edgewright.systems.dlrm.model import DLRM, DLRMConfig
    from edgewright.systems.dlrm.sharded import ShardedDLRM, mean_loss, row_shards

    dist.init_process_group("gloo")
    saving = task == "dlrm"
    config = DLRMConfig(3, (30, 11, 7), 4, (8, 4), (8, 1), qr_threshold=25)
    model = ShardedDLRM(DLRM(config, seed=0 if saving else 3), plan="table" if saving else "row")
    rows = list(model.sparse_parameters())
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(list(model.dense_parameters()), lr=0.05)]
    optimizers += [RowwiseAdagrad(rows, lr=0.1)] if rows else []
    shards = row_shards(model)

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        ids = torch.stack([torch.randint(0, n, (6,), generator=generator) for n in config.table_sizes], 1)
        dense, labels = torch.randn(6, 3, generator=generator), torch.ones(6)
        mine = slice(6 * rank // world, 6 * (rank + 1) // world)
        for parameter in model.parameters():
            parameter.grad = None
        loss = mean_loss(model(dense[mine], jagged(ids[mine].int(), (1, 1, 1))), labels[mine])
        loss.backward()
        model.sync_gradients()
        for optimizer in optimizers:
            optimizer.step()

    if saving:
        settings = CheckpointConfig(policy="one-shot", bits="none", every_steps=3, timeout_seconds=20)
        with DiffCheckpointer(folder, model, optimizers, config=settings, shards=shards) as checkpointer:
            for number in range(6):
                step(number)
                checkpointer.step()
        assert [one.kind for one in checkpointer.history] == ["full", "diff"]
        dcp_folder = folder / "dcp"
        model.save(dcp_folder)
    else:
        assert restore(folder, model, optimizers, shards=shards, timeout=20).step == 6
        ours = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load(folder / "dcp")  # what torch.distributed.checkpoint has of the same state
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, ours[name]), name
        step(6)
    dist.destroy_process_group()


TASKS = {"save": ("saved", 2), "restore": ("saved", 2), "restore by three": ("saved", 3), "die": ("died", 2),
         "full disk": ("full", 2), "dlrm": ("dlrm", 2), "dlrm by three": ("dlrm", 3)}  # fmt: skip


def main(folder: Path) -> None:
    """Every task with its processes, one after the other; what failed goes to failed.txt."""
    failed = []
    for task, (name, world) in TASKS.items():
        (folder / name).mkdir(exist_ok=True)
        part = partial(dlrm if name == "dlrm" else process, world, folder / name, task)
        children = fork(world, part)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if codes != [-signal.SIGKILL if task == "die" and rank == world - 1 else 0 for rank in range(world)]:
            failed.append(task)
    (folder / "failed.txt").write_text("\n".join(failed))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(folder, tasks that failed)."""
    folder = tmp_path_factory.mktemp("ranks")
    run_script(__file__, folder, timeout=300)
    return folder, (folder / "failed.txt").read_text().split("\n")


@pytest.mark.parametrize("task", list(TASKS))
def test_the_processes_end_as_they_should(done: tuple[Path, list[str]], task: str) -> None:
    assert task not in done[1]


def test_two_processes_save_and_one_restores(done: tuple[Path, list[str]]) -> None:
    model, optimizers = make(0, 1, seed=5)
    info = restore(done[0] / "saved", model, optimizers, shards=[model.shard])
    assert info.step == STEPS and len(info.chain) == 3 and not info.random
    check(model, optimizers, STEPS)
    folder = done[0] / "saved" / info.id
    assert {path.name[:6] for path in folder.glob("*.safetensors")} == {"r00000", "r00001"}


@pytest.mark.parametrize(("name", "said"), [("died", "lost another one"), ("full", "No space left")])
def test_who_fails_takes_no_checkpoint_along(done: tuple[Path, list[str]], name: str, said: str) -> None:
    folder = done[0] / name
    assert said in (folder / "said-0.txt").read_text()
    assert name == "died" or (said in (folder / "said-1.txt").read_text() and not list(folder.glob("tmp-*")))
    model, optimizers = make(0, 1, seed=5)
    assert restore(folder, model, optimizers, shards=[model.shard]).step == 4
    check(model, optimizers, 4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
