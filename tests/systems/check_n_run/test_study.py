"""The measurements behind the recipe."""

from __future__ import annotations

from pathlib import Path

from edgewright.systems.check_n_run.study import LOCK_BYTES, held_bytes
from edgewright.training.checkpoint.files import LOCK, LocalFiles


def test_held_bytes_do_not_depend_on_who_holds_the_lock(tmp_path: Path, monkeypatch) -> None:
    for process in (7, 12345):
        root = tmp_path / str(process)
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        files = LocalFiles(root)
        held = files.lock()
        (root / "data").write_bytes(bytes(100))
        assert (root / LOCK).stat().st_size > 0 and held_bytes(root) == 100 + LOCK_BYTES
        files.unlock(held)
