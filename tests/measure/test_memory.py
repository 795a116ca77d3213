"""Peak memory sees what was allocated, also when it is gone at the end; failures of the child are told."""

from __future__ import annotations

import mmap
import os
import time

import numpy as np
import pytest

from edgewright.errors import EdgewrightError, UsageError
from edgewright.measure import memory
from edgewright.measure.memory import current_rss, peak_memory, peak_rss
from tests.toy_calls import allocate, die, fail, unpicklable

MB = 2**20


def test_child_peak_follows_the_allocation():
    small, large = peak_memory(allocate, 8), peak_memory(allocate, megabytes=136)
    assert (small.result, large.result) == (8, 136)
    # 8 MB: page tables, allocator and interpreter differ a little from process to process
    assert abs((large.peak - small.peak) - 128 * MB) < 8 * MB
    assert 0 < large.baseline < large.peak - 128 * MB


def test_failures_of_the_child_are_told():
    with pytest.raises(UsageError, match="on purpose"):
        peak_memory(fail)
    with pytest.raises(EdgewrightError, match="died with code 7"):
        peak_memory(die)
    with pytest.raises(EdgewrightError, match="cannot be sent back"):
        peak_memory(unpicklable)
    with pytest.raises(EdgewrightError, match="longer than 0.5 s"):
        peak_memory(time.sleep, 60, timeout=0.5)
    with pytest.raises(UsageError, match="top level of a module"):
        peak_memory(lambda: None)


@pytest.mark.parametrize("kernel_counts", [True, False])
def test_peak_of_a_block(kernel_counts, monkeypatch):
    if not kernel_counts:
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    before = current_rss()
    with peak_rss(0.001) as peak:
        block = mmap.mmap(-1, 96 * MB)  # of the system: numpy may be given heap that was resident before
        np.frombuffer(block, dtype=np.uint8).fill(1)
        time.sleep(0.05)
        block.close()
    assert peak.bytes >= before + 90 * MB  # 6 MB: the collector may run meanwhile
    with peak_rss() as after:
        pass
    assert after.bytes < peak.bytes - 80 * MB
    assert peak.exact or not kernel_counts or not os.path.exists("/proc/self/clear_refs")
