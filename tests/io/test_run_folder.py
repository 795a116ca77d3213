"""Folders of others are refused before anything in them is touched; tensors are written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from edgewright import cli
from edgewright.errors import FormatError, OutputError, UsageError
from edgewright.io.atomic import atomic_directory, atomic_file
from edgewright.io.run_folder import MARKER, claim_folder, difference, holds_run, require_empty, working_in
from edgewright.io.temporaries import OLD, PART, is_temporary, prefix, sweep
from edgewright.io.tensors import load_tensors, read_tensors, save_tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        ["train", "dlrm", "--data", "log.csv"],
        ["pretrain", "1e4", "--vocab", "300", "--context", "32", "--steps", "2"],
        ["compress", "efficientnet-lite0", "--bits", "8"],
    ],
    ids=lambda words: words[0],
)
def test_an_output_with_somebodys_files_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log.csv").write_text("label,I1,C1\n" + "".join(f"{i % 2},{i},c{i % 5}\n" for i in range(200)))
    for name in ("thesis/model/chapter.txt", "thesis/notes.txt", "thesis/training/log.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("mine")
    before = contents(Path("thesis"))
    assert cli.main([*command, "--output", "thesis"]) == 2
    said = capsys.readouterr().err
    assert "thesis is not an empty folder and holds no run of" in said and "choose another --output" in said
    assert contents(Path("thesis")) == before


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    claim_folder(tmp_path / "run", "pretrain", write=False)  # another process than the first: nothing is written
    assert not (tmp_path / "run").exists()
    claim_folder(tmp_path / "run", "pretrain")
    claim_folder(tmp_path / "run", "pretrain")
    with pytest.raises(UsageError, match=r"holds another run \(command='pretrain', not 'train dlrm'\)"):
        claim_folder(tmp_path / "run", "train dlrm")
    (tmp_path / "run" / MARKER).write_text("{")
    with pytest.raises(FormatError, match="is not JSON"):
        claim_folder(tmp_path / "run", "pretrain")
    (tmp_path / "killed").mkdir()
    left = killed_name(MARKER)
    (tmp_path / "killed" / left).write_text("")
    claim_folder(tmp_path / "killed", "pretrain")
    assert [entry.name for entry in (tmp_path / "killed").iterdir()] == [MARKER]


def test_a_run_is_known_by_its_record(tmp_path: Path) -> None:
    record = {"stages": [{"name": "a", "rate": 1.0}, {"name": "b"}], "data": {"sizes": (1, 2)}, "seed": 0}
    assert not holds_run(tmp_path, "run.json", record, "walk") and not list(tmp_path.iterdir())
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert holds_run(tmp_path, "run.json", record, "walk")
    assert holds_run(tmp_path, "run.json", record | {"young": 3}, "walk", defaults={"young": 3})
    changes: dict[str, dict[str, Any]] = {
        "seed=0, not 1": {"seed": 1},
        "stages.0.rate=1, not 0.5": {"stages": [{"name": "a", "rate": 0.5}, {"name": "b"}]},
        "stages.1.name='b', not None": {"stages": [{"name": "a", "rate": 1.0}]},
        "stages.1.name='b', not 'c'": {"stages": [{"name": "a", "rate": 1}, {"name": "c"}]},
        "data.sizes=[1, 2], not [2, 1]": {"data": {"sizes": [2, 1]}},
        "seed=0, not None": {"seed": None},
        "young=None, not 4": {"young": 4},
    }
    for sentence, change in changes.items():
        with pytest.raises(UsageError, match=rf"holds another run \({re.escape(sentence)}\); choose another --output"):
            holds_run(tmp_path, "run.json", {**record, **change}, "walk")
    for broken in ("{", "[]"):
        (tmp_path / "run.json").write_text(broken)
        with pytest.raises(FormatError, match="run.json"):
            holds_run(tmp_path, "run.json", record, "walk")
    assert difference({"a": 1.5, "long": "x" * 99}, {"a": 1.5, "long": ""}) == f"long='{'x' * 56}..., not ''"
    assert difference({"a": {}, "b": None}, {"a": {}}) == ""


def test_an_output_must_be_empty_where_it_is_written_at_once(tmp_path: Path) -> None:
    require_empty(tmp_path / "new")
    (tmp_path / killed_name("model")).mkdir()
    require_empty(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UsageError, match="is not an empty folder; choose another --output"):
            require_empty(output)
        with pytest.raises(UsageError, match="is not an empty folder and holds no walk"):
            holds_run(output, "run.json", {}, "walk")


def killed_name(name: str, kind: str = PART) -> str:
    """What a process that runs no longer has left of a file."""
    return prefix(name).replace(f"-{os.getpid()}-", "-4999999999-") + "abc" + kind


def test_what_killed_processes_leave_is_swept(tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    for folder in (tmp_path, below):
        (folder / killed_name("a.gguf")).write_text("half")
        (folder / (prefix("a.gguf") + "abc" + PART)).write_text("this process writes it")
        (folder / ".a.gguf.part").write_text("of somebody else")
    (tmp_path / killed_name("model", OLD)).mkdir()
    (tmp_path / killed_name("model", OLD) / "weights").write_text("whole")
    (tmp_path / "link").symlink_to(below)
    with atomic_file(tmp_path / "b.gguf"):
        pass
    assert (tmp_path / killed_name("a.gguf")).exists()  # another file's
    with atomic_file(tmp_path / "a.gguf"):
        pass
    assert not (tmp_path / killed_name("a.gguf")).exists() and (below / killed_name("a.gguf")).exists()
    sweep(tmp_path)
    assert not (below / killed_name("a.gguf")).exists()
    assert (tmp_path / "model" / "weights").read_text() == "whole"  # killed between its two renames
    for folder in (tmp_path, below):
        assert (folder / (prefix("a.gguf") + "abc" + PART)).exists() and (folder / ".a.gguf.part").exists()


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    code = f"from edgewright.io.run_folder import working_in\nwith working_in({str(tmp_path / 'run')!r}): pass"
    with working_in(tmp_path / "run"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is working in" in done.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert not (tmp_path / "run").exists()  # nothing came of it
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="file is a file"), working_in(tmp_path / "file"):
        pass


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a").write_text("old")

    def write(ours: bool = False) -> None:
        with atomic_directory(tmp_path / "m", ours) as folder:
            (folder / "a").write_text("new")

    write()
    assert contents(tmp_path / "m") == {"a": b"new"}
    (tmp_path / "m" / "letter").write_text("mine")
    with pytest.raises(UsageError, match="holds 'letter', which would be lost"):
        write()
    assert contents(tmp_path / "m") == {"a": b"new", "letter": b"mine"}
    write(ours=True)
    assert contents(tmp_path / "m") == {"a": b"new"}
    (tmp_path / "m").rename(tmp_path / "real")
    (tmp_path / "m").symlink_to(tmp_path / "real")
    write(ours=True)
    assert sorted(os.listdir(tmp_path)) == ["m", "real"] and not (tmp_path / "m").is_symlink()


def test_tensors_come_back_and_share_no_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tensors = {"a": base, "tied": base, "view": base[3:5], "turned": base.view(3, 4).T, "half": base.half()}
    save_tensors(tmp_path / "t.safetensors", tensors, {"about": "x"})
    read, texts = read_tensors(tmp_path / "t.safetensors")
    assert texts == {"about": "x"} and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert all(torch.equal(a, tensors[name]) for name, a in load_tensors(tmp_path / "t.safetensors").items())


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # as tokenizers says it
    ],
)
def test_a_full_disk_is_our_error_whoever_says_so(error: Exception, tmp_path: Path) -> None:
    for writer, name in ((atomic_file, "f"), (atomic_directory, "d")):
        with pytest.raises(OutputError, match="No space left on device"), writer(tmp_path / name):
            raise error
    assert not list(tmp_path.iterdir())
    for other in (ValueError("(os error x)"), RuntimeError("a bug (os error 28)")):
        with pytest.raises(type(other)), atomic_file(tmp_path / "f"):
            raise other
    assert not list(tmp_path.iterdir())


def test_what_a_kill_leaves_of_a_tensor_file_is_swept(tmp_path: Path) -> None:
    """safetensors makes a temporary file of its own beside its target: ours is a folder whose name is known."""
    script = (
        "import os, sys, torch, safetensors.torch as st\n"
        "from edgewright.io.tensors import save_tensors\n"
        "def kill(tensors, path, metadata):\n"
        "    open(os.path.join(os.path.dirname(path), '.tmpAbC123'), 'w').close()\n"
        "    os._exit(9)\n"
        "st.save_file = kill\n"
        "save_tensors(sys.argv[1], {'a': torch.ones(2)})\n"
    )
    path = tmp_path / "t.safetensors"
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 9
    assert all(is_temporary(entry.name) for entry in tmp_path.iterdir()) and list(tmp_path.iterdir())
    save_tensors(path, {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == [path]
