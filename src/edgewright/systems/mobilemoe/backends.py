"""How chosen experts are computed: one loop that is easy to trust, and faster ways to the same sums.

N tokens, k experts a token, E experts, f their width, d hidden; a pair is one (token, slot), numbered token * k + slot.
    loop        every expert looks for its tokens
    sorted      pairs sorted by expert, one contiguous slice an expert
    grouped_mm  the same order, torch's grouped matmul; "sorted" where this device or shape has none
    gather      a copy of the k matrices of each token: for tracing a single token
    dense       every expert computes every token, weights of zero for the rest: for tracing a prompt, E / k the work
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.training.distributed import local


class Weights(NamedTuple):
    """gate_up [E, 2f, d] and down [E, d, f], each a tensor or a quantised stack of one, and the activation."""

    gate_up: Any
    down: Any
    act: Callable[[Tensor], Tensor]


class Slices(NamedTuple):
    """Pairs by expert: order [n] of pair numbers, counts [E] of how many each expert has."""

    order: Tensor
    counts: Tensor


def counting_sort(ids: Tensor, bins: int) -> Slices:
    """Stable order of `ids` (int64 [n], each below `bins`) and the size of every bin.

    torch's stable sort of integers is a radix sort on CPU: counts, prefix sums and placement, O(n + bins).
    """
    return Slices(torch.argsort(ids, stable=True), torch.bincount(ids, minlength=bins))


def keep_first(slices: Slices, capacity: int | None) -> Slices:
    """At most `capacity` pairs an expert: the first ones by token, then by slot.

    deviation: the paper does not say which overflow goes; here it is the latest. Weights are not rescaled.
    """
    if capacity is None:
        return slices
    counts = slices.counts
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.arange(len(slices.order), device=counts.device) - first
    return Slices(slices.order[rank < capacity], counts.clamp(max=capacity))


def choose(backend: str, u: Tensor, indices: Tensor, experts: int) -> str:
    """The back-end behind "auto", and the one for the mode: tracing takes forms without loops over data."""
    if torch.compiler.is_compiling():
        if backend in ("gather", "dense"):
            return backend
        tokens, k = indices.shape
        return "gather" if isinstance(tokens, int) and tokens * k <= experts else "dense"
    if backend == "auto":
        return "grouped_mm" if u.device.type == "cuda" else "sorted"
    return backend


def run(
    backend: str, u: Tensor, indices: Tensor, weights: Tensor, experts: Weights, capacity: int | None = None
) -> Tensor:
    """The weighted sum of FFN_e(u[n]) over the experts e of indices[n]. u [N, d], indices, weights [N, k] -> [N, d]."""
    u = quantized_input(experts.gate_up, u)
    if backend == "loop":
        return _loop(u, indices, weights, experts, capacity)
    if backend in ("gather", "dense"):
        if capacity is not None:
            raise UsageError(
                f"backend={backend!r} cannot drop tokens; a capacity needs 'sorted', 'grouped_mm' or 'loop'"
            )
        return (_gather if backend == "gather" else _dense)(u, indices, weights, experts)
    slices = keep_first(counting_sort(indices.reshape(-1), count(experts.gate_up)), capacity)
    rows = u.index_select(0, slices.order // indices.shape[1])
    return combine(on_rows(backend, rows, slices.counts, experts), slices.order, weights, u)


def on_rows(backend: str, rows: Tensor, counts: Tensor, experts: Weights) -> Tensor:
    """FFN_e of rows [n, d] that are grouped by expert, counts [E] rows each -> [n, d].

    The inputs are quantised already where they are to be.
    """
    if backend == "grouped_mm" and _has_grouped_mm(rows, experts):
        return _grouped_mm(rows, counts, experts)
    return _sorted(rows, counts, experts)


def combine(results: Tensor, order: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """Add each token's results [n, d] with its weights, in slot order whatever the sorting; dropped pairs are zero."""
    tokens, k = weights.shape
    # Every pair has its own row: no two additions meet, so the sum has the same bits on every device.
    pairs = results.new_zeros(tokens * k, results.shape[1]).index_copy(0, order, results)
    mixed = torch.bmm(weights.unsqueeze(1), pairs.view(tokens, k, results.shape[1]).to(weights.dtype))
    return mixed.squeeze(1).to(like.dtype)


def _loop(u: Tensor, indices: Tensor, weights: Tensor, experts: Weights, capacity: int | None) -> Tensor:
    """The definition, expert by expert; it is what the other back-ends are compared with."""
    gate_up, down = matrices(experts.gate_up), matrices(experts.down)
    out = torch.zeros_like(u, dtype=weights.dtype)
    for expert in range(count(experts.gate_up)):
        token, slot = torch.nonzero(indices == expert, as_tuple=True)
        token, slot = token[:capacity], slot[:capacity]
        if len(token):
            result = _feed_forward(u[token], gate_up[expert], down[expert], experts)
            out = out.index_add(0, token, result * weights[token, slot, None])
    return out.to(u.dtype)


