"""Longhorn's recurrence: the minimum it claims to be, its forms against each other, its gradient, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.systems.longhorn import scan as scans
from edgewright.systems.longhorn.scan import MODES, longhorn_scan, longhorn_step, step_size


def draw(
    batch: int, tokens: int, d: int = 5, m: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """x, k, q, beta, D, S0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    beta = torch.rand(batch, tokens, d, generator=g, dtype=torch.float64).to(dtype)
    x, k, q = normal(batch, tokens, d), normal(batch, tokens, m), normal(batch, tokens, m)
    return [x, k, q, beta, normal(d), normal(batch, d, m)]


def written_out(
    x: Tensor, k: Tensor, q: Tensor, beta: Tensor, D: Tensor, S: Tensor, mode: str, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence number by number, from the paper's formulas."""
    (B, T, d), m = x.shape, k.shape[-1]
    y, S = torch.zeros_like(x), S.clone()
    for b in range(B):
        for t in range(T):
            if reset is not None and reset[b, t]:
                S[b] = 0
            for i in range(d):
                key = k[b, t]
                delta = beta[b, t, i] / (1 + beta[b, t, i] * (key @ key))
                row = S[b, i].clone()
                for n in range(m):
                    recalled = row @ key if mode == "exact" else row[n] * key[n]
                    S[b, i, n] = row[n] - delta * recalled * key[n] + delta * x[b, t, i] * key[n]
                y[b, t, i] = S[b, i] @ q[b, t] + D[i] * x[b, t, i]
    return y, S


def test_exact_mode_is_the_minimum_of_its_objective() -> None:
    x, k, q, beta, D, S0 = draw(1, 1, d=4, m=6)
    _, S = longhorn_scan(x, k, q, beta, D, S0, "exact")
    guess = torch.zeros_like(S0[0]).requires_grad_()
    search = torch.optim.LBFGS(
        [guess], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        search.zero_grad()
        loss = (guess - S0[0]).square().sum() + (beta[0, 0] * (guess @ k[0, 0] - x[0, 0]).square()).sum()
        loss.backward()
        return loss

    search.step(objective)
    torch.testing.assert_close(S[0], guess.detach(), rtol=0, atol=1e-8)  # as far as the search comes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_it_is_the_formula(mode: str, tokens: int) -> None:
    inputs = draw(2, tokens)
    reset = torch.rand(2, tokens, generator=torch.Generator().manual_seed(1)) < 0.3
    for cleared in (None, reset):
        expected = written_out(*inputs, mode, cleared)  # type: ignore[call-arg]
        found = longhorn_scan(*inputs, mode, 3, reset=cleared)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_the_scan(mode: str, dtype: torch.dtype) -> None:
    x, k, q, beta, D, S = draw(2, 19, dtype=dtype)
    expected, last = longhorn_scan(x, k, q, beta, D, S, mode, 8)
    kept = S.clone()
    outputs, state = [], S
    for t in range(19):
        y, state = longhorn_step(x[:, t], k[:, t], q[:, t], beta[:, t], D, state, mode)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), expected)
    torch.testing.assert_close(state, last)
    assert torch.equal(S, kept)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 37, 64])
def test_any_chunk_gives_the_same(mode: str, chunk: int) -> None:
    inputs = draw(2, 37, dtype=torch.float32)
    expected = longhorn_scan(*inputs, mode, 37)
    assert all(torch.equal(a, b) for a, b in zip(longhorn_scan(*inputs, mode, chunk), expected, strict=True))  # type: ignore[arg-type]


def test_a_budget_makes_chunks_smaller() -> None:
    inputs = draw(2, 37, dtype=torch.float32)
    small = longhorn_scan(*inputs, scan_budget=2 * 5 * 3 * 4 * 2)
    assert torch.equal(small[0], longhorn_scan(*inputs)[0])


