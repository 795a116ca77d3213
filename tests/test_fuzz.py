"""Damaged files for every reader (see benchmarks/fuzz.py), for a fixed time and seed; no reader opens a pickle."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_readers import READERS

SECONDS = 60


def test_damaged_files_give_typed_errors() -> None:
    """In a process of its own: it forks, for which it must have one thread."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz.py"
    command = [sys.executable, str(script), "--seconds", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 240, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    count = int(done.stdout.splitlines()[-1].split()[1])
    assert count >= 150, f"only {count} inputs in {SECONDS} s"


def test_no_reader_opens_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, reader in enumerate(READERS.values()):
        (tmp_path / str(number)).mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.build(tmp_path / str(number))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was opened")

    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for module in (torch, torch.serialization):
        monkeypatch.setattr(module, "load", refuse)
    for number, (name, reader) in enumerate(READERS.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                reader.read(tmp_path / str(number))
            except AssertionError as error:
                raise AssertionError(name) from error
