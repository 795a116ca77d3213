"""The sparse row product: the kernel equals a plain sum in every bit, plain torch to rounding, whatever is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgewright.errors import EdgewrightError, UsageError
from edgewright.io.packed import PackedTensor
from edgewright.kernels import sparse_rows as module
from edgewright.kernels.sparse_op import operator
from edgewright.kernels.sparse_rows import PreparedRows, RowMatrix, sparse_rows

# inputs, outputs, rank: below and above a tile of 4096, odd ends, one of everything
SHAPES = [(64, 48, 0), (37, 70, 3), (100, 4097, 5), (1, 1, 1), (9, 8200, 0), (129, 1, 2)]


def needs_kernel():
    """A kernel that does not build is a failure: a compiler is among what the tests need."""
    assert module.why_no_kernel() is None


def layer(n, out, rank, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator)
    rows = torch.randn(n, out, generator=generator).to(dtype)
    scale = torch.rand(n, generator=generator)
    factors = {}
    if rank:
        factors["down"] = torch.randn(n, rank, generator=generator).to(dtype)
        factors["up"] = torch.randn(rank, out, generator=generator).to(dtype)
    return x, RowMatrix(rows), scale, {**factors, "bias": torch.randn(out, generator=generator)}


def plain(x, rows, scale, threshold, down=None, up=None, bias=None):
    """One channel after the other in float32, as the kernel promises."""
    x, scale = x.numpy(), scale.numpy()
    keep = np.abs(x) * scale > np.float32(threshold)
    y = np.zeros(rows.shape[1], np.float32) if bias is None else bias.numpy().copy()
    for i in np.flatnonzero(keep):
        y = y + x[i] * rows[i].float().numpy()
    if down is not None:
        z = np.zeros(down.shape[1], np.float32)
        for i in np.flatnonzero(~keep):
            z = z + x[i] * down[i].float().numpy()
        for j in range(len(z)):
            y = y + z[j] * up[j].float().numpy()
    return y, int(keep.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 1e30])
@pytest.mark.parametrize(("n", "out", "rank"), SHAPES)
def test_the_kernel_is_the_plain_sum_in_every_bit(n, out, rank, threshold, dtype):
    needs_kernel()
    x, weight, scale, more = layer(n, out, rank, dtype)
    wanted, count = plain(x, weight.rows, scale, threshold, **more)
    found, kept = sparse_rows(x, weight, scale, threshold, path="kernel", **more)
    assert kept == count and np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 1e30])
@pytest.mark.parametrize(("n", "out", "rank"), SHAPES)
def test_plain_torch_is_the_same_product(n, out, rank, threshold, dtype):
    x, weight, scale, more = layer(n, out, rank, dtype)
    wanted, count = plain(x, weight.rows, scale, threshold, **more)
    found, kept = sparse_rows(x, weight, scale, threshold, path="torch", **more)
    assert kept == count
    # another order of up to 129 float32 sums
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 1e30])
@pytest.mark.parametrize(("grid", "group"), [("int4", 8), ("int4", 64), ("seq2", 16), ("ternary", 64)])
def test_codes_equal_their_dequantised_weight(grid, group, threshold):
    generator = torch.Generator().manual_seed(1)
    low, high = {"int4": (-8, 7), "seq2": (-2, 1), "ternary": (-1, 1)}[grid]
    codes = torch.randint(low, high + 1, (50, 64), generator=generator, dtype=torch.int8)
    packed = PackedTensor(codes, torch.rand(50, 64 // group, generator=generator), grid)
    rows = RowMatrix(codes.t().contiguous(), packed.step.t().contiguous(), packed.offset)
    assert torch.equal(rows.values(), packed.dequantize().t())
    x, _, scale, _ = layer(64, 50, 0)
    wanted, count = plain(x, packed.dequantize().t(), scale, threshold)
    for path in ("kernel", "torch") if module.why_no_kernel() is None else ("torch",):
        found, kept = sparse_rows(x, rows, scale, threshold, path=path)
        assert kept == count
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-5, atol=1e-4)  # steps after the sums


def test_threads_do_not_change_a_bit(monkeypatch):
    needs_kernel()
    monkeypatch.setattr(module, "PRODUCTS_PER_THREAD", 1)
    x, weight, scale, more = layer(90, 5000, 4)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(sparse_rows(x, weight, scale, 0.2, path="kernel", **more)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_prepared_product_holds_what_it_reads():
    needs_kernel()
    x, weight, scale, more = layer(40, 33, 2)
    wanted = sparse_rows(x, weight, scale, 0.1, path="kernel", **more)[0]
    prepared = PreparedRows(
        RowMatrix(weight.rows.clone()), scale.clone(), 0.1, **{k: v.clone() for k, v in more.items()}
    )
    del weight, scale, more
    assert torch.equal(prepared(x)[0], wanted) and torch.equal(prepared(x.reshape(1, 1, -1))[0], wanted)


def test_without_a_compiler_auto_takes_plain_torch(monkeypatch):
    monkeypatch.setattr(module, "_kernel", lambda extra=(): (None, "no C++ compiler found"))
    x, weight, scale, more = layer(40, 33, 2)
    auto, copied = (sparse_rows(x, weight, scale, 0.1, path=path, **more)[0] for path in ("auto", "torch"))
    assert torch.equal(auto, copied)
    with pytest.raises(UsageError, match="path='kernel' cannot be taken: no C\\+\\+ compiler found"):
        sparse_rows(x, weight, scale, 0.1, path="kernel", **more)


def test_what_does_not_fit_is_refused():
    x, weight, scale, more = layer(40, 33, 2)
    with pytest.raises(UsageError, match="path='fast'"):
        sparse_rows(x, weight, scale, 0.1, path="fast")
    for arguments in ((x[:-1], weight, scale), (x, weight, scale[:-1])):
        with pytest.raises(UsageError, match="do not fit a weight of 40 inputs, 33 outputs"):
            sparse_rows(*arguments, 0.1, path="torch")
    with pytest.raises(UsageError, match="do not fit"):
        sparse_rows(x, weight, scale, 0.1, down=more["down"], path="torch")
    with pytest.raises(UsageError, match="contiguous"):
        RowMatrix(weight.rows.t())
    with pytest.raises(UsageError, match="codes need scales"):
        RowMatrix(torch.ones(4, 4, dtype=torch.int8))
    with pytest.raises(UsageError, match="do not fit codes"):
        RowMatrix(torch.ones(4, 4, dtype=torch.int8), torch.ones(3, 4))
    assert issubclass(UsageError, EdgewrightError)


def test_the_operator_exports_and_runs():
    x, weight, scale, more = layer(24, 16, 3)
    limit = torch.tensor(0.2)

    class Layer(torch.nn.Module):
        def forward(self, tokens):
            return operator()(tokens, weight.rows, scale, limit, more["down"], more["up"], more["bias"])

    tokens = torch.stack((x, -x)).unsqueeze(0)
    program = torch.export.export(Layer(), (tokens,))
    assert "edgewright.sparse_gemv" in str(program.graph)
    found = program.module()(tokens)
    wanted = [sparse_rows(token, weight, scale, 0.2, **more)[0] for token in tokens[0]]
    assert torch.equal(found, torch.stack(wanted).unsqueeze(0))
