"""Tables shared out between two gloo processes: the same training as one process on the whole batch.

Run as a script, this file is the processes: `test_sharded.py FOLDER`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.systems.dlrm.clicks import JaggedBatch
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.dlrm.optimizers import RowwiseAdagrad
from edgewright.systems.dlrm.sharded import ShardedDLRM, local_rows, make_plan, mean_loss
from edgewright.training.checkpoint.files import LocalFiles
from edgewright.training.checkpoint.whole import SavedState
from tests.processes import run_group, run_script

STEPS = 20
BATCH = 9  # which two processes do not divide: five samples each, one of them padding
SIZES = (30, 11, 7, 40)
PLANS: dict[str, object] = {"table": "table", "row": "row", "auto": "auto", "mixed": {"0": 1, "3": "row"}}


def make_model(seed: int = 0, narrow: bool = True) -> DLRM:
    widths = (4, 4, 2, 4) if narrow else None
    return DLRM(DLRMConfig(3, SIZES, 4, (8, 4), (8, 1), table_dims=widths), seed)


def make_batch(step: int) -> tuple[Tensor, list[list[list[int]]], list[list[list[float]]], Tensor]:
    """Dense features, per sample and table the ids and their weights, labels."""
    generator = torch.Generator().manual_seed(step)
    ids, weights = [], []
    for _ in range(BATCH):
        lengths = torch.randint(0, 4, (len(SIZES),), generator=generator).tolist()
        ids.append(
            [torch.randint(0, n, (m,), generator=generator).tolist() for n, m in zip(SIZES, lengths, strict=True)]
        )
        weights.append([(torch.rand(m, generator=generator) + 0.5).tolist() for m in lengths])
    dense = torch.randn(BATCH, 3, generator=generator)
    return dense, ids, weights, torch.randint(0, 2, (BATCH,), generator=generator).float()


def part(step: int, rows: Tensor) -> tuple[Tensor, JaggedBatch, Tensor]:
    dense, ids, weights, labels = make_batch(step)
    values, offsets, given = [], [], []
    for k in range(len(SIZES)):
        values.append(torch.tensor([i for r in rows.tolist() for i in ids[r][k]], dtype=torch.int64))
        offsets.append(torch.tensor([0, *(len(ids[r][k]) for r in rows.tolist())]).cumsum(0))
        given.append(torch.tensor([w for r in rows.tolist() for w in weights[r][k]]))
    return dense[rows], JaggedBatch(values, offsets, given), labels[rows]


def train(model: DLRM | ShardedDLRM, rank: int, world: int) -> RowwiseAdagrad:
    rows, weights = local_rows(BATCH, rank, world)
    tables = RowwiseAdagrad(list(model.sparse_parameters()), lr=0.1) if list(model.sparse_parameters()) else None
    networks = torch.optim.SGD(list(model.dense_parameters()), lr=0.2)
    for step in range(STEPS):
        dense, bags, labels = part(step, rows)
        loss = mean_loss(model(dense, bags), labels, weights)
        for parameter in model.parameters():
            parameter.grad = None
        loss.backward()
        if isinstance(model, ShardedDLRM):
            model.sync_gradients()
        networks.step()
        tables.step()
    return tables


def _process(world: int, folder: Path, task: str, rank: int) -> None:
    dist.init_process_group("gloo")
    if task == "train":
        for name, plan in PLANS.items():
            sharded = ShardedDLRM(make_model(seed=rank), plan=plan)  # rank 0's weights count
            optimizer = train(sharded, rank, world)
            assert sharded.clock.flying >= sharded.clock.waiting > 0
            sharded.save(folder / name, optimizer)
            if rank == 0:
                (folder / f"{name}.txt").write_text(sharded.plan.text())
    else:  # another number of processes, another plan
        for name in PLANS:
            sharded = ShardedDLRM(make_model(seed=9), plan="row")
            optimizer = RowwiseAdagrad(list(sharded.sparse_parameters()), lr=0.1)
            sharded.load(folder / name, optimizer)
            state = {}
            for key, value in sharded.checkpoint_state(optimizer).items():
                state[key] = value.full_tensor() if hasattr(value, "full_tensor") else value
            if rank == 0:
                save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{name}-{world}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_script(__file__, folder, timeout=180)
    return folder


@pytest.fixture(scope="module")
def single() -> dict[str, Tensor]:
    """What one process makes of the whole batches."""
    model = make_model()
    optimizer = train(model, 0, 1)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for k, parameter in enumerate(model.sparse_parameters()):
        name = f"tables.{k}.{'table.' if k == 2 else ''}weight"
        state[f"adagrad.{name}"] = optimizer.state[parameter]["sum"]
    return state


@pytest.mark.parametrize("name", PLANS)
def test_two_processes_equal_one(folder: Path, single: dict[str, Tensor], name: str) -> None:
    start = make_model().state_dict()
    loaded = {key: torch.zeros_like(value) for key, value in single.items()}
    SavedState(LocalFiles(folder / name)).read(loaded)  # one process, whole tables
    for key, value in single.items():
        assert key.startswith("adagrad") or not torch.equal(value, start[key]), key
        # sums over samples in another order, twenty steps long
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", PLANS)
def test_three_processes_read_what_two_wrote(folder: Path, single: dict[str, Tensor], name: str) -> None:
    loaded = {key: torch.zeros_like(value) for key, value in single.items()}
    SavedState(LocalFiles(folder / name)).read(loaded)
    found = load_file(folder / f"{name}-3.safetensors")
    assert found.keys() == loaded.keys()
    assert all(torch.equal(found[key], loaded[key]) for key in loaded)


def test_the_plan_is_printed_with_bytes(folder: Path) -> None:
    assert (folder / "mixed.txt").read_text().splitlines()[1].startswith("rank 1: 0.00 MB  0, 3[20:40]")


def test_tables_are_spread_by_bytes() -> None:
    plan = make_plan((100, 90, 50, 40), (4,) * 4, 2)
    assert plan.bytes_per_rank() == [(100 + 40) * 16, (90 + 50) * 16]
    split = make_plan((1000, 9), (4, 4), 2)
    assert split.is_row_wise(0) and not split.is_row_wise(1) and split.of_rank(1)[0].first == 500


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="2 tables cannot keep 3 processes busy .* plan='row'"):
        make_plan((10, 10), (4, 4), 3, "table")
    with pytest.raises(UsageError, match="plan of table 'a'=7; it must be one of row, 0, 1"):
        make_plan((10, 10), (4, 4), 2, {"a": 7}, ("a", "b"))
    with pytest.raises(UsageError, match="table of the plan='c'; it must be one of a, b"):
        make_plan((10, 10), (4, 4), 2, {"c": 0}, ("a", "b"))
    with pytest.raises(UsageError, match="quotient and remainder"):
        make_plan((10, 10), (4, 4), 2, {"a": "row"}, ("a", "b"), frozenset({0}))
    with pytest.raises(UsageError, match="needs a process group"):
        ShardedDLRM(make_model())


def test_a_batch_that_does_not_divide_is_padded() -> None:
    parts = [local_rows(5, rank, 3) for rank in range(3)]
    assert [rows.tolist() for rows, _ in parts] == [[0, 1], [2, 3], [4, 4]]
    assert [weights.tolist() for _, weights in parts] == [[1, 1], [1, 1], [1, 0]]


if __name__ == "__main__":
    import torch.distributed.tensor  # once, before the processes are forked

    for world, task in ((2, "train"), (3, "load")):
        run_group(world, partial(_process, world, Path(sys.argv[1]), task))
