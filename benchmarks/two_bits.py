"""SmolLM2-135M at 2 bits (2.25 with scales) with a training budget of about half an hour on 2 cores."""

from __future__ import annotations

from compression_run import record

from edgewright.compression.settings import Budget, CompressSettings


def main() -> None:
    record(CompressSettings("smollm2-135m", bits=2.0, budget=Budget(64)), "two_bits")
