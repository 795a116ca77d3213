"""`edgewright compress` on a folder that `edgewright train dlrm` wrote."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from edgewright.cli import main
from edgewright.systems.low_precision_recsys import QuantizedModel
from edgewright.systems.low_precision_recsys.export import click_folder


def write_log(path: Path, rows: int, seed: int) -> None:
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("label", "price", "shop", "item"))
        for _ in range(rows):
            price, shop, item = draw.gauss(0, 1), draw.randrange(8), draw.randrange(40)
            chance = 0.2 + 0.5 * (shop % 2) + 0.2 * (item % 3 == 0)
            writer.writerow((int(draw.random() < chance), f"{price:.3f}", f"s{shop}", f"i{item}"))


def test_a_trained_folder_becomes_a_low_precision_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path / "old.csv", 1500, 0)
    write_log(tmp_path / "new.csv", 800, 1)
    trained, low = tmp_path / "run", tmp_path / "low"
    columns = ["--label", "label", "--dense", "price", "--categorical", "shop,item"]
    assert (
        main(["train", "dlrm", "--data", str(tmp_path / "old.csv"), *columns, "--output", str(trained), "--json"]) == 0
    )
    assert click_folder(str(trained)) == trained / "model" and click_folder(str(tmp_path)) is None
    capsys.readouterr()
    call = ["compress", str(trained), "--data", str(tmp_path / "new.csv"), "--output", str(low)]
    assert main([*call, "--budget", "0.01", "--json"]) == 0
    rows = {(r["metric"], r["subject"]): r["value"] for r in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["share", "searched"] < 60 and rows["delta_ne_upper", "searched"] <= 1.0
    assert QuantizedModel.from_pretrained(low / "model").nbytes == rows["bytes", "searched"]
    assert (low / "recipe.json").is_file() and (low / "report.md").is_file()

    for wrong, sentence in (
        (["compress", str(trained)], "--data names a log"),
        ([*call, "--budget", "4m"], "--budget 4m: of a click model"),
        ([*call, "--to", "gguf"], "--to of a click model='gguf'; it must be one of onnx"),
    ):
        assert main(wrong) == 2 and sentence in capsys.readouterr().err
