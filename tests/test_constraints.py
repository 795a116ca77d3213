"""The files in constraints/ agree with pyproject.toml: what they lock is what it allows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).resolve().parents[1]
LOCKS = sorted((PROJECT / "constraints").glob("py3*.txt"))


def project_requirements() -> dict[str, list[Requirement]]:
    """Extra ("" for none) -> what it asks for. Read without tomllib, which Python 3.10 lacks: two tables of strings."""
    text = (PROJECT / "pyproject.toml").read_text("utf-8")
    base = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    table = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    assert base and table
    lines = {"": base[1]} | dict(re.findall(r"^([\w-]+) = \[(.*)\]", table[1], re.MULTILINE))
    return {extra: [Requirement(one) for one in re.findall(r'"([^"]+)"', listed)] for extra, listed in lines.items()}


def locked(path: Path) -> dict[str, str]:
    lines = (line.split("==") for line in path.read_text("utf-8").splitlines() if "==" in line and line[0] != "#")
    return {canonicalize_name(name): version for name, version in lines}


@pytest.fixture(scope="module")
def requirements() -> Any:
    found = project_requirements()
    assert len(found[""]) > 8 and {"executorch", "onnx", "test"} <= found.keys()
    return found


@pytest.mark.parametrize("path", [*LOCKS, PROJECT / "constraints" / "oldest.txt"], ids=lambda path: path.name)
def test_locked_versions_are_allowed(path: Path, requirements: dict[str, list[Requirement]]) -> None:
    versions = locked(path)
    for extra, wanted in requirements.items():
        for one in wanted if extra != "optimizer-peers" else ():  # bring CUDA libraries: in no locked environment
            name = canonicalize_name(one.name)
            if name == "edgewright":
                continue
            assert name in versions, f"{path.name} does not lock {one}; make lock"
            assert one.specifier.contains(versions[name], prereleases=True), f"{path.name}: {name} {versions[name]}"


def test_the_oldest_are_the_lower_bounds(requirements: dict[str, list[Requirement]]) -> None:
    """Of what users install, each at its bound; where two extras ask for one package, at the higher."""
    versions, bounds = locked(PROJECT / "constraints" / "oldest.txt"), {}
    for extra in ("", "llamacpp", "executorch", "onnx", "vision", "recsys"):
        for one in requirements[extra]:
            (lowest,) = (Version(part.version) for part in one.specifier if part.operator == ">=")
            name = canonicalize_name(one.name)
            bounds[name] = max(lowest, bounds.get(name, lowest))
    assert {name: Version(versions[name]) for name in bounds} == bounds


def test_every_supported_python_is_locked() -> None:
    text = (PROJECT / "pyproject.toml").read_text("utf-8")
    assert 'requires-python = ">=3.10"' in text
    assert {"py310.txt", "py311.txt", "py312.txt", "py313.txt", "py314.txt"} <= {path.name for path in LOCKS}