def _sorted(rows: Tensor, counts: Tensor, experts: Weights) -> Tensor:
    gate_up, down = matrices(experts.gate_up), matrices(experts.down)
    results, start = [], 0
    for expert, size in enumerate(counts.tolist()):
        if size:
            piece = rows[start : start + size]
            results.append(_feed_forward(piece, gate_up[expert], down[expert], experts))
            start += size
    # Without rows the result still depends on them: every process of a group has to take part in the backward.
    return torch.cat(results) if results else rows


def _grouped_mm(rows: Tensor, counts: Tensor, experts: Weights) -> Tensor:
    ends = counts.cumsum(0).to(torch.int32)
    gate_up = whole(experts.gate_up).to(rows.dtype)
    hidden = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
    hidden = quantized_input(experts.down, swiglu(hidden, experts.act))
    return F.grouped_mm(hidden, whole(experts.down).to(rows.dtype).transpose(1, 2), offs=ends)


def _has_grouped_mm(rows: Tensor, experts: Weights) -> bool:
    """Whether torch multiplies these shapes in groups: rows of multiples of 16 bytes, and a kernel for the device."""
    if not hasattr(F, "grouped_mm") or rows.device.type not in ("cpu", "cuda"):
        return False
    if rows.device.type == "cuda" and torch.cuda.get_device_capability(rows.device) < (8, 0):
        return False
    widths = (rows.shape[1], whole_shape(experts.down)[2])
    return all(width * rows.element_size() % 16 == 0 for width in widths)


def _gather(u: Tensor, indices: Tensor, weights: Tensor, experts: Weights) -> Tensor:
    tokens, k = indices.shape
    pairs = indices.reshape(-1)
    rows = u.unsqueeze(1).expand(tokens, k, u.shape[1]).reshape(tokens * k, u.shape[1], 1)
    hidden = torch.bmm(whole(experts.gate_up)[pairs].to(u.dtype), rows).squeeze(-1)  # [N k, 2f]
    hidden = quantized_input(experts.down, swiglu(hidden, experts.act)).unsqueeze(-1)
    results = torch.bmm(whole(experts.down)[pairs].to(u.dtype), hidden).view(tokens, k, u.shape[1])
    return torch.bmm(weights.unsqueeze(1), results.to(weights.dtype)).squeeze(1).to(u.dtype)


def _dense(u: Tensor, indices: Tensor, weights: Tensor, experts: Weights) -> Tensor:
    gate_up, down = whole(experts.gate_up).to(u.dtype), whole(experts.down).to(u.dtype)
    share = weights.new_zeros(u.shape[0], gate_up.shape[0]).scatter(1, indices, weights)  # [N, E]
    hidden = torch.matmul(u, gate_up.transpose(1, 2))  # [E, N, 2f]
    hidden = quantized_input(experts.down, swiglu(hidden, experts.act))
    results = torch.matmul(hidden, down.transpose(1, 2)).to(weights.dtype)  # [E, N, d]
    return (results * share.t().unsqueeze(-1)).sum(0).to(u.dtype)


def _feed_forward(rows: Tensor, gate_up: Tensor, down: Tensor, experts: Weights) -> Tensor:
    hidden = swiglu(F.linear(rows, gate_up.to(rows.dtype)), experts.act)
    return F.linear(quantized_input(experts.down, hidden), down.to(rows.dtype))


def swiglu(gate_up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """act(gate) * up, for [..., 2f] with the gate in the first half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return act(gate) * up


def whole(stack: Any) -> Tensor:
    """All matrices [E, out, in] of a tensor, of this process's share of a distributed one, or of a quantised stack."""
    if isinstance(stack, nn.Module):
        return stack()
    return local(stack, gradient=True)


def matrices(stack: Any) -> Sequence[Tensor]:
    """The same for access by expert; a packed stack then decodes only what is asked for."""
    if isinstance(stack, nn.Module) and hasattr(stack, "__getitem__"):
        return stack  # type: ignore[return-value]
    tensor = whole(stack)
    # One backward that stacks, where indexing would make a whole gradient for every expert.
    return tensor.unbind(0) if torch.is_grad_enabled() and tensor.requires_grad else tensor  # type: ignore[return-value]


def whole_shape(stack: Any) -> tuple[int, int, int]:
    """[E, out, in] of what this process holds, without decoding anything."""
    if isinstance(stack, nn.Module):
        return stack.stack_shape  # type: ignore[return-value]
    return tuple(local(stack, gradient=True).shape)  # type: ignore[return-value]


def count(stack: Any) -> int:
    return whole_shape(stack)[0]


def quantized_input(stack: Any, inputs: Tensor) -> Tensor:
    """Inputs as the quantised stack in front of them wants them."""
    quantizer = getattr(stack, "input_quantizer", None)
    return inputs if quantizer is None else quantizer(inputs)
