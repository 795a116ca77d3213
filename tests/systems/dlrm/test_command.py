"""edgewright train: from a user's log to a model, its vocabulary and a file; the same again resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import edgewright.distillation.best
from edgewright import cli
from edgewright.systems.dlrm.click_log import Vocabulary
from edgewright.systems.dlrm.model import DLRM


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """2,000 clicks that depend on shop and price."""
    rng = np.random.default_rng(0)
    taste = rng.normal(size=20)
    lines = ["bought,price,shop,user"]
    for _ in range(2000):
        shop, price = int(rng.integers(20)), float(rng.integers(1, 100))
        chance = 1 / (1 + np.exp(-4 * taste[shop] + 0.02 * price))
        lines.append(f"{int(rng.random() < chance)},{price},s{shop},u{int(rng.integers(300))}")
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def arguments(log: Path, output: Path) -> list[str]:
    columns = ["--label", "bought", "--dense", "price", "--categorical", "shop,user"]
    small = ["--hash-rows", "1000", "--dim", "4", "--bottom", "8", "--top", "8", "--epochs", "6", "--batch", "64"]
    small += ["--lr", "0.01", "--table-lr", "0.1"]
    return ["train", "dlrm", "--data", str(log), *columns, *small, "--output", str(output), "--json"]


def test_it_trains_and_says_how_well(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(log, tmp_path / "run")) == 0
    rows = {(r["metric"], r["subject"]): r["value"] for r in json.loads(capsys.readouterr().out)["rows"]}
    assert (
        rows["auc", "dlrm"] > 0.65
        and rows["ne", "dlrm"] < 1
        and rows["auc", "dlrm"] > rows["auc", "popularity of user"]
    )
    model = DLRM.from_pretrained(tmp_path / "run" / "model")
    vocabulary = Vocabulary.from_pretrained(tmp_path / "run" / "model")
    assert model.config.table_names == ("shop", "user") and model.config.table_sizes == vocabulary.schema.sizes
    assert (tmp_path / "run" / "report.md").is_file() and (tmp_path / "run" / "training" / "loss.png").is_file()

    assert cli.main([*arguments(log, tmp_path / "again")]) == 0
    again = DLRM.from_pretrained(tmp_path / "again" / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_model_leaves_as_a_file(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments(log, tmp_path / "run"), "--rows", "300", "--to", "onnx"]) == 0
    assert "model.onnx: " in json.loads(capsys.readouterr().out)["notes"][-1]
    assert (tmp_path / "run" / "model.onnx").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--categorical", "shop,colour"], "has no column 'colour'"),
        (["--bottom", "wide"], "--bottom='wide'; it must be widths of layers, e.g. 512,256"),
        (["--to", "gguf"], "--to='gguf'; it must be one of onnx, executorch"),
        (["--rows", "1"], "--rows=1.0; it must be a number at least 2"),
        (["--epochs", "0"], "--epochs 0.0"),
        (["--data", "none.csv"], "there is no file none.csv"),
    ],
)
def test_bad_input(
    log: Path, tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments(log, tmp_path / "run"), *change]) == 2
    assert message in capsys.readouterr().err


def test_unknown_models_and_bad_rows(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "dlmr", "--data", str(log)]) == 2
    assert "cannot train 'dlmr', did you mean 'dlrm'?; models: dlrm" in capsys.readouterr().err
    log.write_text(log.read_text() + "nan,3,s1,u1\n")
    assert cli.main(arguments(log, tmp_path / "run")) == 2
    assert "log.csv, row 2001: column bought is 'nan'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "data").exists()


def test_a_run_that_the_disk_stopped_goes_on(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its checkpoint, whose optimizer is a pair with a state of its own form."""

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    command = [*arguments(log, tmp_path / "run"), "--checkpoint-every", "5"]
    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert cli.main(command) == 1 and "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    real, calls = edgewright.distillation.best.save_tensors, []

    def later(path: Path, *rest: object) -> None:
        calls.append(path)
        real(path, *rest) if len(calls) < 2 else full()

    monkeypatch.setattr(edgewright.distillation.best, "save_tensors", later)
    assert cli.main(command) == 1 and list((tmp_path / "run").glob("training/checkpoints/ckpt-*"))
    monkeypatch.undo()
    assert cli.main(command) == 0
    assert DLRM.from_pretrained(tmp_path / "run" / "model").config.table_names == ("shop", "user")
