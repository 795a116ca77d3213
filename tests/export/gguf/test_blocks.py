"""Every (grid, block type, group) decodes to the packed values: three decoders and a slow reading of the layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgewright.errors import CheckFailed, FormatError, UsageError
from edgewright.export.gguf import ggml
from edgewright.export.gguf.blocks import ENCODINGS, TYPE_IDS, inexact, misfit, pack
from edgewright.io.gguf.types import decode
from edgewright.io.packed import PackedTensor
from tests.export.export_models import random_packed
from tests.export.gguf.block_readers import READERS, read

ROWS, COLUMNS = 5, 512
PAIRS = [
    (grid, name, group)
    for grid, encodings in ENCODINGS.items()
    for name in encodings
    for group in (512, 256, 128, 64, 32)
    if misfit(grid, name, COLUMNS, group) is None
]


@pytest.mark.parametrize(("grid", "name", "group"), PAIRS)
def test_pack_is_exact(grid, name, group):
    packed = random_packed(grid, ROWS, COLUMNS, group, seed=group)
    expected = packed.dequantize().numpy()
    raw = pack(packed, name)
    assert raw.shape == (ROWS, COLUMNS // READERS[name][0] * READERS[name][1])
    assert np.array_equal(read(raw.tobytes(), name).reshape(ROWS, COLUMNS), expected)
    assert np.array_equal(decode(raw.reshape(-1), TYPE_IDS[name]).reshape(ROWS, COLUMNS), expected)


@pytest.mark.parametrize(("grid", "name", "group"), PAIRS)
def test_llama_cpp_decodes_the_same(grid, name, group):
    packed = random_packed(grid, ROWS, COLUMNS, group, seed=group + 1)
    values = ggml.dequantize(pack(packed, name), name).reshape(ROWS, COLUMNS)
    assert np.array_equal(values, packed.dequantize().numpy())


@pytest.mark.parametrize(("grid", "name", "group"), [pair for pair in PAIRS if pair[1] not in ("Q1_0", "Q2_0")])
def test_the_gguf_package_decodes_the_same(grid, name, group):
    from gguf import GGMLQuantizationType, quants

    packed = random_packed(grid, ROWS, COLUMNS, group, seed=group + 2)
    values = quants.dequantize(pack(packed, name), GGMLQuantizationType[name])
    assert np.array_equal(values, packed.dequantize().numpy())


def test_every_grid_has_a_portable_type_for_rows_of_32():
    for grid in ENCODINGS:
        packed = random_packed(grid, 3, 96, 32)
        raw = pack(packed, "Q8_0")
        assert np.array_equal(read(raw.tobytes(), "Q8_0").reshape(3, 96), packed.dequantize().numpy())


def test_more_than_one_piece(monkeypatch):
    monkeypatch.setattr("edgewright.export.gguf.blocks.PIECE", 3 * 256)
    packed = random_packed("ternary", 7, 512)
    assert np.array_equal(
        decode(pack(packed, "TQ1_0").reshape(-1), TYPE_IDS["TQ1_0"]), packed.dequantize().numpy().ravel()
    )


def test_all_zero_rows_keep_the_smallest_step():
    """Rows of zeros get a step of 1e-5 from the scale rules; its bf16 rounding is exact in fp16, halved as well."""
    step = torch.full((2, 1), 1e-5 / 2).bfloat16().float()
    for grid, name in (("seq2", "Q2_K"), ("seq2", "Q4_0"), ("ternary", "TQ2_0"), ("int4", "Q4_0")):
        packed = PackedTensor(torch.zeros(2, 256, dtype=torch.int8), step, grid)
        assert np.array_equal(
            decode(pack(packed, name).reshape(-1), TYPE_IDS[name]), packed.dequantize().numpy().ravel()
        )


def test_a_step_that_fp16_cannot_hold_is_refused():
    for value in (1 + 2**-12, 1e-9, 70000.0):
        packed = PackedTensor(torch.ones(2, 64, dtype=torch.int8), torch.tensor([[1.0], [value]]), "int4")
        assert inexact(packed, "Q4_0") is not None
        with pytest.raises(CheckFailed, match="fp16"):
            pack(packed, "Q4_0")
    halved = PackedTensor(torch.ones(1, 64, dtype=torch.int8), torch.tensor([[2.0**-24]]), "seq2")
    assert inexact(halved, "Q4_0") is not None  # half of the smallest fp16 number


def test_misfits_name_the_reason():
    with pytest.raises(UsageError, match="rows divisible by 256, this one has 576"):
        pack(random_packed("seq2", 2, 576), "Q2_K")
    with pytest.raises(UsageError, match="one scale for 64 weights, the groups have 32"):
        pack(random_packed("ternary", 2, 128, 32), "Q2_0")
    with pytest.raises(UsageError, match="cannot hold the levels of int4"):
        pack(random_packed("int4", 2, 256), "Q2_K")


@pytest.mark.parametrize(("grid", "bad"), [("binary", 0), ("ternary", 2), ("seq2", -3), ("int3", 4), ("int4", 8)])
def test_codes_outside_the_grid_are_refused(grid, bad):
    packed = random_packed(grid, 2, 64)
    packed.codes[1, 5] = bad
    with pytest.raises(FormatError, match=grid):
        pack(packed, "Q4_0")
