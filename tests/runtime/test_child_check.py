"""First runs in a child: crashes, hangs and silence become FormatError, typed errors stay what they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgewright.errors import FormatError, Unsupported
from edgewright.runtime import child_check
from edgewright.runtime.child_check import first_run_in_child

CASES = "tests.runtime.child_cases"


@pytest.fixture
def file(tmp_path, monkeypatch):
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

    monkeypatch.setattr(child_check, "kept_waiting", kept_waiting)
    assert first_run_in_child(CASES, "rest", file, timeout=1) == "rested"
    assert asked


def test_a_child_that_hangs_is_ended(file):
    start = time.perf_counter()
    with pytest.raises(FormatError, match="within 1 s"):
        first_run_in_child(CASES, "hang", file, timeout=1)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("function", ["spin", "spin_without_signal"])
def test_a_child_ends_with_its_parent(function, file):
    """Killed, so that the parent cannot end anything; where the kernel does not tell the child, a pipe does."""
    code = (
        f"from edgewright.runtime.child_check import first_run_in_child as f; f({CASES!r}, {function!r}, {str(file)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    told = file.with_suffix(".pid")
    try:
        wait_for(lambda: told.exists() and told.read_text())
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    child = int(told.read_text())
    wait_for(lambda: not is_running(child))


def test_a_measured_child_ends_with_its_parent(file):
    code = (
        "from tests.runtime import child_cases; from edgewright.measure.memory import peak_memory as p; "
        f"p(child_cases.spin, {str(file)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    told = file.with_suffix(".pid")
    try:
        wait_for(lambda: told.exists() and told.read_text())
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    child = int(told.read_text())
    wait_for(lambda: not is_running(child))


def test_a_file_of_this_process_is_not_run_first(file):
    child_check.vouch(CASES, "crash", file)
    assert first_run_in_child(CASES, "crash", file) is None
    file.write_bytes(b"changed since")
    with pytest.raises(FormatError, match="SIGSEGV"):
        first_run_in_child(CASES, "crash", file)


def is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen within 30 s"
        time.sleep(0.05)
