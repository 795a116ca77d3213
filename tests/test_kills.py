"""Killed at renames and at random times, a command that is run again leaves the files of a run that nothing disturbed.

All kill points of all jobs: `python benchmarks/kills.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

# In a process of its own: forks of one in which torch has started threads would hang.
CODE = """
import sys
from pathlib import Path
from tests.kill_jobs import JOBS
from tests.kills import kill_everywhere
name, folder, renames, times = sys.argv[1:]
outcome = kill_everywhere(JOBS[name], Path(folder), renames=int(renames), times=int(times))
print(outcome.kills, outcome.faults)
"""


@pytest.mark.parametrize(
    ("name", "renames", "times"), [("compress-own-text", 3, 1), ("pretrain", 3, 1), ("prune", 2, 0)]
)
def test_a_killed_command_finishes(name: str, renames: int, times: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, name, str(tmp_path / "jobs"), str(renames), str(times)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, _, faults = done.stdout.strip().splitlines()[-1].partition(" ")
    assert int(kills) >= renames and faults == "[]", faults
