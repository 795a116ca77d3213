"""Longhorn's recurrence: each token moves the state to the minimum of a small regression problem.

The state S [d, m] is a linear map from keys to values. A token with key k [m], value x [d] and step beta [d] asks for

    S_t = argmin_S ||S - S_{t-1}||^2 + sum_i beta_i (S_i . k - x_i)^2                    (arXiv 2407.14207, eq. 5)

whose solution, with Delta_i = beta_i / (1 + beta_i k'k), is

    exact      S_i <- S_i - Delta_i (S_i . k) k + Delta_i x_i k
    diagonal   S_i <- (1 - Delta_i k*k) * S_i + Delta_i x_i k        k k' replaced by its diagonal; the layer's form

and o = S q + D * x is what is read. Every decay 1 - Delta k*k lies in (0, 1], so nothing has to be clipped.
B batch, T tokens, d channels, m state size; keys and queries are shared by all channels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from edgewright.checks import check, one_of, whole
from edgewright.errors import UsageError

MODES = ("diagonal", "exact")
CHUNK = 64
SCAN_BUDGET = 4 * 2**20  # bytes of one [C, B, d, m] tensor, a handful of which live at a time: what caches hold


def longhorn_scan(
    x: Tensor,
    k: Tensor,
    q: Tensor,
    beta: Tensor,
    D: Tensor | None = None,
    S0: Tensor | None = None,
    mode: str = "diagonal",
    chunk: int = CHUNK,
    return_state: bool = True,
    *,
    reset: Tensor | None = None,
    scan_budget: int = SCAN_BUDGET,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over T tokens (arXiv 2407.14207, eq. 5), in float32, or float64 where an input is.

    Args:
        x: values, [B, T, d].
        k: keys, [B, T, m].
        q: queries, [B, T, m].
        beta: steps of the regression, [B, T, d], 0 or more.
        D: weight of x in the output, [d].
        S0: the state before, [B, d, m]; zeros when left out.
        mode: "diagonal" or "exact".
        chunk: tokens at a time; for the gradient only the states between chunks are kept.
        return_state: give the last state as well.
        reset: bool [B, T], the state is cleared before these tokens.
        scan_budget: bytes; chunks are shorter where one [chunk, B, d, m] tensor would exceed them.

    Returns:
        (y [B, T, d] in x's dtype, last state [B, d, m] or None).

    Raises:
        UsageError: shapes or devices that do not fit, a negative beta, or a state that is not finite.
    """
    _check(x, k, q, beta, D, S0, reset, mode, chunk)
    kind = _compute_type(x, k, q, beta, S0)
    B, T, d = x.shape
    v, key, query, step = (t.to(kind).transpose(0, 1) for t in (x, k, q, beta))  # [T, B, .]
    S = torch.zeros(B, d, k.shape[-1], dtype=kind, device=x.device) if S0 is None else S0.to(kind)
    cleared = None if reset is None else reset.transpose(0, 1)
    C = max(1, min(chunk, T, scan_budget // max(1, S.numel() * S.element_size())))
    with _no_autocast(x):
        if mode == "exact":
            y, S = _exact(v, key, query, step, S, cleared, C)
        elif torch.is_grad_enabled() and any(t.requires_grad for t in (v, key, query, step, S)):
            y, S = _DiagonalScan.apply(v, key, query, step, S, cleared, C)
        else:
            y, S, _ = _diagonal(v, key, query, step, S, cleared, C)
        if D is not None:
            y = y + D.to(kind) * v
    return y.transpose(0, 1).to(x.dtype), S if return_state else None


def longhorn_step(
    x: Tensor, k: Tensor, q: Tensor, beta: Tensor, D: Tensor | None, S: Tensor, mode: str = "diagonal"
) -> tuple[Tensor, Tensor]:
    """The recurrence over one token; changes no input.

    Args:
        x: value, [B, d].
        k: key, [B, m].
        q: query, [B, m].
        beta: step of the regression, [B, d].
        D: weight of x in the output, [d], or None.
        S: the state before, [B, d, m].
        mode: "diagonal" or "exact".

    Returns:
        (y [B, d] in x's dtype, the new state).
    """
    kind = _compute_type(x, k, q, beta, S)
    v, key, query, S = (t.to(kind) for t in (x, k, q, S))
    with _no_autocast(x):
        delta = step_size(beta.to(kind), key)
        if mode == "exact":
            S = _exact_update(S, delta, v, key)
        else:
            decay = 1 - delta[..., None] * (key * key)[..., None, :]
            S = torch.addcmul((delta * v)[..., None] * key[..., None, :], decay, S)
        y = read(S, query)
        y = y if D is None else y + D.to(kind) * v
    return y.to(x.dtype), S


def step_size(beta: Tensor, k: Tensor) -> Tensor:
    """Delta [..., d] = beta / (1 + beta k'k), of beta [..., d] and the very k [..., m] that enters the update."""
    return beta / (1 + beta * (k * k).sum(-1, keepdim=True))


# -- the diagonal form -------------------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """S_t = decay_t * S_{t-1} + input_t for the tokens of a chunk, each [C, B, d, m]; delta [C, B, d]."""

    delta: Tensor
    decay: Tensor
    input: Tensor


def _terms(x: Tensor, k: Tensor, beta: Tensor, reset: Tensor | None) -> Terms:
    delta = step_size(beta, k)
    decay = 1 - delta[..., None] * (k * k)[..., None, :]
    if reset is not None:
        decay = decay.masked_fill(reset[..., None, None], 0.0)
    return Terms(delta, decay, (delta * x)[..., None] * k[..., None, :])


def scan_steps(a: Tensor, u: Tensor, S: Tensor) -> Tensor:
    """All S_t = a_t * S_{t-1} + u_t, [C, B, d, m], one fused operation a token: least work, for a CPU."""
    states = torch.empty_like(u)
    for decay, put, state in zip(a.unbind(), u.unbind(), states.unbind(), strict=True):
        S = torch.addcmul(put, decay, S, out=state)
    return states


def scan_doubling(a: Tensor, u: Tensor, S: Tensor) -> Tensor:
    """The same in log2(C) steps of (a2, u2) o (a1, u1) = (a2 a1, a2 u1 + u2): for devices that want wide work.

    No logarithms and no divisions by cumulative products: a decay may be 0 at a reset.
    """
    shift = 1
    while shift < a.shape[0]:
        u = torch.cat([u[:shift], torch.addcmul(u[shift:], a[shift:], u[:-shift])])
        a = torch.cat([a[:shift], a[shift:] * a[:-shift]])
        shift *= 2
    return torch.addcmul(u, a, S.expand_as(u))


def _scan(a: Tensor, u: Tensor, S: Tensor) -> Tensor:
    return scan_steps(a, u, S) if _stepwise(a) else scan_doubling(a, u, S)


def _scan_back(a: Tensor, g: Tensor, G: Tensor) -> Tensor:
    """All G_t = g_t + a_{t+1} * G_{t+1}, the same from the last token to the first; G: from behind the chunk.

    On a CPU g is overwritten.
    """
    if not _stepwise(a):
        return scan_doubling(torch.cat([torch.ones_like(a[:1]), a[1:].flip(0)]), g.flip(0), G).flip(0)
    rows = g.unbind()
    G = rows[-1].add_(G)
    for decay, row in zip(reversed(a.unbind()[1:]), reversed(rows[:-1]), strict=True):
        G = row.addcmul_(decay, G)
    return g


def _stepwise(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def read(states: Tensor, q: Tensor) -> Tensor:
    """States q, of [..., d, m] and [..., m] -> [..., d]. As a row times a matrix: BLAS is several times faster so."""
    return (q[..., None, :] @ states.mT).squeeze(-2)


def _diagonal(
    x: Tensor, k: Tensor, q: Tensor, beta: Tensor, S: Tensor, reset: Tensor | None, C: int, keep: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(y [T, B, d], last state, and with `keep` the state before every chunk)."""
    parts, before = [], []
    for start in range(0, x.shape[0], C):
        here = slice(start, start + C)
        if keep:
            before.append(S)
        _, decay, put = _terms(x[here], k[here], beta[here], None if reset is None else reset[here])
        states = _scan(decay, put, S)
        parts.append(read(states, q[here]))
        S = states[-1].clone()  # its own memory, so that the chunk's can go
    return torch.cat(parts), S, before


class _DiagonalScan(torch.autograd.Function):
    """The scan with its gradient in closed form, chunk by chunk from the end; chunks are computed again, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: Tensor, q: Tensor, beta: Tensor, S0: Tensor, reset: Any, C: int) -> Any:
        y, S, before = _diagonal(x, k, q, beta, S0, reset, C, keep=True)
        ctx.save_for_backward(x, k, q, beta, torch.stack(before), *(() if reset is None else (reset,)))
        ctx.chunk = C
        return y, S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dS: Tensor) -> Any:
        x, k, q, beta, before, *rest = ctx.saved_tensors
        parts = []
        with _no_autocast(x):
            for number in range(before.shape[0] - 1, -1, -1):
                here = slice(number * ctx.chunk, (number + 1) * ctx.chunk)
                reset = rest[0][here] if rest else None
                grads, dS = _chunk_gradient(x[here], k[here], q[here], beta[here], before[number], reset, dy[here], dS)
                parts.append(grads)
        dx, dk, dq, dbeta = (torch.cat(column) for column in zip(*reversed(parts), strict=True))
        return dx, dk, dq, dbeta, dS, None, None


def _chunk_gradient(
    x: Tensor, k: Tensor, q: Tensor, beta: Tensor, S: Tensor, reset: Tensor | None, dy: Tensor, dS: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """((dx, dk, dq, dbeta) of a chunk, gradient of the state before it); dS: gradient of the state behind it."""
    delta, decay, put = _terms(x, k, beta, reset)
    states = _scan(decay, put, S)
    dq = (dy[..., None, :] @ states).squeeze(-2)
    G = _scan_back(decay, dy[..., None] * q[..., None, :], dS)  # dL/dS_t of every token
    dS0 = decay[0] * G[0]
    # of the decay: G_t * S_{t-1}, and nothing where the state was cleared
    states = torch.cat([S[None], states[:-1]])
    if reset is not None:
        states = states.masked_fill(reset[..., None, None], 0.0)
    da = states.mul_(G)
    along = read(G, k)
    ddelta = x * along - read(da, k * k)
    squared = (ddelta * delta * delta).sum(-1, keepdim=True)  # k enters Delta too: dDelta/dk = -2 Delta^2 k
    through_decay = (delta[..., None, :] @ da).squeeze(-2)
    through_input = ((delta * x)[..., None, :] @ G).squeeze(-2)
    dk = through_input - 2 * k * (through_decay + squared)
    dbeta = ddelta / (1 + beta * (k * k).sum(-1, keepdim=True)).square()
    return (delta * along, dk, dq, dbeta), dS0


# -- the exact form ----------------------------------------------------------------------------------------------------


def _exact_update(S: Tensor, delta: Tensor, x: Tensor, k: Tensor) -> Tensor:
    error = x - read(S, k)  # [B, d]: what the state does not yet recall
    return S + (delta * error)[..., None] * k[..., None, :]


def _exact(
    x: Tensor, k: Tensor, q: Tensor, beta: Tensor, S: Tensor, reset: Tensor | None, C: int
) -> tuple[Tensor, Tensor]:
    """Token by token; the gradient computes each chunk again."""

    def run(x: Tensor, k: Tensor, q: Tensor, beta: Tensor, S: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        delta, outputs = step_size(beta, k), []
        for t in range(x.shape[0]):
            if reset is not None:
                S = S.masked_fill(reset[t, :, None, None], 0.0)
            S = _exact_update(S, delta[t], x[t], k[t])
            outputs.append(read(S, q[t]))
        return torch.stack(outputs), S

    parts = []
    for start in range(0, x.shape[0], C):
        here = slice(start, start + C)
        tensors = (x[here], k[here], q[here], beta[here], S, None if reset is None else reset[here])
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, k, q, beta, S)):
            y, S = checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)
        else:
            y, S = run(*tensors)
        parts.append(y)
    return torch.cat(parts), S


# -- what is refused ---------------------------------------------------------------------------------------------------


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """The recurrence keeps its type under autocast. Nothing where there is none: exporters record such a context."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _compute_type(*tensors: Tensor | None) -> torch.dtype:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _check(
    x: Tensor,
    k: Tensor,
    q: Tensor,
    beta: Tensor,
    D: Tensor | None,
    S0: Tensor | None,
    reset: Tensor | None,
    mode: str,
    chunk: int,
) -> None:
    check("mode", mode, one_of(*MODES))
    check("chunk", chunk, whole(1))
    if x.ndim != 3 or k.ndim != 3 or 0 in x.shape or 0 in k.shape:
        raise UsageError(f"x is [B, T, d] and k [B, T, m], none of them empty; got {_sizes(x)} and {_sizes(k)}")
    (B, T, d), m = x.shape, k.shape[-1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "beta": (beta, (B, T, d)),
        "k": (k, (B, T, m)),
        "q": (q, (B, T, m)),
        "D": (D, (d,)),
        "S0": (S0, (B, d, m)),
        "reset": (reset, (B, T)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise UsageError(f"{name} is {_sizes(tensor)}; with x {_sizes(x)} and k {_sizes(k)} it must be {shape}")
        if tensor.device != x.device:
            raise UsageError(f"{name} is on {tensor.device} and x on {x.device}; move them to one device")
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return  # where asking for a value costs a wait
    if (least := float(beta.detach().min())) < 0:
        raise UsageError(f"beta has the value {least:g}; steps must not be negative: put them through sigmoid or relu")
    if S0 is not None and not bool(torch.isfinite(S0.detach()).all()):
        raise UsageError("S0 holds NaN or infinity; start again from a state that is finite, or from none")


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
