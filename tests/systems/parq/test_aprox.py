"""The convex theory: closed form against brute force, convergence of AProx, and what Prox-SGD lacks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from edgewright.errors import UsageError
from edgewright.systems.parq.proximal import AProx, par_penalty, prox_par

Q, A = (0.0, 1.0, 2.0), (0.5, 1.5)
POINTS = torch.tensor([0.3, 1, 1.7, 3, 3.4, 4, -2.7])
ANSWERS = torch.tensor([0, 0.5, 1, 1.5, 1.9, 2, -1.2])


class ProxSGD(torch.optim.SGD):
    """w <- prox of lr * Psi at w - lr * gradient: its plateaus shrink with the learning rate."""

    def __init__(self, params, lr, q, a):
        super().__init__(params, lr)
        self.q, self.a = q, a

    @torch.no_grad()
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(prox_par(p, self.q, self.a, group["lr"]))


def test_vectors_of_the_specification():
    torch.testing.assert_close(prox_par(POINTS, Q, A), ANSWERS)


@pytest.mark.parametrize(("q", "a"), [(Q, A), ((0, 0.4, 0.9, 1.1), (0, 0.3, 2)), ((0, 1), (0.7,))])
@pytest.mark.parametrize("t", [0.3, 1.0, 2.5])
def test_closed_form_is_the_minimum_on_a_fine_grid(q, a, t):
    points = torch.linspace(-5, 5, 101, dtype=torch.float64)
    grid = torch.linspace(-q[-1], q[-1], 20001, dtype=torch.float64)
    cost = t * par_penalty(grid, q, a) + (grid - points.unsqueeze(1)).square() / 2
    best = grid[cost.argmin(1)]
    torch.testing.assert_close(prox_par(points, q, a, t), best, rtol=0, atol=q[-1] * 1e-4)  # the grid's own step


def test_penalty_is_the_maximum_of_its_affine_pieces():
    w = torch.linspace(-2, 2, 81, dtype=torch.float64)
    offsets = [0.0]
    for k in range(1, 3):
        offsets.append(offsets[-1] + A[k - 1] * (Q[k] - Q[k - 1]))
    pieces = torch.stack([A[k] * (w.abs() - Q[k]) + offsets[k] for k in range(2)])
    torch.testing.assert_close(par_penalty(w, Q, A), pieces.amax(0))
    assert par_penalty(torch.tensor([2.1]), Q, A).isinf().all()


def test_without_the_first_slope_zero_is_no_target():
    assert prox_par(torch.tensor([0.01, -0.01]), (0, 1), (0,)).tolist() == pytest.approx([0.01, -0.01])


def iterate(kind, steps: int) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    weights = nn.Parameter(torch.zeros(len(POINTS), dtype=torch.float64))
    optimizer = kind([weights], 0.5, Q, A)
    for t in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 0.5 / math.sqrt(t)
        weights.grad = (weights - POINTS.double()).detach()
        optimizer.step()
    return weights.detach(), optimizer


@pytest.mark.parametrize(("kind", "steps"), [(AProx, 20000), (ProxSGD, 2000)])
def test_the_last_iterate_is_the_solution(kind, steps):
    found, _ = iterate(kind, steps)
    assert (found - ANSWERS.double()).abs().max() < 1e-3


def test_plateaus_widen_under_aprox_and_shrink_under_prox_sgd():
    _, optimizer = iterate(AProx, 100)
    wide = optimizer.param_groups[0]["total_lr"] * (A[1] - A[0])
    assert wide > 5 > 0.5 / math.sqrt(100) * (A[1] - A[0])
    noise = torch.Generator().manual_seed(0)
    on_target = {}
    for kind in (AProx, ProxSGD):  # noisy gradients: only wide plateaus hold a weight
        weights = nn.Parameter(torch.zeros(200))
        goal = 1.7 + 0.6 * torch.rand(200, generator=noise)  # the solution is 1 for all of them
        optimizer = kind([weights], 0.02, Q, A)
        for _ in range(300):
            weights.grad = (weights - goal).detach() + 4 * torch.randn(200, generator=noise)
            optimizer.step()
        on_target[kind] = float(torch.isin(weights.detach(), torch.tensor(Q)).float().mean())
    assert on_target[AProx] > 0.9 > 0.3 > on_target[ProxSGD]


def test_saved_and_resumed_is_uninterrupted():
    whole, _ = iterate(AProx, 20)
    weights = nn.Parameter(torch.zeros(len(POINTS), dtype=torch.float64))
    optimizer = AProx([weights], 0.5, Q, A)
    for t in range(1, 21):
        if t == 11:
            state = optimizer.state_dict()
            weights = nn.Parameter(weights.detach().clone())
            optimizer = AProx([weights], 0.5, Q, A)
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 0.5 / math.sqrt(t)
        weights.grad = (weights - POINTS.double()).detach()
        optimizer.step()
    assert torch.equal(weights.detach(), whole)


@pytest.mark.parametrize(
    ("q", "a"), [((0,), ()), ((1, 2), (0.5,)), ((0, 2, 1), (0.5, 1)), ((0, 1, 2), (1, 0.5)), ((0, 1), (-1,)), (Q, (1,))]
)
def test_what_is_no_convex_penalty_is_refused(q, a):
    with pytest.raises(UsageError, match="are no penalty"):
        prox_par(POINTS, q, a)


def test_bad_rates_are_refused():
    with pytest.raises(UsageError, match="lr=0"):
        AProx([nn.Parameter(torch.zeros(1))], 0, Q, A)
    assert AProx([nn.Parameter(torch.zeros(1))], 0.1, Q, A).step(lambda: 3.0) == 3.0
