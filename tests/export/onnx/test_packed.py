"""Packed layers in ONNX: the layout stands for the packed values, the runtime computes with exactly our codes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgewright import QuantConfig, WeightConfig, convert_, quantize_
from edgewright.errors import Unsupported
from edgewright.export.onnx import layers as onnx_layers
from edgewright.export.onnx.exporter import export_onnx
from edgewright.io.packed import PackedEmbedding, PackedLinear
from edgewright.quantization.config import ActivationConfig, Rule
from edgewright.quantization.elastic import ElasticConfig
from edgewright.runtime.program import open_program
from tests.export.export_models import random_packed
from tests.export.onnx.onnx_models import GRIDS, images, initializers, mlp, operators

numpy_helper = onnx.numpy_helper
TWO_BITS = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= onnx_layers.TWO_BIT_RUNTIME

# ---- the layout


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("columns", "groups"), [(48, 1), (72, 1), (64, 2), (160, 5)])
def test_blocks_stand_for_exactly_the_packed_values(grid, columns, groups):
    packed = random_packed(grid, 6, columns, columns // groups)
    for storage in ("nibbles", "smallest"):
        bits = onnx_layers.linear_bits(packed, storage)
        blocks = onnx_layers.pack_blocks(packed, bits, onnx_layers.matmul_block(columns, packed.group, bits))
        assert torch.equal(blocks.unpack(), packed.dequantize())
        assert blocks.words.numel() * 8 <= -(-columns // blocks.block) * blocks.block * 6 * bits


def test_the_block_is_the_cheapest_that_fits():
    assert onnx_layers.matmul_block(384, 384, 4) == 128  # three blocks and nothing left over
    assert onnx_layers.matmul_block(1536, 1536, 4) == 256
    assert onnx_layers.matmul_block(96, 32, 4) == 32 and onnx_layers.matmul_block(96, 24, 4) is None


# ---- packed models against PyTorch


class EveryGrid(nn.Module):
    """A linear layer of every grid on the same input; the columns leave the last block of each row unfilled."""

    def __init__(self) -> None:
        super().__init__()
        for i, grid in enumerate(GRIDS):
            self.add_module(grid, PackedLinear(random_packed(grid, 40, 72, seed=i), torch.randn(40) * 0.1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {grid: self.get_submodule(grid)(x) for grid in GRIDS}


@pytest.mark.parametrize("storage", ["nibbles", "smallest"])
def test_every_grid_runs_as_in_torch_and_keeps_its_codes(storage, tmp_path):
    model, path = EveryGrid().eval(), tmp_path / "m.onnx"
    if storage == "smallest" and not TWO_BITS:
        with pytest.raises(Unsupported, match="cannot multiply codes of 2 bits; use storage='nibbles'"):
            export_onnx(model, path, example_inputs=torch.randn(3, 72), storage=storage)
        return
    result = export_onnx(model, path, example_inputs=torch.randn(3, 72), storage=storage)
    assert result.max_error < 1e-5 and result.bytes == path.stat().st_size
    assert result.operators["MatMulNBits"] == len(GRIDS) - (storage == "smallest")
    with open_program(path, threads=1, check=False) as program:
        for batch in (1, 5):
            x = torch.randn(batch, 72)
            for found, expected in zip(program.run([x.numpy()]), model(x).values(), strict=True):
                # sums of 72 products in another order, relative to values of about the largest
                assert np.abs(found - expected.numpy()).max() < 2e-6 * max(1, float(expected.abs().max()))
    held = initializers(path)
    for grid in GRIDS:
        packed = model.get_submodule(grid).packed
        bits = onnx_layers.linear_bits(packed, storage)
        assert bits == ({"binary": 1, "ternary": 2, "seq2": 2, "int2": 2}.get(grid, 4) if grid != "int8" else 8) or (
            storage == "nibbles" and bits == 4
        )
        words = held[f"{grid}.codes"].reshape(40, -1)
        numbers = np.stack([(words >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], -1)
        numbers = numbers.reshape(40, -1)[:, :72].astype(np.int64)
        codes = packed.codes.numpy().astype(np.int64)
        odd = grid == "seq2" and bits > 2  # odd codes with half the step
        expected = (codes + 1) // 2 if bits == 1 else (2 * codes + 1 if odd else codes) + 2 ** (bits - 1)
        assert np.array_equal(numbers, expected)


@pytest.mark.parametrize("group", [16, 32, 12])
def test_groups_of_inputs(group, tmp_path):
    model = convert_(quantize_(mlp(96, 96), QuantConfig.weights("int4", granularity=group)))
    result = export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 96))
    # twelve fits no block of MatMulNBits
    expected = {"DequantizeLinear": 2} if group == 12 else {"MatMulNBits": 2}
    assert result.operators == expected and result.max_error < 1e-5


@pytest.mark.parametrize("grid", ["seq2", "int4", "int8"])
def test_packed_convolutions(grid, tmp_path):
    first, depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=8)
    model = nn.Sequential(first, nn.ReLU(), depthwise).eval()
    convert_(quantize_(model, QuantConfig((Rule("*", WeightConfig(grid)),), skip=())))
    path = tmp_path / "cnn.onnx"
    result = export_onnx(model, path, example_inputs=images(), output_names=["scores"])
    assert result.max_error < 1e-5 and result.outputs == ("scores",) and operators(path).count("DequantizeLinear") == 2
    tensor = next(t for t in onnx.load(str(path)).graph.initializer if t.name.startswith("0.codes"))
    wanted = onnx.TensorProto.UINT8 if grid == "int8" else onnx.TensorProto.INT4
    codes = model[0].packed.codes
    assert tensor.data_type == wanted
    stored = numpy_helper.to_array(tensor).astype(np.int16).reshape(codes.shape) - (128 if grid == "int8" else 0)
    assert np.array_equal(stored, (2 * codes + 1 if grid == "seq2" else codes).numpy())


class TiedTables(nn.Module):
    """A table and a head that share their codes, once for every grid."""

    def __init__(self) -> None:
        super().__init__()
        for i, grid in enumerate(GRIDS):
            packed = random_packed(grid, 40, 32, seed=i)
            self.add_module(f"{grid}_table", PackedEmbedding(packed))
            self.add_module(f"{grid}_head", PackedLinear(packed))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        out = {}
        for grid in GRIDS:
            rows = self.get_submodule(f"{grid}_table")(ids)
            out |= {f"{grid}_rows": rows, grid: self.get_submodule(f"{grid}_head")(rows)}
        return out


@pytest.mark.parametrize("storage", ["nibbles", "smallest"])
def test_a_tied_table_is_stored_once(storage, tmp_path):
    model, path = TiedTables().eval(), tmp_path / "tied.onnx"
    ids = torch.randint(0, 40, (2, 6))
    if storage == "smallest" and not TWO_BITS:
        with pytest.raises(Unsupported, match="onnxruntime 1.27 or newer"):
            export_onnx(model, path, example_inputs={"ids": ids}, storage=storage)
        return
    assert export_onnx(model, path, example_inputs={"ids": ids}, storage=storage).max_error < 1e-5
    words = [array for array in initializers(path).values() if array.dtype == np.uint8 and array.size > 16]
    assert len(words) == len(GRIDS)
    expected = model(ids)
    with open_program(path, check=False) as program:
        found = dict(zip(expected, program.run([ids.numpy()]), strict=True))
    for grid in GRIDS:  # a table is looked up, not computed
        assert np.array_equal(found[f"{grid}_rows"], expected[f"{grid}_rows"].numpy())


def test_tables_of_their_own_take_their_true_bits(tmp_path):
    model = nn.Sequential(PackedEmbedding(random_packed("binary", 50, 64))).eval()
    ids = torch.randint(0, 50, (2, 6))
    export_onnx(model, tmp_path / "table.onnx", example_inputs=ids)
    words = next(array for name, array in initializers(tmp_path / "table.onnx").items() if name.endswith("codes"))
    assert words.nbytes == 50 * 64 / 8
    with open_program(tmp_path / "table.onnx", check=False) as program:
        assert np.array_equal(program.run([ids.numpy()])[0], model(ids).numpy())


@pytest.mark.parametrize("activation", [ActivationConfig(8), ActivationConfig(8, symmetric=False), ElasticConfig()])
def test_quantised_inputs_of_layers(activation, tmp_path):
    model = quantize_(mlp(), QuantConfig((Rule("*", WeightConfig("int4"), activation),), skip=()))
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    model(x)
    convert_(model)
    # same rounding on both sides; where a value lies on an edge one step may differ
    assert export_onnx(model, tmp_path / "m.onnx", example_inputs=x).max_error < 0.1
