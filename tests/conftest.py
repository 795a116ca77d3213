"""Shared fixtures: a tiny random Llama for exactness, the real SmolLM2-135M for behaviour."""

from __future__ import annotations

import os
import signal

# A shell that starts the tests in the background has them ignore Ctrl-C; the tests of interrupts need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from toy_llama import make_tiny_llama


@pytest.fixture
def tiny_llama():
    return make_tiny_llama()


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of the bundled SmolLM2-135M-Instruct, shared: tests must not modify it."""
    import edgewright

    return edgewright.load("smollm2-135m")
