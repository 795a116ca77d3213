"""Bit products: three ways agree in every bit, integers equal NumPy, and a machine without a compiler works too."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from edgewright.errors import EdgewrightError, UsageError
from edgewright.kernels import build, popcount
from edgewright.kernels.popcount import (
    binary_dot,
    binary_linear,
    count_ones,
    pack_bits,
    tile,
    unpack_bits,
    unpack_signs,
)

SHAPES = [(384, 1536, 3), (100, 13, 5), (64, 8, 4), (65, 9, 2), (1, 1, 1), (63, 7, 9), (2100, 20, 6)]
PORTABLE = ("-DEDGEWRIGHT_PORTABLE",)


def layer(n, out, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator)
    x[0] = 0.0  # on the threshold
    weight = torch.randn(out, n, generator=generator) >= 0
    shift = 0.2 * torch.randn(n, generator=generator)
    bias = torch.randn(out, generator=generator)
    return x, weight, shift, bias, torch.tensor(0.37), 0.01 + torch.rand(out, generator=generator)


def needs_kernel():
    """A kernel that does not build is a failure: a compiler is among what the tests need."""
    assert popcount.why_no_kernel() is None


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_bits_come_back_and_padding_is_zero(n):
    bits = torch.rand(7, n, generator=torch.Generator().manual_seed(n)) < 0.5
    words = pack_bits(bits)
    assert words.shape == (7, -(-n // 64)) and torch.equal(unpack_bits(words, n), bits)
    assert torch.equal(unpack_signs(words, n), bits.float() * 2 - 1)
    assert torch.equal(count_ones(words).sum(-1), bits.sum(-1))  # a one in the padding would be counted
    assert torch.equal((words[:, (n - 1) // 64] >> ((n - 1) % 64) & 1).bool(), bits[:, n - 1])


def test_ones_of_extreme_words():
    words = torch.tensor([0, -1, 1, -(2**63), 2**63 - 1])
    assert count_ones(words).tolist() == [0, 64, 1, 1, 63]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("n", "out", "rows"), SHAPES)
def test_integer_products_equal_numpy(n, out, rows, signed):
    generator = np.random.default_rng(n)
    a, w = generator.random((rows, n)) < 0.5, generator.random((out, n)) < 0.5
    codes = np.where(a, 1, -1) if signed else a.astype(np.int64)
    wanted = codes @ np.where(w, 1, -1).T
    found = binary_dot(pack_bits(torch.from_numpy(a)), pack_bits(torch.from_numpy(w)), n, signed)
    assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("n", "out", "rows"), SHAPES)
def test_kernel_torch_and_float_agree_in_every_bit(n, out, rows, signed):
    x, weight, shift, bias, alpha_x, alpha_w = layer(n, out, rows)
    words = pack_bits(weight)
    for given in ({"shift": shift, "bias": bias}, {"shift": None, "bias": None}):
        arguments = {"alpha_x": alpha_x, "alpha_w": alpha_w, "signed": signed, **given}
        copied = binary_linear(x, words, path="torch", **arguments)
        assert torch.equal(binary_linear(x, words, path="float", **arguments), copied)
        if popcount.why_no_kernel() is None:
            assert torch.equal(binary_linear(x, words, path="kernel", **arguments), copied)


@pytest.mark.parametrize("signed", [True, False])
def test_the_portable_kernel_is_the_same_function(signed):
    needs_kernel()
    x, weight, shift, bias, alpha_x, alpha_w = layer(200, 21, 6)
    words = pack_bits(weight)
    wanted = binary_linear(
        x, words, alpha_x=alpha_x, alpha_w=alpha_w, shift=shift, bias=bias, signed=signed, path="torch"
    )
    found = popcount._through_kernel(x, tile(words), shift, alpha_x, alpha_w * alpha_x, bias, signed, PORTABLE)
    assert torch.equal(found, wanted)


def test_threads_do_not_change_a_bit(monkeypatch):
    needs_kernel()
    monkeypatch.setattr(popcount, "PRODUCTS_PER_THREAD", 1)
    x, weight, _shift, _bias, alpha_x, alpha_w = layer(130, 50, 11)
    words = pack_bits(weight)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(binary_linear(x, words, alpha_x=alpha_x, alpha_w=alpha_w, path="kernel"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_leading_dimensions_empty_batches_and_strides():
    x, weight, _, bias, alpha_x, alpha_w = layer(70, 6, 8)
    words = pack_bits(weight)
    arguments = {"alpha_x": alpha_x, "alpha_w": alpha_w, "bias": bias}
    flat = binary_linear(x, words, **arguments)
    assert torch.equal(binary_linear(x.reshape(2, 4, 70), words, **arguments), flat.reshape(2, 4, 6))
    assert torch.equal(binary_linear(x.t().contiguous().t(), words, **arguments), flat)
    for path in ("auto", "torch", "float"):
        assert binary_linear(x[:0], words, path=path, **arguments).shape == (0, 6)


def test_half_of_the_scale_is_zero_and_just_above_is_one():
    words, alpha = pack_bits(torch.ones(1, 3, dtype=torch.bool)), torch.tensor(0.5)
    x = torch.tensor([[0.25, 0.2500001, -3.0]])
    for path in ("auto", "torch", "float"):
        assert binary_linear(x, words, alpha_x=alpha, alpha_w=torch.ones(1), signed=False, path=path).item() == 0.5


def test_what_does_not_fit_is_refused():
    words = pack_bits(torch.ones(2, 70, dtype=torch.bool))
    with pytest.raises(UsageError, match="64 features do not fit weights of 2 words"):
        binary_linear(torch.ones(1, 64), words, alpha_x=torch.tensor(1.0), alpha_w=torch.ones(1))
    with pytest.raises(UsageError, match="path='fast'"):
        binary_linear(torch.ones(1, 70), words, alpha_x=torch.tensor(1.0), alpha_w=torch.ones(1), path="fast")


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_kernel.cache_clear()
    popcount._kernel.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    build.load_kernel.cache_clear()
    popcount._kernel.cache_clear()


def test_without_a_compiler_the_float_path_serves(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in popcount.why_no_kernel()
    x, weight, _, _, alpha_x, alpha_w = layer(70, 6, 8)
    arguments = {"alpha_x": alpha_x, "alpha_w": alpha_w}
    words = pack_bits(weight)
    assert torch.equal(binary_linear(x, words, **arguments), binary_linear(x, words, path="torch", **arguments))
    with pytest.raises(UsageError, match="path='auto' takes another"):
        binary_linear(x, words, path="kernel", **arguments)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(empty_cache, tmp_path, monkeypatch):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'fatal: no disk' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(EdgewrightError, match="fatal: no disk"):
        build.load_kernel("popcount")
    assert list((empty_cache / "edgewright" / "kernels").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_a_cache_that_all_can_write_is_not_trusted(empty_cache):
    folder = empty_cache / "edgewright" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "can be written by all" in popcount.why_no_kernel()


def test_processes_may_compile_at_once_and_the_cache_serves_the_next(empty_cache):
    needs_kernel()
    for file in (empty_cache / "edgewright" / "kernels").iterdir():
        file.unlink()
    code = "from edgewright.kernels.build import load_kernel; load_kernel('popcount')"
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: subprocess.run([sys.executable, "-c", code]).returncode, range(2)))
    files = list((empty_cache / "edgewright" / "kernels").iterdir())
    assert runs == [0, 0] and len(files) == 1 and files[0].suffix == ".so"
    written = files[0].stat().st_mtime_ns
    build.load_kernel.cache_clear()
    build.load_kernel("popcount")
    assert files[0].stat().st_mtime_ns == written