@pytest.mark.parametrize("mode", MODES)
def test_the_state_carries(mode: str) -> None:
    x, k, q, beta, D, S = draw(2, 23)
    expected, last = longhorn_scan(x, k, q, beta, D, S, mode)
    first, middle = longhorn_scan(x[:, :9], k[:, :9], q[:, :9], beta[:, :9], D, S, mode)
    second, end = longhorn_scan(x[:, 9:], k[:, 9:], q[:, 9:], beta[:, 9:], D, middle, mode)
    assert torch.equal(torch.cat([first, second], 1), expected) and torch.equal(end, last)  # type: ignore[arg-type]


def test_doubling_is_the_loop_over_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 3, 31, 64):
        a, u = torch.rand(tokens, 2, 3, 4, generator=g), torch.randn(tokens, 2, 3, 4, generator=g)
        a[tokens // 2, 0] = 0  # a reset
        S = torch.randn(2, 3, 4, generator=g)
        torch.testing.assert_close(scans.scan_doubling(a, u, S), scans.scan_steps(a, u, S))


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_right(mode: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in draw(2, 5, d=2, m=2)]
    reset = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 0, 1, 0]]).bool()
    for cleared in (None, reset):
        assert torch.autograd.gradcheck(lambda *t, r=cleared: longhorn_scan(*t, mode, 2, reset=r), inputs)


def test_the_gradient_for_wide_devices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for stepwise in (True, False):
        monkeypatch.setattr(scans, "_stepwise", lambda tensor, answer=stepwise: answer)
        inputs = [tensor.requires_grad_() for tensor in draw(2, 21)]
        y, S = longhorn_scan(*inputs, chunk=8)
        assert S is not None
        (y.sin().sum() + S.cos().sum()).backward()
        found.append([tensor.grad for tensor in inputs])
    torch.testing.assert_close(*found)


def test_memory_for_the_gradient_is_inputs_and_chunk_borders() -> None:
    """A loop would keep every state, T B d m numbers; here they are counted as autograd packs them."""
    B, T, d, m, C = 2, 256, 8, 16, 32
    inputs = [tensor.float().requires_grad_() for tensor in draw(B, T, d, m)]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        longhorn_scan(*inputs, chunk=C)
    given = sum(tensor.numel() for tensor in inputs)
    assert sum(kept.values()) <= given + T // C * B * d * m + d
    assert sum(kept.values()) < T * B * d * m / 2


def test_it_compiles_whole() -> None:
    inputs = [tensor.requires_grad_() for tensor in draw(1, 9, dtype=torch.float32)]
    compiled = torch.compile(longhorn_scan, backend="aot_eager", fullgraph=True)
    y, S = compiled(*inputs, chunk=4)
    expected = longhorn_scan(*inputs, chunk=4)
    torch.testing.assert_close((y, S), expected)
    grads = [torch.autograd.grad(out.sum(), inputs) for out in (y, expected[0])]
    torch.testing.assert_close(*grads)


def test_low_precision_goes_in_and_out_and_not_through() -> None:
    inputs = draw(2, 12, dtype=torch.bfloat16)
    y, S = longhorn_scan(*inputs)
    assert S is not None and y.dtype == torch.bfloat16 and S.dtype == torch.float32
    wide = longhorn_scan(*(tensor.float() for tensor in inputs))
    assert torch.equal(S, wide[1]) and torch.equal(y, wide[0].bfloat16())  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(longhorn_scan(*(tensor.float() for tensor in inputs))[0], wide[0])


def test_decays_are_in_0_to_1() -> None:
    g = torch.Generator().manual_seed(0)
    k = torch.randn(50, 8, generator=g) * torch.logspace(-6, 6, 50)[:, None]
    beta = torch.rand(50, 4, generator=g) * torch.logspace(6, -6, 50)[:, None]
    decay = scans._terms(torch.zeros(1, 50, 4), k[None], beta[None], None).decay
    assert float(decay.min()) >= 0 and float(decay.max()) <= 1


