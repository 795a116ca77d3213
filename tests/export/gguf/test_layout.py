"""Which type for which tensor: preferences, geometry, reasons."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from edgewright.errors import UsageError
from edgewright.export.gguf.blocks import ENCODINGS, bits_per_weight, misfit
from edgewright.export.gguf.layout import (
    LAYOUTS,
    RECENT_TYPES,
    SLOW,
    alike,
    costs,
    plan_float,
    plan_packed,
    preference,
    print_table,
)
from tests.export.export_models import random_packed


@pytest.mark.parametrize("grid", ENCODINGS)
def test_preferences_order_all_types(grid):
    small = preference(grid, "small")
    assert [bits_per_weight(name) for name in small] == sorted(bits_per_weight(name) for name in ENCODINGS[grid])
    assert preference(grid, "portable") == [name for name in small if name not in RECENT_TYPES]
    for machine in ("x86_64", "arm64"):
        for layout in ("auto", "fast"):
            order = preference(grid, layout, machine)
            assert sorted(order) == sorted(small)
        fastest = min(costs(machine)[name] for name in small)
        assert costs(machine)[preference(grid, "fast", machine)[0]] <= max(1.15, fastest)
        if fastest <= SLOW:
            assert costs(machine)[preference(grid, "auto", machine)[0]] <= SLOW


@pytest.mark.parametrize(
    ("grid", "columns", "auto", "small", "fast"),
    [
        ("ternary", 1536, "TQ2_0", "TQ1_0", "TQ2_0"),
        ("ternary", 576, "Q4_0", "Q2_0", "Q4_0"),
        ("binary", 1536, "Q1_0", "Q1_0", "TQ2_0"),
        ("binary", 384, "Q1_0", "Q1_0", "Q4_0"),
        ("binary", 576, "Q4_0", "Q2_0", "Q4_0"),
        ("seq2", 1536, "Q2_K", "Q2_K", "Q4_0"),
        ("seq2", 576, "Q4_0", "Q4_0", "Q4_0"),
        ("int3", 1536, "Q3_K", "Q3_K", "Q4_0"),
        ("int4", 576, "Q4_0", "Q4_0", "Q4_0"),
        ("int8", 576, "Q8_0", "Q8_0", "Q8_0"),
    ],
)
def test_the_specs_cases_on_x86(grid, columns, auto, small, fast):
    packed = random_packed(grid, 2, columns)
    found = [plan_packed("t", packed, layout, "x86_64").written for layout in ("auto", "small", "fast")]
    assert found == [auto, small, fast]


def test_arm_has_a_kernel_for_q2_0():
    packed = random_packed("ternary", 2, 576)
    assert plan_packed("t", packed, "auto", "aarch64").written == "Q2_0"
    assert plan_packed("t", packed, "auto", "x86_64").written == "Q4_0"


def test_reasons_name_what_kept_smaller_types_out():
    row = plan_packed("t", random_packed("ternary", 2, 576), "auto", "x86_64")
    assert "TQ2_0 needs rows divisible by 256, this one has 576" in row.why
    assert "Q2_0 (2.25 bits) decodes 18x slower" in row.why
    assert not row.departure and row.lossless and row.wanted == "Q4_0"
    row = plan_packed("t", random_packed("ternary", 2, 1536), "auto", "x86_64")
    assert "TQ1_0 (1.6875 bits) decodes 1.5x slower" in row.why


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [None, 256, 128, 64, 32])
@pytest.mark.parametrize("grid", ENCODINGS)
def test_what_is_written_fits(grid, group, layout):
    for columns in (256, 512, 768):
        if columns % (group or columns):
            continue
        packed = random_packed(grid, 2, columns, group)
        row = plan_packed("t", packed, layout)
        assert row.wanted == row.written and not row.departure
        assert misfit(grid, row.written, columns, packed.group) is None


def test_floats():
    exact = np.arange(64, dtype=np.float32).reshape(2, 32) / 8
    assert plan_float("t", exact, "F16").lossless
    rough = exact + np.float32(1e-5)
    assert not plan_float("t", rough, "F16").lossless
    assert plan_float("t", rough, "F32").lossless
    assert plan_float("t", rough, "Q8_0").written == "Q8_0"
    narrow = plan_float("t", exact[:, :20], "Q8_0")
    assert narrow.departure and narrow.written == "F16" and "divisible by 32" in narrow.why
    huge = plan_float("t", exact + 70000, "F16")
    assert huge.departure and huge.written == "F32"


def test_unknown_layout():
    with pytest.raises(UsageError, match="auto, portable, small, fast"):
        preference("int4", "smallest")


def test_the_table_groups_what_is_alike():
    rows = [
        plan_packed(f"blk.{i}.attn_{part}.weight", random_packed("int4", 2, 64, 32)) for i in range(3) for part in "qk"
    ]
    assert [len(members) for members in alike(rows)] == [6]
    for every, lines in ((False, 1), (True, 6)):
        out = io.StringIO()
        print_table(rows, Console(file=out, width=200), every)
        assert out.getvalue().count("Q4_0 ") == 2 * lines
    assert rows[0].to_dict()["bits_per_weight"] == 4.5
