"""APOLLO against a NumPy transcription of the algorithm, AdamW and the authors' package; its invariants."""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import edgewright.systems.apollo.optimizer as module
from edgewright.errors import CheckFailed, MissingPackage, Unsupported, UsageError
from edgewright.io.hashing import mixed_seed
from edgewright.systems.apollo import APOLLO, APOLLOMini, apollo_param_groups
from edgewright.systems.apollo.peers import named_optimizer
from edgewright.systems.apollo.step import projection, sketch_of
from tests.systems.apollo import toys as toy
from tests.systems.apollo.toys import apollo, flat, network, train

SHAPES = [(6, 10), (10, 6), (7, 7), (5, 2, 3, 3)]


def weight_of(shape, dtype=torch.float64, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def gradient_of(shape, step, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + step), dtype=dtype) * (1 + step % 3)


def run(p, optimizer, steps, begin=0, change=lambda g: g):
    for step in range(begin, begin + steps):
        p.grad = change(gradient_of(p.shape, step, p.dtype))
        optimizer.step()
    return p.detach().clone()


def reference(weight, gradients, draw, *, lr, rank, alpha, kind, gamma, front, gap, betas, eps, wd):
    """Steps 1 to 8 of the algorithm in float64, with no regard to speed; `draw(window)` gives P."""
    w = weight.reshape(len(weight), -1).copy()
    rows = w.shape[0] >= w.shape[1]  # channels are rows, columns are contracted
    mean = square = 0.0
    last = None
    for t, gradient in enumerate(gradients, 1):
        g = gradient.reshape(w.shape)
        g = g.T if rows else g
        if (t - 1) % gap == 0:
            p = draw((t - 1) // gap)
        r = p @ g
        mean = betas[0] * mean + (1 - betas[0]) * r
        square = betas[1] * square + (1 - betas[1]) * r * r
        rt = mean / (np.sqrt(square) + eps)
        if kind == "channel":
            s = np.sqrt((rt**2).sum(0)) / (np.sqrt((r**2).sum(0)) + 1e-8)
        else:
            s = np.sqrt((rt**2).sum()) / (np.sqrt((r**2).sum()) + 1e-8)
        u = g * s
        if front:
            u = u * np.sqrt(alpha)
        if gamma is not None:
            if last is not None:
                u = u / (max(np.linalg.norm(u) / (last + 1e-8), gamma) / gamma)
            last = np.linalg.norm(u)
        if not front:
            u = u * np.sqrt(alpha)
        step = lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * u
        w = w - (step.T if rows else step)
        w = w - lr * wd * w
    return w.reshape(weight.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["channel", "tensor"])
@pytest.mark.parametrize(("front", "gamma", "wd"), [(False, 1.01, 0.1), (True, 1.01, 0.0), (False, None, 0.0)])
def test_equal_to_the_algorithm_in_numpy(shape, kind, front, gamma, wd):
    common = {"betas": (0.8, 0.95), "eps": 1e-6}
    p = weight_of(shape)
    start = p.detach().numpy().copy()
    options = {"scale_type": kind, "scale": 3.0, "scale_front": front, "norm_growth": gamma, "update_proj_gap": 4}
    optimizer = APOLLO([p], lr=0.05, rank=3, seed=5, weight_decay=wd, **options, **common)
    found = run(p, optimizer, 10).numpy()
    seed, sketch = mixed_seed(5, 0), sketch_of(shape, 3)
    expected = reference(
        start,
        [gradient_of(shape, step).numpy() for step in range(10)],
        lambda window: projection(seed, window, sketch).double().numpy(),
        lr=0.05, rank=3, alpha=3.0, kind=kind, gamma=gamma, front=front, gap=4, wd=wd, **common,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert optimizer.state[p]["exp_avg"].shape == sketch.shape


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
@pytest.mark.parametrize("kind", ["channel", "tensor"])
@pytest.mark.parametrize("front", [False, True])
def test_equal_to_the_authors_package(shape, kind, front, monkeypatch):
    peer = importlib.import_module("apollo_torch")
    theirs, mine = weight_of(shape, torch.float32), weight_of(shape, torch.float32)
    group = {"rank": 3, "proj": "random", "scale_type": kind, "scale": 2.0, "update_proj_gap": 4, "proj_type": "std"}
    other = peer.APOLLOAdamW([{"params": [theirs], **group}], lr=0.02, weight_decay=0.1, scale_front=front)
    options = {"scale_type": kind, "scale": 2.0, "scale_front": front, "update_proj_gap": 4, "weight_decay": 0.1}
    ours = APOLLO([mine], lr=0.02, rank=3, **options)

    def injected(*_):
        drawn = other.state[theirs]["projector"].ortho_matrix
        return drawn if drawn.shape[0] == 3 else drawn.t()

    monkeypatch.setattr(module, "projection", injected)
    for step in range(9):
        theirs.grad, mine.grad = (gradient_of(shape, step, torch.float32) for _ in range(2))
        other.step()
        ours.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_a_rank_it_is_adamw_bit_for_bit(foreach, maximize):
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1, "maximize": maximize}
    mine, theirs = network(), network()
    ours = APOLLO(mine.parameters(), foreach=foreach, **options)
    other = torch.optim.AdamW(theirs.parameters(), foreach=foreach, fused=True if foreach is None else None, **options)
    train(mine, ours, 0, 50)
    train(theirs, other, 0, 50)
    assert torch.equal(flat(mine), flat(theirs))


@pytest.mark.parametrize("options", [{}, {"scale_type": "tensor", "rank": 1}, {"update_proj_gap": 2, "scale": "auto"}])
def test_batched_equals_one_by_one(options):
    single, stacked = network(), network()
    for model, foreach in ((single, False), (stacked, True)):
        train(model, apollo(model, foreach=foreach, **options), 0, 20)
    # sums in another order
    torch.testing.assert_close(flat(single), flat(stacked), rtol=0, atol=1e-6)


def test_full_rank_and_orthogonal_it_is_adams_channel_factor(monkeypatch):
    shape = (6, 10)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    monkeypatch.setattr(module, "projection", lambda *_: rotation)
    p = weight_of(shape)
    start = p.detach().clone()
    after = run(p, APOLLO([p], lr=1.0, rank=6, eps=0.0, betas=(0.0, 0.0)), 1)
    gradient = gradient_of(shape, 0)
    factor = 6**0.5 / gradient.norm(dim=0)  # of sign(G) to G, column by column
    # 1e-8 stands beside the norm in the quotient
    torch.testing.assert_close(after, start - factor * gradient, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_the_first_update_does_not_see_the_gradients_scale(kind):
    moved = []
    for size in (1e-3, 1.0, 1e3):
        p = weight_of((8, 12))
        start = p.detach().clone()
        options = {"rank": 2, "scale_type": kind, "eps": 1e-12, "norm_growth": None}
        moved.append(run(p, APOLLO([p], **options), 1, change=lambda g, size=size: g * size) - start)
    for other in moved[::2]:  # 1e-8 beside the norms, 1e-12 beside the roots
        torch.testing.assert_close(other, moved[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("shape", "by_row"), [((6, 10), False), ((10, 6), True)])
def test_a_channel_moves_along_its_gradient(shape, by_row):
    p = weight_of(shape)
    optimizer = APOLLO([p], lr=1e-2, rank=2, norm_growth=None)
    for step in range(5):
        before = p.detach().clone()
        ratio = (before - run(p, optimizer, 1, step)) / gradient_of(shape, step)
        ratio = ratio if by_row else ratio.t()
        assert (ratio >= 0).all()
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-9, atol=0)


def test_an_update_grows_by_one_percent_at_most():
    p = weight_of((8, 12))
    optimizer = APOLLO([p], lr=1.0, rank=2)
    norms, cut = [], []
    for step in range(40):
        run(p, optimizer, 1, step, change=lambda g, step=step: g * (50.0 if step == 20 else 1.0))
        norms.append(float(optimizer.state[p]["last_norm"]))
        cut.append(optimizer.summary()["limited"])
    assert all(b <= 1.01 * a * (1 + 1e-5) for a, b in itertools.pairwise(norms))
    assert cut[0] == 0 and cut[20] == 1


def test_a_zero_gradient_does_not_lock_the_limiter():
    free, paused = weight_of((8, 12)), weight_of((8, 12))
    for p, pause in ((free, 1.0), (paused, 0.0)):
        optimizer = APOLLO([p], lr=1.0, rank=2)
        run(p, optimizer, 3)
        run(p, optimizer, 1, 3, change=lambda g, pause=pause: g * pause)
        before = p.detach().clone()
        run(p, optimizer, 1, 4)
        assert (p - before).norm() > 0.1 * optimizer.state[p]["last_norm"] > 0


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_a_transposed_weight_moves_transposed(kind):
    p, q = weight_of((6, 10)), nn.Parameter(weight_of((6, 10)).detach().t().clone())
    ours, copied = (APOLLO([w], lr=1e-2, rank=3, scale_type=kind) for w in (p, q))
    for step in range(6):
        p.grad = gradient_of((6, 10), step)
        q.grad = p.grad.t().clone()
        ours.step()
        copied.step()
    torch.testing.assert_close(q.t(), p, rtol=1e-12, atol=0)


def test_automatic_scale_gives_the_learning_rate_of_adamw():
    """A sketch of r rows sees sqrt(r / m) of Adam's factor; alpha = m / r makes up for it (paper, figure 4)."""
    p = weight_of((64, 256))
    gradient = gradient_of(p.shape, 0)
    expected = 8.0 / gradient.norm(dim=0)  # sqrt(m) / column: Adam's channel factor at the first step
    optimizer = APOLLO([p], lr=1.0, rank=16, scale="auto", norm_growth=None, eps=1e-12)
    start = p.detach().clone()
    found = ((start - run(p, optimizer, 1)) / gradient)[0]
    assert abs(float((found / expected).mean()) - 1) < 0.05  # chi of 16 degrees of freedom: 1.05 in the mean


def test_mini_is_apollo_at_rank_one():
    p, q = weight_of((8, 12)), weight_of((8, 12))
    run(p, APOLLOMini([p], lr=1e-2), 5)
    run(q, APOLLO([q], lr=1e-2, rank=1, scale_type="tensor", scale=128.0), 5)
    assert torch.equal(p, q)


def test_it_draws_from_no_global_generator_and_repeats():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        before = torch.get_rng_state()
        model = network()
        train(model, apollo(model, seed=seed), 0, 5)
        assert torch.equal(before, torch.get_rng_state())
        results.append(flat(model))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_kept_projections_change_no_bit():
    models = [network() for _ in range(2)]
    for model, keep in zip(models, (False, True), strict=True):
        train(model, apollo(model, cache_projection=keep, update_proj_gap=3), 0, 8)
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_svd_projects_on_the_gradients_own_directions():
    p = weight_of((6, 10))
    optimizer = APOLLO([p], rank=2, proj="svd", update_proj_gap=4)
    run(p, optimizer, 6)
    expected = torch.linalg.svd(gradient_of((6, 10), 4)).U[:, :2].t()
    torch.testing.assert_close(optimizer.state[p]["projection"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_have_float32_state(dtype):
    """One step from the same point: the result is the float32 one, rounded."""
    p, q = weight_of((8, 12), dtype), nn.Parameter(weight_of((8, 12), dtype).detach().float())
    ours, exact = (APOLLO([{"params": [w]}], lr=1e-2, rank=2) for w in (p, q))
    p.grad = gradient_of(p.shape, 0, torch.float32).to(dtype)
    q.grad = p.grad.float()
    ours.step()
    exact.step()
    assert ours.state[p]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(p, q.to(dtype), rtol=1e-2, atol=0)


# -- the contract of torch's optimizers --------------------------------------------------------------------------------


def test_closure_scheduler_tensor_rate_and_new_groups():
    rates = (1e-2, torch.tensor(1e-2))
    results = []
    for rate in rates:
        model = network()
        groups = apollo_param_groups(model, 4, r"weight$")
        optimizer = APOLLO(groups[:1], lr=rate)
        optimizer.add_param_group(groups[1])
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        seen = []
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append(1))

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = toy.loss_of(model, 0)
            loss.backward()
            return loss

        losses = []
        for _ in range(4):
            losses.append(float(optimizer.step(closure).detach()))
            schedule.step()
        assert len(seen) == 4 and losses[-1] < losses[0]
        results.append(flat(model))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_the_gradient_scaler_leaves_an_overflow_out():
    model = network()
    optimizer = apollo(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = flat(model)
    scaler.scale(toy.loss_of(model, 0)).backward()
    model[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model), before) and not optimizer.state
    optimizer.zero_grad()
    scaler.scale(toy.loss_of(model, 0)).backward()
    scaler.step(optimizer)
    assert not torch.equal(flat(model), before)


def test_groups_by_name_pattern_and_function(tiny_llama):
    groups = apollo_param_groups(tiny_llama, 8)
    assert [group["rank"] for group in groups] == [8, None, None]
    assert len(groups[0]["params"]) == 14 and all("_proj" in name for name, _ in groups[0]["params"])
    everything = apollo_param_groups(tiny_llama, 8, include_embeddings=True)
    assert len(everything[0]["params"]) == 15
    pattern = apollo_param_groups(tiny_llama, 8, r"\.(q|k)_proj\.weight$", weight_decay=0.1, scale="auto")
    assert len(pattern[0]["params"]) == 4 and pattern[0]["scale"] == "auto" and pattern[0]["weight_decay"] == 0.1
    assert pattern[-1]["weight_decay"] == 0 and all(p.ndim == 1 for _, p in pattern[-1]["params"])
    wide = apollo_param_groups(tiny_llama, 8, lambda name, p: p.shape[0] > p.shape[1])
    assert all(p.shape[0] > p.shape[1] for _, p in wide[0]["params"])
    total = sum(p.numel() for group in pattern for _, p in group["params"])
    assert total == sum(p.numel() for p in tiny_llama.parameters())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank=0; it must be a whole number from 1 up, or None"),
        ({"rank": -3}, "rank=-3"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"lr": -1.0}, "lr=-1.0; it must be a number at least 0"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\); it must be two numbers in \[0, 1\)"),
        ({"betas": 0.9}, "betas=0.9"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"scale": 0}, "scale=0; it must be a number above 0; or 'auto'"),
        ({"scale_type": "row"}, "scale_type='row'; it must be one of channel, tensor"),
        ({"norm_growth": 0.9}, "norm_growth=0.9; it must be a number at least 1"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"proj": "hadamard"}, "proj='hadamard'"),
        ({"nan_policy": "pray"}, "nan_policy='pray'"),
        ({"state_dtype": torch.int16}, "state_dtype='int16'; it must be one of float32, bfloat16"),
        ({"seed": -1}, "seed=-1"),
        ({"fused": True}, "fused=True: APOLLO has no fused kernel"),
        ({"foreach": True, "lr": torch.tensor(0.1)}, "foreach=True with a tensor as lr"),
    ],
)
def test_options_that_cannot_work(options, text):
    with pytest.raises(UsageError, match=text):
        APOLLO([weight_of((4, 6))], **options)


