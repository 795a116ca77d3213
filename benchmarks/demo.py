"""The main job at 4 bits, as `make demo` runs it: results/demo.csv and the README's picture."""

from __future__ import annotations

from compression_run import record
from edgewright.compression.settings import CompressSettings


def main() -> None:
    record(CompressSettings("smollm2-135m", bits=4.0), "demo")
