"""Kill commands at every rename and at random times, finish them, compare with runs that nothing disturbed.

python benchmarks/kills.py [JOB...] [--renames N] [--times N]    # results/kills.csv, its rows of these jobs
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgewright.measure.report import Report
from results import RESULTS, load, save
from tests.kill_jobs import JOBS
from tests.kills import Outcome, kill_everywhere


def keep(name: str, outcome: Outcome) -> None:
    """Put the rows of one job into results/kills.csv; those of the others stay."""
    report = Report("kills")
    if (RESULTS / "kills.csv").exists():
        for row in load("kills").rows:
            if row.subject != name:
                report.add(row.metric, row.value, subject=row.subject)
    report.add("kills", outcome.kills, subject=name)
    report.add("faults", len(outcome.faults), subject=name)
    report.add("files_equal_byte_for_byte", outcome.equal_files, subject=name)
    report.add("files_with_times_in_them", outcome.other_files, subject=name)
    save(report, "kills")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"some of {', '.join(JOBS)} (default: all)")
    parser.add_argument("--times", type=int, default=20, help="random times for each job (default 20)")
    parser.add_argument("--renames", type=int, help="kill points at renames, spread evenly (default: all)")
    args = parser.parse_args()
    faults = 0
    for name in args.jobs or JOBS:
        with tempfile.TemporaryDirectory() as folder:
            outcome = kill_everywhere(JOBS[name], Path(folder) / name, renames=args.renames, times=args.times)
        faults += len(outcome.faults)
        print(f"{name}: {outcome.kills} kills, {len(outcome.faults)} faults", flush=True)
        for fault in outcome.faults:
            print(f"  {fault}", flush=True)
        if args.renames is None:
            keep(name, outcome)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
