"""Checkpoints of split weights (FSDP2), resumed where the model is whole."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.processes import run_script


def test_a_whole_model_gets_the_weights_that_split_ones_had(tmp_path: Path) -> None:
    """It once got none of them, and went on from its own, without a word."""
    run_script(Path(__file__).with_name("split_resume.py"), tmp_path)
    split, whole = load_file(tmp_path / "split.safetensors"), load_file(tmp_path / "whole.safetensors")
    assert split.keys() == whole.keys() and all(torch.equal(value, whole[name]) for name, value in split.items())
    end = load_file(tmp_path / "end.safetensors")
    assert not any(torch.equal(value, end[name]) for name, value in split.items())