@pytest.mark.parametrize("mode", MODES)
def test_scale_of_keys(mode: str) -> None:
    """k -> c k with beta -> beta / c^2 keeps the decays and divides the state by c."""
    x, k, q, beta, D, _ = draw(2, 9)
    c = 4.0  # a power of two, so that nothing is rounded
    _, S = longhorn_scan(x, k, q, beta, D, None, mode)
    _, scaled = longhorn_scan(x, c * k, q, beta / c**2, D, None, mode)
    assert S is not None and scaled is not None and torch.equal(scaled * c, S)


@pytest.mark.parametrize(("beta", "recalled"), [(1e9, 1.0), (1.0, 0.5)])
def test_orthonormal_keys_are_recalled(beta: float, recalled: float) -> None:
    """All of each value where the step is large; with step 1 and unit keys, exactly half."""
    x = draw(1, 6, d=4, m=6)[0]
    k = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0][None]
    _, S = longhorn_scan(x, k, k, torch.full_like(x, beta), mode="exact")
    assert S is not None
    torch.testing.assert_close((S @ k.mT).mT, recalled * x, rtol=1e-8, atol=1e-12)


def test_exact_mode_is_deltanet_with_a_shared_step() -> None:
    x, k, q, beta, _, _ = draw(2, 8)
    beta = beta[..., :1].expand_as(beta)
    y, _ = longhorn_scan(x, k, q, beta, mode="exact")
    eye = torch.eye(3, dtype=torch.float64)
    for b in range(2):
        S = torch.zeros(5, 3, dtype=torch.float64)  # DeltaNet, arXiv 2406.06484: S (I - a k k') + a v k'
        for t in range(8):
            a = step_size(beta[b, t, :1], k[b, t])
            S = S @ (eye - a * torch.outer(k[b, t], k[b, t])) + a * torch.outer(x[b, t], k[b, t])
            torch.testing.assert_close(y[b, t], S @ q[b, t])


def test_without_the_denominator_it_diverges() -> None:
    """The ablation: Delta = beta lets 1 - beta k*k leave [-1, 1]."""
    x, k, q, beta, D, S = draw(1, 64)
    k = 3 * k
    bounded = longhorn_scan(x, k, q, beta, D, S)[1]
    for t in range(64):
        step = beta[:, t, :, None]
        S = (1 - step * k[:, t, None] ** 2) * S + step * x[:, t, :, None] * k[:, t, None]
    assert bounded is not None and float(bounded.abs().max()) < 10 < 1e10 < float(S.abs().max())


def refused() -> list[tuple[dict[str, Any], str]]:
    x, k, _q, beta, D, S0 = draw(2, 4)
    return [
        ({"k": k[..., :2]}, r"q is \(2, 4, 3\); with x \(2, 4, 5\) and k \(2, 4, 2\) it must be \(2, 4, 2\)"),
        ({"beta": beta[:, :3]}, "beta is"),
        ({"x": x[0]}, r"x is \[B, T, d\]"),
        ({"x": x[:, :0]}, "none of them empty"),
        ({"D": D[:1]}, r"D is \(1,\)"),
        ({"S0": S0[:1]}, r"S0 is \(1, 5, 3\)"),
        ({"reset": torch.zeros(2, 3).bool()}, "reset is"),
        ({"beta": beta - 1}, "beta has the value -"),
        ({"S0": S0 / 0}, "S0 holds NaN or infinity"),
        ({"D": D.to("meta")}, "D is on meta and x on cpu"),
        ({"mode": "fast"}, "mode='fast'; it must be one of diagonal, exact"),
        ({"chunk": 0}, "chunk=0"),
    ]


@pytest.mark.parametrize("number", range(len(refused())))
def test_bad_input_is_one_sentence(number: int) -> None:
    changes, message = refused()[number]
    given = dict(zip(("x", "k", "q", "beta", "D", "S0"), draw(2, 4), strict=True))
    with pytest.raises(UsageError, match=message):
        longhorn_scan(**{**given, **changes})
