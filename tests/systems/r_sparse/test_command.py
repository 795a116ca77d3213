"""`edgewright sparsify`: the folder it leaves, its table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import edgewright
from edgewright import cli
from edgewright.evaluation.language import evaluate_language
from edgewright.io.text import load_texts, token_blocks
from edgewright.systems.r_sparse.folder import load_rsparse
from edgewright.systems.r_sparse.model import dense_logits, sparse_logits
from tests.toy_llama import make_byte_tokenizer, make_tiny_llama

TEXT = "\n\n".join(f"Line {i} of a text that tells how {i} birds flew over the {i % 7} hills." for i in range(90))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two random blocks with a tokenizer of bytes."""
    path = tmp_path / "model"
    make_tiny_llama(vocab_size=512, hidden_size=32).save_pretrained(path)
    make_byte_tokenizer().save_pretrained(path)
    (tmp_path / "text.txt").write_text(TEXT)
    return path


def sparsify(folder: Path, *arguments: str) -> int:
    fixed = ["--text", str(folder.parent / "text.txt"), "--samples", "4", "--length", "24", "--blocks", "2"]
    return cli.main(["sparsify", str(folder), *fixed, *arguments])


def rows(report: dict) -> dict:
    return {(row["metric"], row["subject"]): row["value"] for row in report["rows"]}


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--rho", "0.8", "--score", "magnitude"),
        ("--plan", "default", "--sequential", "--share-mask"),
        ("--plan", "teal"),
        ("--plan", "search", "--evals", "4"),
    ],
)
def test_it_leaves_a_sparse_model(folder: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    output = folder.parent / "out"
    assert sparsify(folder, "--sparsity", "0.4", "--output", str(output), *more) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "layer_reads" in shown
    assert (output / "sparsity.png").stat().st_size > 0 and not list(folder.parent.rglob("*.part"))
    values = rows(json.loads((output / "report.json").read_text()))
    assert values["kl", "dense"] == 0 < values["kl", "sparse"] and values["layer_reads", "dense"] == 1
    assert 0.45 < values["layer_reads", "sparse"] < 0.75  # few tokens of a random model: far from the target of 0.6
    model, tokenizer, config = load_rsparse(output)
    assert config.sparsity == 0.4
    blocks = token_blocks(load_texts(folder.parent / "text.txt", "evaluation"), tokenizer, 24, 2)
    again = evaluate_language({"sparse": sparse_logits(model)}, blocks, reference=dense_logits(model), progress=False)
    assert again["sparse"].kl == values["kl", "sparse"]
    dense, original = edgewright.load(output)[0], edgewright.load(folder)[0]
    with torch.no_grad():
        assert torch.equal(dense(blocks).logits, original(blocks).logits)


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sparsify(folder, "--json", "--output", str(folder.parent / "out")) == 0
    printed = capsys.readouterr()
    assert rows(json.loads(printed.out))["layer_reads", "sparse"] < 1 and printed.err == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--sparsity", "1"), "--sparsity 1.0; it must be"),
        (("--rho", "-1"), "--rho -1.0; it must be"),
        (("--score", "size"), "--score size; it must be one of"),
        (("--sparsity", "0.99", "--rho", "0"), "would read nothing"),
        (("--samples", "1"), "24 tokens of calibration text are too few"),
        (("--resume", "scores.json"), "--resume belongs to --plan search"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    folder: Path, arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder.parent / "out"
    assert sparsify(folder, *arguments, "--output", str(output)) == 2
    assert complaint in capsys.readouterr().err.strip().splitlines()[-1] and not output.exists()


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sparsify(folder, "--output", str(folder)) == 2
    assert "is not an empty folder" in capsys.readouterr().err
