"""`edgewright pretrain`: from text files to a model that export and chat take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgewright.cli import main
from edgewright.commands.pretrain import read_config
from edgewright.io.text import LONGEST_DOCUMENT, TextFiles, builtin_documents
from edgewright.models.decoder.design import design_sweep
from tests import toy_pretrain as toy

SMALL = ["--context", "32", "--batch", "4", "--steps", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": text}) for text in toy.documents(40)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "more").mkdir()
    (folder / "more" / "b.txt").write_text("the dog ran\n\n" * 30)
    (folder / "more" / "empty.txt").write_text("")
    (folder / "more" / "picture.png").write_bytes(b"\x89")
    return [str(folder / "a.jsonl"), str(folder / "more")]


@pytest.fixture(scope="module")
def trained(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that has been run; the last of it is the folder."""
    output = tmp_path_factory.mktemp("trained") / "run"
    command = ["pretrain", "1e5", "--text", *texts, "--vocab", "320", *SMALL, "--prompt", "the cat"]
    assert main([*command, "--output", str(output)]) == 0
    return [*command, "--output", str(output)]


def test_train_export_and_chat(trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = Path(trained[-1])
    assert json.loads((output / "samples.jsonl").read_text().splitlines()[0])["prompt"] == "the cat"
    assert main(trained) == 0  # finished: read, not trained again
    shown = capsys.readouterr()
    assert "validation_loss" in shown.out and "LlamaForCausalLM" in shown.out
    assert "going on from step 3 of 3; 0 steps" in shown.err and "speed" not in shown.out
    rows = {row["metric"]: row["value"] for row in json.loads((output / "report.json").read_text())["rows"]}
    assert abs(rows["weights"] / 1e5 - 1) < 0.01
    assert main(["export", str(output), "--to", "gguf", "--output", str(tmp_path), "--name", "m", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["files"][0]["checks"]
    assert checks["top1_agreement"] > 0.95 and checks["kl"] < 1e-3  # float16 matrices, an 8-bit table
    assert main(["chat", str(tmp_path / "m.gguf"), "--prompt", "the cat", "--max-tokens", "4", "--context", "64"]) == 0
    assert capsys.readouterr().out


def test_shards_and_tokenizer_of_another_run(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, shape = Path(trained[-1]), tmp_path / "second", tmp_path / "shape.json"
    size = json.loads((first / "shards" / "manifest.json").read_text())["vocab_size"]
    shape.write_text(json.dumps(toy.shape(vocab_size=size).to_diff_dict()))
    command = ["pretrain", str(shape), "--shards", str(first / "shards"), *SMALL, "--output", str(second), "--json"]
    assert main(command) == 0 and not (second / "shards").exists()
    assert json.loads(capsys.readouterr().out)["settings"]["context"] == 32
    kept = (first / "tokenizer" / "tokenizer.json").read_text()
    assert (second / "tokenizer.json").read_text() == kept


def test_shapes_by_name_number_and_file(tmp_path: Path) -> None:
    named = read_config("125M", 4096, 256)
    assert named.num_hidden_layers == 30 and named.vocab_size == 4096
    assert read_config("125M", None, 256, share=True).share_map[:4] == [0, 0, 1, 1]
    solved = read_config("1.5e6", None, 256)
    assert solved.vocab_size == 4096 and 4 <= solved.num_hidden_layers <= 16
    assert read_config("1.5e6", 2048, 4096, depth=12).num_hidden_layers == 12
    assert read_config("1.5e6", 2048, 4096).max_position_embeddings == 4096
    path = tmp_path / "12.json"
    path.write_text(json.dumps(design_sweep(1.5e6, [12], 2048)[0].to_diff_dict()))
    assert read_config(str(path), None, 256).to_diff_dict() == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0.5"], "at least 1"),
        (["12x"], "no shape is called '12x'"),
        (["nothing.json"], "cannot read"),
        (["llama.json"], "a configuration of 'llama'"),
        (["broken.json"], "not JSON"),
        (["shape.json", "--vocab", "999"], "vocab_size=300"),
        (["mislabelled.json"], "mislabelled.json cannot be read"),
        (["125M", "--depth", "3"], "goes with a number"),
        (["1e5", "--text", "absent.txt"], "no such text file or folder: absent.txt"),
        (["1e5", "--text", "shape.json", "--shards", "x"], "give one of the two"),
        (["1e5", "--shards", "."], "manifest.json: No such file"),
        (["1e5", "--steps", "5", "--tokens", "9"], "give one of the two"),
        (["1e5", "--schedule", "square"], "--schedule square"),
        (["1e5", "--vocab", "100", "--text", "two.jsonl"], "259 or more"),
        (["1e5", "--tokenizer", "."], "no tokenizer"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama.json").write_text('{"model_type": "llama"}')
    Path("broken.json").write_text("{")
    Path("shape.json").write_text(json.dumps(toy.shape().to_diff_dict()))
    Path("mislabelled.json").write_text(json.dumps({**toy.shape().to_diff_dict(), "id2label": "{0: 'a'}"}))
    Path("two.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert main(["pretrain", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("edgewright: ")]
    assert len(lines) == 1 and message in lines[0]


def test_documents_of_files(texts: list[str], tmp_path: Path) -> None:
    found = list(TextFiles(texts))
    assert found == list(TextFiles(texts)) and len(found) == 41
    long = "\n\n".join(f"paragraph {number} " + "word " * 30 for number in range(400))
    (tmp_path / "long.txt").write_text(long)
    parts = list(TextFiles([tmp_path / "long.txt"]))
    assert "\n\n".join(parts) == long and max(map(len, parts)) <= LONGEST_DOCUMENT
    (tmp_path / "flat.txt").write_text("x" * (2 * LONGEST_DOCUMENT + 5))
    assert [len(part) for part in TextFiles([tmp_path / "flat.txt"])] == [LONGEST_DOCUMENT, LONGEST_DOCUMENT, 5]
    english = builtin_documents("english")
    assert sum(map(len, english)) > 400_000 and max(map(len, english)) <= LONGEST_DOCUMENT
