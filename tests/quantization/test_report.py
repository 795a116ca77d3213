"""The layer report and the loading of official checkpoints."""

from __future__ import annotations

import copy
import csv

import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.quantization.api import quantize_, quantized_modules
from edgewright.quantization.config import QuantConfig
from edgewright.quantization.report import layer_rows, save_report, snapshot
from edgewright.systems.paretoq.checkpoint import load_paretoq_state

TOKENS = torch.arange(24).reshape(2, 12)


def test_rows_count_levels_flips_and_movement(tiny_llama, tmp_path):
    quantize_(tiny_llama, QuantConfig.weights("seq2", 32))
    start = snapshot(tiny_llama)
    still = layer_rows(tiny_llama, start)
    assert len(still) == 14
    assert all(row.flipped == 0 and row.movement == 0 and abs(sum(row.occupancy) - 1) < 1e-6 for row in still)
    assert all(len(row.occupancy) == 4 and row.bits_per_weight == 2.5 and 0 < row.error < 1 for row in still)
    layer = tiny_llama.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight.neg_()
    moved = {row.layer: row for row in layer_rows(tiny_llama, start)}["model.layers.0.mlp.up_proj"]
    assert moved.flipped > 0.99 and moved.movement == pytest.approx(2.0)
    save_report(layer_rows(tiny_llama, start), tmp_path)
    with (tmp_path / "layers.csv").open(newline="") as file:
        assert [line["layer"] for line in csv.DictReader(file)] == [row.layer for row in still]
    assert (tmp_path / "layers.png").stat().st_size > 1000


def test_a_plain_model_has_no_report(tiny_llama):
    with pytest.raises(UsageError, match="quantize_ first"):
        layer_rows(tiny_llama)
    with pytest.raises(UsageError, match="quantize_ first"):
        snapshot(tiny_llama)


def official_state(model) -> dict[str, torch.Tensor]:
    """The names that the official code gives to the parameters of a quantised model."""
    state = {name: value.clone() for name, value in model.state_dict().items() if "quantizer" not in name}
    for name, module in quantized_modules(model):
        state[f"{name}.weight_clip_val"] = module.quantizer.weight_scale.detach().clone()
    return state


def test_official_checkpoints_load(tiny_llama):
    plain = copy.deepcopy(tiny_llama)
    quantize_(tiny_llama, QuantConfig.weights("ternary"))
    with torch.no_grad():
        for _, module in quantized_modules(tiny_llama):
            module.quantizer.weight_scale.mul_(0.7)
            module.weight.mul_(1.1)
        expected = tiny_llama(TOKENS).logits
        loaded = load_paretoq_state(quantize_(plain, QuantConfig.weights("ternary")), official_state(tiny_llama))
        assert torch.equal(loaded(TOKENS).logits, expected)


def test_checkpoints_that_do_not_fit_are_named(tiny_llama):
    quantize_(tiny_llama, QuantConfig.weights("ternary"))
    state = official_state(tiny_llama)
    first = state.pop("model.layers.0.mlp.up_proj.weight_clip_val")
    with pytest.raises(FormatError, match="no scale for model.layers.0.mlp.up_proj"):
        load_paretoq_state(tiny_llama, state)
    state["model.layers.0.mlp.up_proj.weight_clip_val"] = first.repeat(1, 2)
    with pytest.raises(FormatError, match="row scales"):
        load_paretoq_state(tiny_llama, state)
