"""`edgewright prune`: the folder it leaves, its table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import edgewright
from edgewright import cli
from tests.toy_llama import make_tiny_llama

TEXT = "\n\n".join(f"Line {i} of a text that tells how {i} birds flew over the {i % 7} hills." for i in range(90))


@pytest.fixture
def folder(tmp_path: Path, smollm2) -> Path:
    """A checkpoint of four random blocks with a real tokenizer."""
    path = tmp_path / "model"
    model = make_tiny_llama(vocab_size=49152, hidden_size=32, num_hidden_layers=4)
    model.save_pretrained(path)
    smollm2[1].save_pretrained(path)
    (tmp_path / "text.txt").write_text(TEXT)
    return path


def prune(folder: Path, *arguments: str) -> int:
    fixed = ["--text", str(folder.parent / "text.txt"), "--samples", "4", "--length", "16", "--blocks", "2"]
    return cli.main(["prune", str(folder), *fixed, *arguments])


@pytest.mark.parametrize("iterative", [False, True])
def test_it_leaves_a_smaller_checkpoint(folder: Path, iterative: bool, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder.parent / "out"
    more = ["--iterative"] if iterative else []
    assert prune(folder, "--layers", "3", "--mlp", "64", "--output", str(output), *more) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "blocks left out" in shown
    model = AutoModelForCausalLM.from_pretrained(output)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (3, 64)
    ours, _ = edgewright.load(output)
    tokens = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, ours(tokens).logits)
    assert (output / "importance.png").stat().st_size > 0
    report = json.loads((output / "report.json").read_text())
    value = {(row["metric"], row["subject"]): row["value"] for row in report["rows"]}
    assert value["blocks", "original"] == 4 and value["blocks", "pruned"] == 3
    assert value["parameters", "pruned"] == sum(p.numel() for p in model.parameters())
    assert value["kl", "original"] == 0 < value["kl", "pruned"]
    assert sum(metric == "block_importance" for metric, _ in value) == 4


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(folder, "--mlp", "128", "--json", "--output", str(folder.parent / "out")) == 0
    printed = capsys.readouterr()
    rows = {(row["metric"], row["subject"]): row["value"] for row in json.loads(printed.out)["rows"]}
    assert rows["kl", "pruned"] == 0 and rows["blocks", "pruned"] == 4  # keeping all is a no-op
    assert printed.err == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "nothing to prune"),
        (("--layers", "0"), "choose a number from 1 to 4"),
        (("--layers", "5"), "choose a number from 1 to 4"),
        (("--mlp", "100"), "not a multiple of 32"),
        (("--mlp", "256"), "choose 1 to that many"),
        (("--layers", "2", "--protect", "a"), "separated by commas"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    folder: Path, arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder.parent / "out"
    assert prune(folder, *arguments, "--output", str(output)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint in error and not output.exists()


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(folder, "--layers", "3", "--output", str(folder)) == 2
    assert "is not an empty folder" in capsys.readouterr().err