def test_a_rank_beyond_the_smaller_side_is_clamped_with_a_warning():
    p, q = weight_of((4, 6)), weight_of((4, 6))
    with pytest.warns(UserWarning, match=r"rank=9 is more than the smaller side of 1 parameters.*\[4, 6\]"):
        optimizer = APOLLO([p], rank=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = APOLLO([q], rank=4)
    assert torch.equal(run(p, optimizer, 3), run(q, copied, 3))


def test_complex_integer_and_sparse_parameters_are_named():
    with pytest.raises(Unsupported, match="parameter phase is complex"):
        APOLLO([("phase", nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64)))])
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = APOLLO(table.named_parameters(), rank=2)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="the gradient of parameter weight is sparse"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["3.weight", "0.bias"])
def test_a_gradient_that_is_not_finite_changes_nothing(value, where):
    model = network()
    optimizer = apollo(model)
    train(model, optimizer, 0, 2)
    weights, state = flat(model), copy.deepcopy(optimizer.state_dict()["state"])
    for policy in ("raise", "skip"):
        for group in optimizer.param_groups:
            group["nan_policy"] = policy
        toy.loss_of(model, 2).backward()
        model.get_parameter(where).grad.view(-1)[0] = value
        if policy == "raise":
            with pytest.raises(CheckFailed, match=f"gradient of parameter {where} is not finite; nothing was updated"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(flat(model), weights)
        now = optimizer.state_dict()["state"]
        assert all(torch.equal(now[i][k], v) for i, entry in state.items() for k, v in entry.items())


def test_groups_that_name_nothing():
    with pytest.raises(UsageError, match=r"target='nothing' finds no trainable matrix of the model; it has 0.weight"):
        apollo_param_groups(network(), 4, "nothing")
    with pytest.raises(UsageError, match="is no regular expression"):
        apollo_param_groups(network(), 4, "(")


def test_optimizers_by_name(tiny_llama, monkeypatch):
    for method in (
        "AdamW",
        "Adafactor",
        "Muon",
        "SGD with momentum",
        "APOLLO without limiter",
        "APOLLO rank 1 by channel",
    ):
        model = copy.deepcopy(tiny_llama)
        optimizer = named_optimizer(method, model, 1e-3, 8)
        before = flat(model)
        model(input_ids=torch.arange(32).view(2, 16), labels=torch.arange(32).view(2, 16)).loss.backward()
        optimizer.step()
        assert not torch.equal(flat(model), before) and len(optimizer.state) == len(list(model.parameters())), method
    with pytest.raises(UsageError, match="no optimizer is called 'Adam'"):
        named_optimizer("Adam", tiny_llama, 1e-3, 8)
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    with pytest.raises(MissingPackage, match="pip install galore-torch bitsandbytes"):
        named_optimizer("GaLore", tiny_llama, 1e-3, 8)
