"""`edgewright design`: candidates of one size, as a table, as JSON and as files that make models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgewright.cli import main


def test_candidates_of_one_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgewright.models.decoder.config import EdgeDecoderConfig
    from edgewright.models.decoder.footprint import footprint

    command = ["design", "--params", "1.5e6", "--vocab", "4096", "--depths", "4,8", "--bandwidth", "10"]
    assert main([*command, "--output", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["candidates"]
    assert len(found) == 2 and all(abs(one["stored"] / 1.5e6 - 1) < 0.01 for one in found)
    config = EdgeDecoderConfig(**json.loads((tmp_path / "8.json").read_text()))
    assert config.num_hidden_layers == 8 and footprint(config).stored == found[1]["stored"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "decode_bound" in shown and "8 blocks" in shown and "10.0 GB/s" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "1e6", "--depths", "4,x"], "numbers separated by commas"),
        (["--params", "1e6", "--bandwidth", "0"], "more than 0"),
        (["--params", "100", "--bandwidth", "10"], "the smallest table alone"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["design", *arguments]) == 2
    assert message in capsys.readouterr().err
