"""A classifier from float to proved files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edgewright import cli
from edgewright.compression.vision import VisionSettings, compress_vision
from edgewright.compression.vision_files import is_vision, load_vision, write_description
from edgewright.data.digits import digits_network, train_digits
from edgewright.errors import UsageError
from edgewright.io.images import digits
from edgewright.quantization.static.config import StaticConfig
from edgewright.quantization.static.file import load_static, save_static
from edgewright.quantization.static.network import calibrate_, convert_static, quantize_static


def test_a_network_becomes_files_that_agree_with_it(tmp_path: Path) -> None:
    data, held_out = digits("calibration"), digits("evaluation")
    model = digits_network()
    train_digits(model, data, held_out, 40, 3e-3, seed=0)
    settings = VisionSettings(bits=6, steps=2, batch=32, runs=2, targets=("onnx", "pte"))
    report = compress_vision(model.eval(), data[0][:64], tmp_path, settings, evaluation_images=held_out[0][:100])
    assert report.value("top1_agreement", "quantised") > 80
    assert report.value("top1_agreement", "quantised, in ONNX Runtime") > 80
    assert report.value("top1_agreement", "quantised, in ExecuTorch") > 80
    assert report.value("delegated", "quantised, in ExecuTorch") == 100
    assert report.value("latency", "float32") > 0 and report.value("latency", "quantised, in ExecuTorch") > 0
    for name in (
        "model.safetensors",
        "int8.onnx",
        "int8.pte",
        "float.onnx",
        "weights.csv",
        "sqnr.png",
        "ranges.png",
        "report.md",
    ):
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
        (["--to", "onnx,gguf"], "written as onnx, pte, not gguf"),
    ):
        assert cli.main(["compress", "efficientnet-lite0", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["compress", "smollm2-135m", "--to", "pte"]) == 2
    assert "--to pte is for image classifiers" in capsys.readouterr().err


def test_a_compressed_folder_is_exported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real network from its packed codes; its ranges need not be good for the way to be proved."""
    model, image = load_vision("efficientnet-lite0")
    config = StaticConfig()
    converted = convert_static(calibrate_(quantize_static(model, image, config), [image]))
    folder = tmp_path / "compressed"
    folder.mkdir()
    save_static(converted, folder / "model.safetensors", config)
    write_description("efficientnet-lite0", folder)
    assert is_vision(str(folder)) and is_vision("efficientnet-lite0") and not is_vision(str(tmp_path))
    loaded, _ = load_vision(str(folder))
    assert torch.equal(loaded(image), converted(image))
    assert cli.main(["export", str(folder), "--to", "gguf"]) == 2
    assert "--to takes pte and onnx" in capsys.readouterr().err
    (folder / "network.json").write_text('{"model": "resnet"}')
    assert cli.main(["export", str(folder), "--to", "pte"]) == 2
    assert "names 'resnet'; known are efficientnet-lite0" in capsys.readouterr().err
