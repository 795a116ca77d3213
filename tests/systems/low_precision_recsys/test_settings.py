"""Units are found once each, recipes build what they say, and models are saved, loaded and refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from edgewright.errors import FormatError, Unsupported, UsageError
from edgewright.systems.dlrm.clicks import ClickData, predict
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.low_precision_recsys import QuantizedModel, QuantRecipe, apply_recipe, uniform_recipe
from edgewright.systems.low_precision_recsys.precision_search import calibrated_recipe
from edgewright.systems.low_precision_recsys.units import REFERENCE, Int8Linear, RowsLinear, build, find_units, swapped


class Tied(nn.Module):
    """An embedding whose table is the head's weight too, a bag, and a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.bag = nn.EmbeddingBag(10, 8, mode="mean")
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.again = self.inner[0]
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.inner(self.words(ids).sum(1) + self.bag(tags))))


IDS, TAGS = torch.tensor([[1, 0], [19, 3]]), torch.tensor([[9, 9, 1], [0, 1, 2]])


def test_every_option_of_every_unit_has_the_bytes_that_arithmetic_says(model: DLRM, clicks: ClickData) -> None:
    units = find_units(model)
    assert list(units) == ["bottom.0", "bottom.2", "tables.0", "tables.1", "tables.2", "top.0", "top.3"]
    for unit in units.values():
        for option in unit.options:
            part = build(model, unit, option, (0.1, 3))
            if option != REFERENCE:
                held = sum(tensor.nbytes for module in part.values() for tensor in module.state_dict().values())
                assert held == unit.nbytes(option), (unit.name, option)
            before = model.get_submodule(unit.name)
            with swapped(model, part):
                found = predict(model, clicks.rows(slice(0, 64)))
                assert found.isfinite().all()
            assert model.get_submodule(unit.name) is before
    assert units["tables.0"].nbytes("int4-greedy") == 40 * (8 // 2 + 4) and units["top.3"].nbytes("fp32") == 4 * 17
    with pytest.raises(UsageError, match="option of the table tables.0='int8-dynamic'; it must be one of"):
        units["tables.0"].nbytes("int8-dynamic")
    with pytest.raises(UsageError, match="top.3: int8-static reads its input in a fixed range"):
        build(model, units["top.3"], "int8-static")


def test_the_model_is_left_alone_and_the_copy_computes_with_its_codes(model: DLRM, clicks: ClickData) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    low = apply_recipe(model, uniform_recipe(model, "int4-greedy", "int8-dynamic"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    plain = DLRM(model.config).eval()
    with torch.no_grad():
        plain.load_state_dict(before)
        for k, table in enumerate(plain.tables):
            table.weight.copy_(low.module.get_submodule(f"tables.{k}").stored.weight)
    half = apply_recipe(model, uniform_recipe(model, "int4-greedy", "fp32"))
    data = clicks.rows(slice(0, 500))
    torch.testing.assert_close(predict(half, data), predict(plain, data), rtol=1e-5, atol=1e-5)  # sums of bags
    assert low.nbytes == sum(u.nbytes("int4-greedy" if u.kind == "table" else "int8-dynamic")
                             for u in find_units(model).values())  # fmt: skip


def test_shared_weights_are_one_unit_and_quantised_once() -> None:
    tied = Tied().eval()
    units = find_units(tied)
    assert {name: unit.paths for name, unit in units.items()} == {
        "words": ("words", "head"), "bag": ("bag",), "inner.0": ("inner.0", "again"),
    }  # fmt: skip
    low = apply_recipe(tied, uniform_recipe(tied, "int8", "int8-dynamic"))
    made: Tied = low.module  # type: ignore[assignment]
    assert isinstance(made.head, RowsLinear) and made.head.stored is made.words.stored
    assert isinstance(made.again, Int8Linear) and made.again is made.inner[0]
    assert not made.words(torch.tensor([0])).any()  # padding
    assert low.nbytes == sum(u.nbytes("int8" if u.kind == "table" else "int8-dynamic") for u in units.values())
    torch.testing.assert_close(low(IDS, TAGS), tied(IDS, TAGS), rtol=0.05, atol=0.05)  # 8 bits
    # words -> RowsLinear keeps the table's values
    assert torch.equal(made.head(torch.eye(8)).t(), made.words.stored.weight)


def test_quotient_tables_are_one_unit() -> None:
    config = DLRMConfig(3, (50, 20), 8, (8,), (4, 1), qr_threshold=40, table_dims=(8, 2))
    model = DLRM(config).eval()
    units = find_units(model)
    assert units["tables.0"].shapes == ((13, 8), (4, 8)) and units["tables.1.table"].shapes == ((20, 2),)
    low = apply_recipe(model, uniform_recipe(model, "int8", "fp16"))
    assert low.nbytes == sum(u.nbytes("int8" if u.kind == "table" else "fp16") for u in units.values()) + 4 * 8 * 2


@pytest.mark.parametrize("table", ["fp16", "int8", "int4-greedy", "int4-books", "int2-minmax"])
@pytest.mark.parametrize("linear", ["bf16", "int8-static"])
def test_a_saved_model_comes_back_to_the_same_bits(
    model: DLRM, clicks: ClickData, tmp_path: Path, table: str, linear: str
) -> None:
    recipe = calibrated_recipe(model, {"table": table, "linear": linear}, clicks)
    low = apply_recipe(model, recipe)
    low.save_pretrained(tmp_path / "low")
    again = QuantizedModel.from_pretrained(tmp_path / "low")
    assert torch.equal(predict(again, clicks), predict(low, clicks))
    assert again.recipe == recipe and again.nbytes == low.nbytes
    assert sum(f.stat().st_size for f in (tmp_path / "low").iterdir()) > low.nbytes


def test_any_module_is_saved_with_a_model_of_its_architecture(tmp_path: Path) -> None:
    low = apply_recipe(Tied(), uniform_recipe(Tied(), "int4-minmax", "fp16"))
    low.save_pretrained(tmp_path / "low")
    with pytest.raises(UsageError, match="holds no DLRM"):
        QuantizedModel.from_pretrained(tmp_path / "low")
    again = QuantizedModel.from_pretrained(tmp_path / "low", Tied())
    assert torch.equal(again(IDS, TAGS), low(IDS, TAGS)) and again.nbytes == low.nbytes


def test_recipes_for_other_models_are_refused_by_unit(model: DLRM, clicks: ClickData) -> None:
    recipe = uniform_recipe(model, "int8", "fp16")
    fewer = DLRM(DLRMConfig(6, (40, 30), 8, (16, 8), (16, 1)))
    with pytest.raises(ValueError, match=r"missing units: tables.2; other shapes: top.0 \(here \[\(16, 11\)\]"):
        apply_recipe(fewer, recipe)
    newer = DLRM(model.config, seed=5)
    with pytest.raises(UsageError, match=r"searched on other weights of bottom.0, .*Monitor\(recipe, gate, store\)"):
        apply_recipe(newer, recipe)
    assert predict(apply_recipe(newer, recipe, refreshed=True), clicks).isfinite().all()
    static = uniform_recipe(model, "fp32", "int8-static")
    with pytest.raises(UsageError, match="give batches to calibrate it with"):
        apply_recipe(model, static)
    with pytest.raises(ValueError, match="calibration data is empty"):
        apply_recipe(model, static, [])
    assert apply_recipe(model, static, clicks).module.bottom[0].step is not None


def test_biases_are_corrected_to_the_mean(model: DLRM, clicks: ClickData) -> None:
    import dataclasses

    plain = calibrated_recipe(model, {"linear": "int8-static"}, clicks)
    recipe = dataclasses.replace(plain, bias_correction=True)
    with pytest.raises(UsageError, match="corrects biases"):
        apply_recipe(model, recipe)
    x = clicks.dense
    wanted = model.bottom[0](x).mean(0)
    gaps = [(apply_recipe(model, r, clicks).module.bottom[0](x).mean(0) - wanted).abs().max() for r in (plain, recipe)]
    assert float(gaps[1].detach()) < 1e-5 < float(gaps[0].detach())


def test_recipe_files(model: DLRM, clicks: ClickData, tmp_path: Path) -> None:
    recipe = calibrated_recipe(model, {"table": "int8", "linear": "int8-static", "top.3": "fp16"}, clicks)
    assert recipe.units["top.3"].option == "fp16" and recipe.units["top.0"].range is not None
    path = tmp_path / "recipe.json"
    recipe.save(path)
    assert QuantRecipe.load(path) == recipe
    good = json.loads(path.read_text())
    for key, value in (("units", []), ("model_type", "x"), ("architecture", "0"), ("bias_correction", None)):
        broken = {**good, key: value}
        if value is None:
            del broken[key]
        path.write_text(json.dumps(broken))
        with pytest.raises(FormatError):
            QuantRecipe.load(path)
    for field, value in (("option", "int3"), ("range", [-1, 2]), ("shapes", [[1]]), ("shares", [1.0])):
        units = {**good["units"], "top.0": {**good["units"]["top.0"], field: value}}
        path.write_text(json.dumps({**good, "units": units}))
        with pytest.raises(FormatError, match="is no recipe"):
            QuantRecipe.load(path)
    with pytest.raises(UsageError, match="no such|cannot read"):
        QuantRecipe.load(tmp_path / "none.json")


def test_broken_weight_files(model: DLRM, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    apply_recipe(model, uniform_recipe(model, "int8", "int8-dynamic")).save_pretrained(tmp_path / "low")
    path = tmp_path / "low" / "model.safetensors"
    good = load_file(path)
    name = "tables.0.stored.packed"
    for wrong in (
        {k: v for k, v in good.items() if k != name},
        {**good, name: good[name][:5]},
        {**good, "x.y": good[name].clone()},
    ):
        save_file(wrong, path)
        with pytest.raises(FormatError):
            QuantizedModel.from_pretrained(tmp_path / "low")
    path.write_bytes(b"12345678rubbish")
    with pytest.raises(FormatError, match="not a usable safetensors file"):
        QuantizedModel.from_pretrained(tmp_path / "low")


def test_models_without_units() -> None:
    with pytest.raises(UsageError, match="no Linear, Embedding or EmbeddingBag"):
        find_units(nn.Sequential(nn.ReLU()))
    with pytest.raises(Unsupported, match="0 has max_norm"):
        find_units(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)))
    with pytest.raises(UsageError, match="a single layer"):
        find_units(nn.Linear(3, 2))
