"""Row-wise Adagrad row by row in float64, the pair of optimizers, and DLRM's schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgewright.errors import UsageError
from edgewright.systems.dlrm.model import synthetic_ctr
from edgewright.systems.dlrm.optimizers import (
    ClickTraining,
    RowwiseAdagrad,
    dlrm_optimizer,
    dlrm_schedule,
    train_clicks,
)


def sparse_gradient(step: int) -> torch.Tensor:
    """[8, 3], not coalesced: row 2 comes twice, rows 0 and 6 never."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.tensor([[2, 5, 2, 1 + step % 3]])
    return torch.sparse_coo_tensor(rows, torch.randn(4, 3, generator=generator), (8, 3))


@pytest.mark.parametrize("dense", [False, True])
def test_it_equals_a_loop_over_rows(dense: bool) -> None:
    weight = nn.Parameter(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    start = weight.detach().clone()
    expected, total = start.double().numpy(), np.zeros(8)
    optimizer = RowwiseAdagrad([weight], lr=0.1)
    for step in range(5):
        weight.grad = sparse_gradient(step).to_dense() if dense else sparse_gradient(step)
        optimizer.step()
        gradient = sparse_gradient(step).to_dense().double().numpy()
        for row in range(8):
            if gradient[row].any():
                total[row] += np.mean(gradient[row] ** 2)
                expected[row] -= 0.1 * gradient[row] / (np.sqrt(total[row]) + 1e-10)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight[[0, 6]], start[[0, 6]])  # never touched: the same bits
    assert optimizer.state[weight]["sum"].shape == (8,)


def test_what_would_move_every_row_is_refused() -> None:
    table = [nn.Parameter(torch.zeros(4, 2))]
    with pytest.raises(UsageError, match="weight_decay=0.1.*moves every row"):
        RowwiseAdagrad(table, weight_decay=0.1)
    with pytest.raises(UsageError, match="momentum=0.9"):
        RowwiseAdagrad(table, momentum=0.9)
    with pytest.raises(UsageError, match=r"tables \[rows, width\], got \[4\]"):
        RowwiseAdagrad([nn.Parameter(torch.zeros(4))])


def test_the_schedule_is_the_published_one() -> None:
    scale = dlrm_schedule(warmup_steps=4, decay_start=10, decay_steps=10)
    assert [scale(step, 100) for step in (0, 3, 4, 9, 10, 15, 20, 99)] == [0.25, 1, 1, 1, 1, 0.25, 1e-7, 1e-7]
    with pytest.raises(UsageError, match="the decay starts after the warm-up"):
        dlrm_schedule(10, 5, 5)


def test_training_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, teacher = synthetic_ctr(600, (40, 30), most_ids=3)
    train, valid = data.split(0.8)
    settings = ClickTraining(epochs=2, batch=40, dense_lr=1e-2, sparse_lr=0.1, checkpoint_every=5)

    def student() -> nn.Module:
        return type(teacher)(teacher.config, seed=7)

    whole = student()
    first = train_clicks(whole, train, valid, settings, output=tmp_path / "whole")
    assert first.history[-1]["loss"] < first.history[0]["loss"]

    class Stop(RuntimeError):
        pass

    stopped, calls = student(), []
    step = RowwiseAdagrad.step

    def dies(self: RowwiseAdagrad, closure: None = None) -> None:
        calls.append(1)
        if len(calls) == 13:
            raise Stop
        step(self, closure)

    monkeypatch.setattr(RowwiseAdagrad, "step", dies)
    with pytest.raises(Stop):
        train_clicks(stopped, train, valid, settings, output=tmp_path / "parts")
    again = student()
    result = train_clicks(again, train, valid, settings, output=tmp_path / "parts")
    assert result.resumed_from == 10
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert (tmp_path / "whole" / "metrics.csv").read_bytes() == (tmp_path / "parts" / "metrics.csv").read_bytes()


def test_the_pair_keeps_its_groups_when_it_loads() -> None:
    model = synthetic_ctr(4, (5,))[1]
    pair = dlrm_optimizer(model)
    pair.load_state_dict(pair.state_dict())
    pair.param_groups[0]["lr"] = 7.0
    pair.param_groups[-1]["lr"] = 8.0
    assert pair.dense.param_groups[0]["lr"] == 7.0 and pair.sparse.param_groups[0]["lr"] == 8.0
