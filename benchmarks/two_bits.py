"""SmolLM2-135M at 2 bits (2.25 with scales in llama.cpp's Q2_0), the same short budget as the demo."""

from __future__ import annotations

from compression_run import record
from edgewright.compression.settings import CompressSettings


def main() -> None:
    record(CompressSettings("smollm2-135m", bits=2.0, baselines=("rtn", "gptq"), evaluation_blocks=8), "two-bits")
