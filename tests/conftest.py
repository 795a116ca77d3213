"""Shared fixtures: a tiny random Llama for exactness, the real SmolLM2-135M for behaviour."""

from __future__ import annotations

import os
import signal
from typing import Any

# A shell that starts the tests in the background has them ignore Ctrl-C; the tests of interrupts need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # of a worker and of every process that a test starts

import pytest
import torch

from tests.toy_llama import make_tiny_llama

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write what is measured into golden.json; say why in the commit"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file, or of one recipe of the contract, share fixtures: one worker runs them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, _test = nodeid.partition("::")
            return nodeid.partition("[")[2] or file if "contract" in file else file

    return ByFile(config, log)


@pytest.fixture
def tiny_llama():
    return make_tiny_llama()


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of the bundled SmolLM2-135M-Instruct, shared: tests must not modify it."""
    import edgewright

    return edgewright.load("smollm2-135m")
