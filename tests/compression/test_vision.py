"""A classifier from float to proved files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edgewright import cli
from edgewright.compression.vision import VisionSettings, compress_vision
from edgewright.errors import UsageError
from edgewright.io.images import digits
from edgewright.quantization.static_file import load_static
from edgewright.vision.digits import digits_network, train_digits


def test_a_network_becomes_files_that_agree_with_it(tmp_path: Path) -> None:
    data, held_out = digits("calibration"), digits("evaluation")
    model = digits_network()
    train_digits(model, data, held_out, 40, 3e-3, seed=0)
    settings = VisionSettings(bits=6, steps=2, batch=32, runs=2)
    report = compress_vision(model.eval(), data[0][:64], tmp_path, settings, evaluation_images=held_out[0][:100])
    assert report.value("top1_agreement", "quantised") > 80
    assert report.value("top1_agreement", "quantised, in ONNX Runtime") > 80
    assert report.value("latency", "float32") > 0
    for name in ("model.safetensors", "int8.onnx", "float.onnx", "weights.csv", "sqnr.png", "ranges.png", "report.md"):
        assert (tmp_path / name).stat().st_size > 0, name
    saved = json.loads((tmp_path / "report.json").read_text())
    assert any("6-bit codes" in note for note in saved["notes"])
    loaded = load_static(digits_network(seed=1), data[0][:1], tmp_path / "model.safetensors")
    assert torch.isfinite(loaded(held_out[0][:4])).all()


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="give images"):
        compress_vision(digits_network(), torch.zeros(0, 1, 8, 8), "nowhere")
    with pytest.raises(UsageError, match="2 to 8 bits"):
        VisionSettings(bits=9)
    for arguments, words in (
        (["--method", "gptq"], "--method is rtn"),
        (["--bits", "1.58"], "whole widths from 2 to 8"),
        (["--bits", "4", "--budget", "4m"], "number of steps"),
    ):
        assert cli.main(["compress", "efficientnet-lite0", *arguments]) == 2
        assert words in capsys.readouterr().err
