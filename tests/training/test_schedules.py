"""Schedules against their formulas."""

from __future__ import annotations

import math

import pytest

from edgewright.training import learning_rate_scale
from edgewright.training.schedules import SHAPES, schedule_name


def test_shapes_without_warmup() -> None:
    for step in range(10):
        assert learning_rate_scale("cosine", step, 10) == pytest.approx(math.cos(math.pi * step / 20) ** 2, rel=1e-12)
        assert learning_rate_scale("linear", step, 10) == 1 - step / 10
        assert learning_rate_scale("constant", step, 10) == 1.0


def test_the_shapes_of_the_papers() -> None:
    for step in range(100):
        assert learning_rate_scale("cosine-10", step, 100) == pytest.approx(
            0.1 + 0.9 * math.cos(math.pi * step / 200) ** 2
        )
        assert learning_rate_scale("linear-10", step, 100) == pytest.approx(1 - 0.009 * step)
        decayed = 1.0 if step <= 80 else (100 - step) / 20
        assert learning_rate_scale("constant-decay", step, 100) == pytest.approx(decayed)


@pytest.mark.parametrize("schedule", SHAPES)
def test_warmup_rises_from_above_zero_to_exactly_one(schedule: str) -> None:
    scales = [learning_rate_scale(schedule, step, 20, 4) for step in range(20)]
    assert scales[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=1e-15)
    assert all(0 < scale <= 1 for scale in scales)
    assert scales[4:] == sorted(scales[4:], reverse=True)
    assert scales[4:] == [learning_rate_scale(schedule, step, 16) for step in range(16)]


def test_a_function_is_a_schedule() -> None:
    assert learning_rate_scale(lambda step, steps: step / steps, 7, 12, 2) == 0.5
    assert schedule_name(math.sqrt) == "math.sqrt"
