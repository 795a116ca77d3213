"""`edgewright stem convert|edit`: what they leave, print and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import edgewright
from edgewright import cli
from edgewright.systems.stem.edit import load_edit
from edgewright.systems.stem.layer import stem_blocks
from tests.toy_llama import make_byte_tokenizer, make_tiny_llama

TEXT = "\n\n".join(f"Line {i} of a text that tells how {i} birds flew over the {i % 7} hills." for i in range(90))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    make_tiny_llama(num_hidden_layers=3).save_pretrained(path)
    make_byte_tokenizer().save_pretrained(path)
    (tmp_path / "text.txt").write_text(TEXT)
    return path


def convert(folder: Path, *arguments: str) -> int:
    fixed = ["--calib", str(folder.parent / "text.txt"), "--samples", "8", "--length", "32", "--blocks", "2"]
    return cli.main(["stem", "convert", str(folder), *fixed, "--output", str(folder.parent / "out"), *arguments])


def test_convert_then_edit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(folder, "--layers", "1,2", "--json") == 0
    rows = {(r["metric"], r["subject"]): r["value"] for r in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["kl", "dense"] == 0 < rows["kl", "stem"] and rows["stem_layers", "stem"] == 2
    out = folder.parent / "out"
    model, tokenizer = edgewright.load(out)
    assert sorted(stem_blocks(model)) == [1, 2] and (out / "stem-layer-2.safetensors").is_file()

    prompts = folder.parent / "prompts.txt"
    prompts.write_text("birds over X\nno name here\n")
    file = folder.parent / "edit.safetensors"
    arguments = [
        "stem",
        "edit",
        str(out),
        "--source",
        "X",
        "--target",
        "Q",
        "--test",
        str(prompts),
        "--output",
        str(file),
    ]
    assert cli.main([*arguments, "--json", "--tokens", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["contextual"] is None for row in printed["prompts"]] == [False, True]
    assert "their rows change in every word" in printed["notes"][0]
    edit = load_edit(model, file)
    assert torch.equal(edit.ids, torch.tensor(sorted(set(tokenizer(" X", add_special_tokens=False)["input_ids"]))))
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_table_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(folder, "--dtype", "bf16") == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "STEM layers: 1 (counted from 0)" in shown


def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--layers", "0,1"], "layer 0 would be a STEM layer"),
        (["--layers", "half"], "--layers half of 3"),
        (["--layers", "1,x"], "--layers '1,x'"),
        (["--init", "best"], "--init best"),
    ):
        assert convert(folder, *arguments) == 2
        assert message in capsys.readouterr().err
        assert not (folder.parent / "out").exists()
    edit = ["stem", "edit", str(folder), "--source", "A", "--target", "B", "--output"]
    assert cli.main([*edit, str(folder.parent / "e.txt")]) == 2
    assert cli.main([*edit, str(folder.parent / "e.safetensors")]) == 2
    assert "has no STEM layers" in capsys.readouterr().err
