"""Wall time of `edgewright compress` without training, start of the process included, and of loading the model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgewright.measure.report import Report
from results import save


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def load_seconds() -> float:
    """Reading the bundled model in a fresh process, after the imports."""
    done = subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    report = Report("End-to-end wall time, SmolLM2-135M")
    loads = sorted(load_seconds() for _ in range(3))
    report.add("wall_time", loads[1], n=3, unit="s", subject="load")
    for method in ("rtn", "gptq"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["-m", "edgewright", "compress", "smollm2-135m", "--bits", "4", "--method", method]
            time_taken = seconds(*arguments, "--files-only", "--output", str(Path(folder) / "run"))
        report.add("wall_time", time_taken, subject=f"compress --method {method}", unit="s", n=1)
    report.print_table()
    print(save(report, "end-to-end"))


LOAD = """
import time
import torch, transformers, edgewright
from transformers import LlamaForCausalLM
began = time.perf_counter()
edgewright.load("smollm2-135m")
print(time.perf_counter() - began)
"""
