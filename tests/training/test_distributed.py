"""Split tensors between two processes over gloo: parts, placements and sums; run as a script, it is those processes."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from edgewright.errors import Unsupported
from edgewright.training import distributed
from edgewright.training.distributed import is_split, local, part_like, row_range, split, whole
from tests.processes import run_group, run_script

ROWS = torch.arange(10.0).view(5, 2)  # three rows for the first process, two for the second


def test_plain_tensors_are_whole() -> None:
    weight = nn.Parameter(ROWS.clone())
    assert not is_split(weight) and whole(weight) is weight and part_like(ROWS, weight) is ROWS
    assert local(weight, gradient=True) is weight and not local(weight).requires_grad
    assert local(weight).data_ptr() == weight.data_ptr()
    assert row_range(weight, "w") == distributed.RowRange(0, 5) and distributed.reducer(weight) is None
    distributed.check_rows(weight, "w")
    assert distributed.all_agree(False, [weight], torch.device("cpu")) is False
    distributed.add_up([weight], [None])


def test_two_processes() -> None:
    assert sorted(run_script(__file__).split()) == ["done-0", "done-1"]


def process(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    mesh = grid["ep"]
    mine = slice(0, 3) if rank == 0 else slice(3, 5)

    # only the first process's values count
    weight = nn.Parameter(split(ROWS if rank == 0 else torch.zeros(5, 2), mesh, 0))
    assert is_split(weight) and distributed.cuts(weight) == (0,) and torch.equal(whole(weight), ROWS)
    assert torch.equal(local(weight), ROWS[mine]) and not local(weight).requires_grad
    assert distributed.local_box(weight) == ((len(ROWS[mine]), 2), (mine.start, 0))
    local(weight, gradient=True).square().sum().backward()
    assert is_split(weight.grad) and torch.equal(local(weight.grad), 2 * ROWS[mine])
    with torch.no_grad():
        local(weight)[0, 0] += 0.5
        assert float(whole(weight)[mine.start, 0]) == float(ROWS[mine.start, 0]) + 0.5

    rows = row_range(weight, "w")
    assert (rows.start, rows.stop) == (mine.start, mine.stop)
    columns = split(ROWS, mesh, 1)
    for check in (row_range, distributed.check_rows):
        with pytest.raises(Unsupported, match="parameter w is placed as .*first dimension"):
            check(columns, "w")

    part = torch.full((len(ROWS[mine]), 3), float(rank))
    assert whole(part_like(part, weight)).tolist() == [[0.0] * 3] * 3 + [[1.0] * 3] * 2
    assert torch.equal(whole(part_like(part.t().contiguous(), weight, dim=1)), whole(part_like(part, weight)).t())
    assert torch.equal(whole(part_like(torch.ones(4), weight, dim=None)), torch.ones(4))
    assert torch.equal(whole(distributed.join_rows(part, mesh, 5)), whole(part_like(part, weight)))
    zeros = distributed.zeros_like_split((5, 2), torch.float64, weight, distributed.cuts(weight))
    assert distributed.cuts(zeros) == (0,) and zeros.dtype == torch.float64 and zeros.shape == (5, 2)

    reduce = distributed.reducer(weight)
    assert reduce is not None and distributed.reducer(part_like(torch.ones(4), weight, dim=None)) is None
    assert float(reduce(torch.tensor(rank + 1.0), "sum")) == 3 and float(reduce(torch.tensor(rank + 1.0), "max")) == 2
    numbers = [torch.tensor([rank + 1.0]), torch.full((2, 2), rank, dtype=torch.float64), torch.tensor([7.0])]
    distributed.add_up(numbers, [rows.group, rows.group, None])
    assert [float(number.flatten()[0]) for number in numbers] == [3, 1, 7]
    assert not distributed.all_agree(rank == 0, [weight], torch.device("cpu"))
    assert distributed.all_agree(True, [weight], torch.device("cpu"))

    model = nn.Module()
    model.split, model.plain, model.unused = weight, nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    model.plain.grad = torch.full((2,), rank + 1.0)
    distributed.sync_gradients(model, grid)
    assert torch.equal(local(weight.grad), ROWS[mine])  # gathered already: only divided
    assert model.plain.grad.tolist() == [1.5, 1.5] and model.unused.grad.tolist() == [0.0]
    os.write(1, f"done-{rank}\n".encode())  # in one piece: the processes share the pipe
    dist.destroy_process_group()


if __name__ == "__main__":
    run_group(2, process)
    sys.exit()
