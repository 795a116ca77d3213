"""First runs in a child: crashes, hangs and silence become FormatError, typed errors stay what they are."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from edgewright.errors import FormatError, Unsupported
from edgewright.runtime import child_check
from edgewright.runtime.child_check import first_run_in_child

CASES = "child_cases"


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    path = tmp_path / "file.bin"
    path.write_bytes(b"abc")
    return path


def test_the_result_comes_back_and_a_second_time_nothing_is_run(file):
    assert first_run_in_child(CASES, "size", file) == {"bytes": 3}
    assert first_run_in_child(CASES, "size", file) is None
    file.write_bytes(b"other")
    assert first_run_in_child(CASES, "size", file) == {"bytes": 5}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("crash", "SIGSEGV"),
        ("leave", "exit code 0"),
        ("complain", "last line"),
        ("swallow", "asks for more than 8192 MiB"),
    ],
)
def test_what_ends_a_child_is_one_sentence_here(function, words, file):
    with pytest.raises(FormatError, match=words):
        first_run_in_child(CASES, function, file)


def test_typed_errors_arrive_as_they_are(file):
    with pytest.raises(Unsupported, match="of another kind"):
        first_run_in_child(CASES, "refuse", file)
    with pytest.raises(FormatError, match="cannot read"):
        first_run_in_child(CASES, "size", file.with_name("none"))


def test_time_without_a_processor_does_not_count(file, monkeypatch):
    asked = []

    def kept_waiting(pid):
        asked.append(pid)
        return 30.0

    monkeypatch.setattr(child_check, "_kept_waiting", kept_waiting)
    assert first_run_in_child(CASES, "rest", file, timeout=1) == "rested"
    assert asked


def test_a_child_that_hangs_is_ended(file):
    start = time.perf_counter()
    with pytest.raises(FormatError, match="within 1 s"):
        first_run_in_child(CASES, "hang", file, timeout=1)
    assert time.perf_counter() - start < 20
