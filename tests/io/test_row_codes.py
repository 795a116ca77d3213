"""Rows at few bits: torch's own operators are the oracle of the bytes and of the greedy search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from edgewright.errors import FormatError, UsageError
from edgewright.io.row_codes import PackedRows, pack_rows, row_bytes, unpackable_rows
from edgewright.io.row_ranges import greedy_range, quantize_rows, tune_range

OPERATOR = {
    8: torch.ops.quantized.embedding_bag_byte_prepack,
    4: torch.ops.quantized.embedding_bag_4bit_prepack,
    2: torch.ops.quantized.embedding_bag_2bit_prepack,
}


def rows_of(seed: int, rows: int, dim: int, scale: float = 0.05, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bytes_are_those_of_torchs_operator(bits):
    # 1,000 matrices: magnitudes from 1e-9 to 1e2, shifted, constant rows, heavy tails
    for seed in range(1000):
        scale, shift = 10.0 ** ((seed % 12) - 9), (0.0, 1.0, -0.3)[seed % 3]
        weight = rows_of(seed, 1 + seed % 5, 4 * (1 + seed % 7), scale, shift)
        if seed % 5 == 0:
            weight[0] = weight[0, 0]
        if seed % 7 == 0:
            weight = weight * weight.abs().sqrt()
        assert torch.equal(pack_rows(weight, bits).packed, OPERATOR[bits](weight)), seed


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(("nbins", "ratio"), [(200, 0.16), (25, 0.6), (10, 1.0)])
def test_greedy_search_is_torchs(bits, nbins, ratio):
    for seed in range(12):
        weight = rows_of(seed, 6, 16, 10.0 ** (seed % 4 - 3), (0.0, 0.7)[seed % 2])
        weight[0, 0] *= 30
        expected = OPERATOR[bits](weight, True, nbins, ratio)
        assert torch.equal(quantize_rows(weight, bits, "greedy", nbins, ratio).packed, expected)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    dim=st.integers(1, 41),
    seed=st.integers(0, 10_000),
    method=st.sampled_from(["minmax", "greedy", "symmetric"]),
)
def test_error_is_half_a_step_inside_the_range_and_nothing_widens(bits, dim, seed, method):
    weight = rows_of(seed, 7, dim)
    packed = quantize_rows(weight, bits, method, 25, 0.6)
    assert packed.packed.shape == (7, row_bytes(dim, bits)) and packed.nbytes == packed.packed.numel()
    assert packed.codes().shape == (7, dim) and int(packed.codes().max()) < 2**bits
    scale, bias = packed.scale_bias().unbind(1)
    top = bias + scale * (2**bits - 1)
    value = packed.dequantize()
    inside = (weight >= bias[:, None]) & (weight <= top[:, None])
    error = (value - weight).abs()
    # rounding of the product and of the inverse, in float32
    assert bool((error <= scale[:, None] * 0.5001 + 1e-6)[inside].all())
    # float16 rounds scale and bias: half a unit in its last place each
    slack = scale[:, None] * 0.51 + weight.abs().amax() * 2e-3
    nearest = torch.minimum(torch.maximum(weight, bias[:, None]), top[:, None])
    assert bool(((value - nearest).abs() <= slack).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", ["minmax", "greedy"])
def test_packing_unpacked_rows_again_changes_nothing(bits, method):
    packed = quantize_rows(rows_of(3, 500, 24), bits, method, 25, 0.6)
    assert torch.equal(pack_rows(packed.dequantize(), bits).packed, packed.packed)


def test_eight_bits_keep_their_codes_and_move_by_a_last_place():
    packed = pack_rows(rows_of(4, 500, 24), 8)
    once = packed.dequantize()
    again = pack_rows(once, 8)
    assert torch.equal(again.codes(), packed.codes())
    torch.testing.assert_close(again.dequantize(), once, rtol=0, atol=1e-7)


def test_greedy_never_loses_to_minmax_and_reaches_the_known_errors():
    weight = rows_of(0, 1000, 64)

    def error(bits, *method):
        difference = quantize_rows(weight, bits, *method).dequantize() - weight
        return difference.norm(dim=1), float(difference.norm() / weight.norm())

    figures = {(8, "minmax"): 0.0053, (4, "minmax"): 0.0895, (2, "minmax"): 0.450}
    figures |= {(4, "greedy", 200, 0.16): 0.0817, (4, "greedy", 25, 0.6): 0.0839, (2, "greedy", 25, 0.6): 0.323}
    for (bits, *method), expected in figures.items():
        assert error(bits, *method)[1] == pytest.approx(expected, rel=0.02)
    for bits in (2, 3, 4):
        greedy, minmax = error(bits, "greedy", 25, 0.6)[0], error(bits, "minmax")[0]
        assert bool((greedy <= minmax * (1 + 1e-5)).all())


def test_rows_that_no_code_can_hold_are_named():
    weight = rows_of(1, 5, 8)
    weight[3, 2] = float("nan")
    for bits in (4, 8):
        with pytest.raises(UsageError, match="row 3 has NaN"):
            pack_rows(weight, bits)
    weight[3, 2] = 1e5
    assert unpackable_rows(weight, 8).tolist() == [False] * 5
    assert unpackable_rows(-weight, 4).tolist() == [False, False, False, True, False]
    with pytest.raises(UsageError, match="bits=5; rows are packed at 2, 3, 4, 8 bits"):
        quantize_rows(weight, 5)
    with pytest.raises(UsageError, match="method='median'"):
        quantize_rows(weight, 4, "median")
    with pytest.raises(FormatError, match=r"uint8 \[n, 8\]"):
        PackedRows(torch.zeros(2, 9, dtype=torch.uint8), 4, 8)


def test_chosen_rows_and_empty_tables():
    weight = rows_of(2, 9, 5)
    packed = quantize_rows(weight, 3, "greedy", 25, 0.6)
    chosen = torch.tensor([8, 0, 8])
    assert torch.equal(packed.dequantize(chosen), packed.dequantize()[chosen])
    for bits in (2, 3, 4, 8):
        assert quantize_rows(weight[:0], bits).dequantize().shape == (0, 5)
        assert pack_rows(weight, bits).dequantize(torch.tensor([], dtype=torch.int64)).shape == (0, 5)


def test_tuning_takes_the_cheapest_setting_that_is_nearly_best():
    weight = rows_of(5, 300, 32)
    nbins, ratio = tune_range(weight, 2, torch.Generator().manual_seed(0))
    assert (nbins, ratio) == tune_range(weight, 2, torch.Generator().manual_seed(0))

    def error(low_high):
        return float((pack_rows(weight, 2, *low_high).dequantize() - weight).norm())

    best = min(error(greedy_range(weight, 2, n, r)) for n in (10, 25, 50) for r in (0.3, 0.6, 1.0))
    assert error(greedy_range(weight, 2, nbins, ratio)) <= best * 1.03  # measured on a sample of 256 of the 300
