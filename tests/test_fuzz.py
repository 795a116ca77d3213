"""Damaged files for every reader (see benchmarks/fuzz.py), for a fixed time and seed; no reader opens a pickle."""

from __future__ import annotations

import _pickle
import ast
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from tests.pickle_guard import guard

SECONDS = 60
SOURCES = Path(__file__).resolve().parents[1] / "src" / "edgewright"
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("torch", "hub"), ("torch", "jit")}


@pytest.fixture(scope="module")
def fuzzed() -> subprocess.CompletedProcess[str]:
    """In a process of its own: it forks, for which it must have one thread."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz.py"
    command = [sys.executable, str(script), "--seconds", str(SECONDS)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 240, check=False)


def test_damaged_files_give_typed_errors(fuzzed: subprocess.CompletedProcess[str]) -> None:
    assert fuzzed.returncode == 0, fuzzed.stdout[-8000:] + fuzzed.stderr[-2000:]
    count = int(fuzzed.stdout.splitlines()[-1].split()[1])
    assert count >= 150, f"only {count} inputs in {SECONDS} s"


def test_no_reader_opens_a_pickle(fuzzed: subprocess.CompletedProcess[str]) -> None:
    """Every input, damaged or not, is read under `pickle_guard`; what torch.load is given is told at the end."""
    told = [line for line in fuzzed.stdout.splitlines() if line.startswith("read by torch's weights-only reader")]
    assert told == ["read by torch's weights-only reader: pytorch_model.bin"]


def test_the_guard_sees_unpicklers(tmp_path: Path) -> None:
    data = pickle.dumps(OrderedDict(a=1), 2)
    torch.save({"w": torch.ones(2)}, tmp_path / "w.bin")
    with guard() as seen:
        with pytest.raises(AssertionError):
            pickle.loads(data)
        with pytest.raises(AssertionError, match="weights_only"):
            torch.load(tmp_path / "w.bin")
        assert not seen.unpickled and len(seen.violations) == 2
        _pickle.Unpickler(io.BytesIO(data)).load()  # the one in C, past the names of the module
        assert len(seen.violations) == 3
        torch.load(tmp_path / "w.bin", weights_only=True)
        assert len(seen.violations) == 3 and seen.unpickled == 1
    assert pickle.loads(data) == OrderedDict(a=1)


def test_only_these_modules_name_an_unpickler() -> None:
    """`measure/memory.py` reads what its own child has written into its own private folder."""
    named = set()
    for file in SOURCES.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if not any(word in text for word in (*PICKLERS, *(".".join(call) for call in LOADERS))):
            continue
        for node in ast.walk(ast.parse(text)):
            where = str(file.relative_to(SOURCES))
            if isinstance(node, ast.Import):
                named |= {(where, alias.name) for alias in node.names if alias.name.split(".")[0] in PICKLERS}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
                named.add((where, node.module))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (node.value.id, node.attr) in LOADERS:
                    named.add((where, f"{node.value.id}.{node.attr}"))
    assert named == {("measure/memory.py", "pickle"), ("models/efficientnet_lite.py", "torch.load")}


def test_json_is_parsed_where_its_errors_are_caught() -> None:
    """`io.json_file.read_json` does; what calls the parser itself stands in a try, or parses what we have just made."""
    bare = set()
    for file in SOURCES.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "json.load" not in text:
            continue
        tree = ast.parse(text)
        guarded = {node for part in ast.walk(tree) if isinstance(part, ast.Try) for node in ast.walk(part)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load"):
                made = ast.unparse(node.args[0]).partition("(")[0].rpartition(".")[2]
                if node not in guarded and made not in ("dumps", "to_str", "to_json_string"):
                    bare.add(str(file.relative_to(SOURCES)))
    # the answers of our own children, a file of the package, and a header that safetensors has just made
    assert bare == {
        "runtime/child_check.py",
        "runtime/confined.py",
        "systems/catalogue.py",
        "training/checkpoint/shards.py",
    }
