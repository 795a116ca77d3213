"""pytorch_model.bin: torch's restricted unpickler reads tensors; every other pickle is refused and runs nothing."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import edgewright
from edgewright.errors import EdgewrightError, FormatError, UsageError
from edgewright.pruning.cut_folder import save_checkpoint
from tests.fuzz_runs import hostile_pickles, write_pickle
from tests.pickle_guard import guard
from tests.toy_llama import make_byte_tokenizer, make_tiny_llama

NAMES = sorted(hostile_pickles(Path("mark")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = make_tiny_llama(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    save_checkpoint(model, make_byte_tokenizer(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    return tmp_path / "model"


def test_tensors_are_read_by_the_restricted_unpickler(folder: Path) -> None:
    with guard() as seen:
        model, _ = edgewright.load(folder)
    assert [Path(file).name for file in seen.files] == ["pytorch_model.bin"] and seen.unpickled == 1
    assert not seen.violations
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items() if name in stored)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_pickle_is_refused_and_runs_nothing(name: str, folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "code-ran"
    write_pickle(folder / "pytorch_model.bin", hostile_pickles(mark)[name])
    began = time.monotonic()
    with guard() as seen, pytest.raises(EdgewrightError) as caught:
        edgewright.load(folder)
    assert not mark.exists() and not seen.violations
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 4000
    assert time.monotonic() - began < 10


def test_the_exploits_do_run_in_a_reader_that_trusts_them(folder: Path, tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    for name in ("reduce", "global", "instance", "object", "build"):
        mark = tmp_path / name
        write_pickle(folder / "pytorch_model.bin", hostile_pickles(mark)[name])
        torch.load(folder / "pytorch_model.bin", weights_only=False)
        assert mark.exists(), name


def test_other_forms_are_refused(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    data = file.read_bytes()
    file.write_bytes(hostile_pickles(folder / "code-ran")["reduce"])  # the form of torch before 1.6
    with pytest.raises(UsageError, match="a pickle, which can run any code"):
        edgewright.load(folder)
    file.write_bytes(data)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:  # a zip bomb
        for name, content in entries.items():
            archive.writestr(name, content + b"\0" * 200_000)
    with pytest.raises(FormatError, match="compressed inside"):
        edgewright.load(folder)
    assert not (folder / "code-ran").exists()
