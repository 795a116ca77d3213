"""The machine's description and its read bandwidth: whole reads, and faster than copying."""

from __future__ import annotations

import time

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.measure.machine import BandwidthProbe, machine, read_bandwidth, usable_cores, versions

BUFFER = 64 * 2**20


def test_description_is_complete():
    told = machine()
    assert told["cpu"] and told["cores"] == usable_cores() >= 1 and told["memory_gb"] > 0
    assert versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # +cpu is not everywhere


@pytest.mark.parametrize("threads", [1, 2])
def test_reading_is_plausible_and_beats_copying(threads):
    probe = BandwidthProbe(threads, BUFFER)
    source = torch.ones(BUFFER // 8, dtype=torch.int64)
    target = torch.empty_like(source)
    read, copied = [], []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(30):
            read.append(probe.sample())
            start = time.perf_counter()
            target.copy_(source)
            copied.append(BUFFER / (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    # A copy moves two or three bytes for each one copied. The best of thirty, because other programs, tests beside this
    # one among them, share the machine.
    assert max(read) > max(copied)
    assert 1e8 < max(read) < 1e13


def test_memcmp_reads_the_whole_buffer():
    probe = BandwidthProbe(1, 2**20)
    assert "memcmp" in probe.readers  # every C library has it
    half = probe.nbytes // 2
    address = probe._buffer.data_ptr()
    assert probe._memcmp(address, address + half, half) == 0
    probe._buffer[-1] = 2
    assert probe._memcmp(address, address + half, half) != 0


def test_shares_cover_the_buffer_and_threads_are_put_back():
    before = torch.get_num_threads()
    got = read_bandwidth(3, repeats=3, buffer_bytes=1_000_003)
    assert got.n == 3 and got.unit == "B/s" and got.low <= got.median <= got.high
    assert torch.get_num_threads() == before
    assert BandwidthProbe(3, 1_000_003).nbytes % (3 * 16) == 0


def test_no_threads_is_refused():
    with pytest.raises(UsageError, match="at least 1, got 0"):
        BandwidthProbe(0, BUFFER)
