"""Wall time of `edgewright compress` without training, start of the process included, and of loading the model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import save

from edgewright.measure.report import Report


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    report = Report("End-to-end wall time, SmolLM2-135M")
    loads = sorted(float(subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True).stdout)
                   for _ in range(3))  # fmt: skip
    report.add("load", loads[1], n=3, unit="s", subject="edgewright.load")
    for method in ("rtn", "mse", "gptq"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["-m", "edgewright", "compress", "smollm2-135m", "--bits", "4", "--method", method]
            report.add("files_only", seconds(*arguments, "--files-only", "--output", str(Path(folder) / "run")),
                       subject=method, unit="s", n=1)  # fmt: skip
    report.print_table()
    print(save(report, "end_to_end"))


LOAD = """
import time
import torch, transformers, edgewright
from transformers import LlamaForCausalLM
began = time.perf_counter()
edgewright.load("smollm2-135m")
print(time.perf_counter() - began)
"""
