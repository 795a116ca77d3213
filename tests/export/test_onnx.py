"""ONNX export: ONNX Runtime answers like PyTorch, the file holds our codes and little else, what cannot go is named."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
import torch
from export_models import random_packed
from torch import nn

import edgewright
from edgewright import QuantConfig, WeightConfig, convert_, quantize_
from edgewright.errors import CheckFailed, MissingPackage, OutputError, Unsupported, UsageError
from edgewright.export import onnx as onnx_export
from edgewright.export import onnx_layers
from edgewright.export.onnx import example_inputs_for, export_onnx
from edgewright.io.packed import CODE_RANGES, PackedEmbedding, PackedLinear
from edgewright.quantization.config import ActivationConfig, Rule
from edgewright.quantization.elastic import ElasticConfig
from edgewright.runtime.program import open_program

numpy_helper = onnx.numpy_helper

GRIDS = tuple(CODE_RANGES)


def mlp(inputs: int = 48, hidden: int = 72, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, 7, bias=False)).eval()


class SmallCnn(nn.Module):
    """Convolution, batch norm, depthwise convolution, pooling, classifier; static: with torch's fake quantisation."""

    def __init__(self, static: bool = False, high: int = 127) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.norm.running_mean.uniform_(-0.1, 0.1)
        self.norm.running_var.uniform_(0.5, 1.5)
        self.static, self.high = static, high
        for name, conv in (("first", self.first), ("depthwise", self.depthwise)):
            self.register_buffer(f"{name}_scale", conv.weight.detach().abs().amax((1, 2, 3)) / high)
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int32))

    def weight(self, conv: nn.Conv2d, scale: torch.Tensor) -> torch.Tensor:
        if not self.static:
            return conv.weight
        return torch.fake_quantize_per_channel_affine(conv.weight, scale, self.zeros, 0, -self.high, self.high)

    def rounded(self, x: torch.Tensor, scale: float, zero: int, low: int, high: int) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high) if self.static else x

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.rounded(image, 0.03, 128, 0, 255)
        bias = self.first.bias
        if self.static:  # 32 bits at the product of the scales of input and weight
            bias = torch.fake_quantize_per_channel_affine(
                bias, 0.03 * self.first_scale, self.zeros, 0, -(2**31), 2**31 - 1
            )
        x = nn.functional.conv2d(x, self.weight(self.first, self.first_scale), bias, padding=1)
        x = x.clamp(0, 6) if self.static else self.norm(x).relu()
        x = self.rounded(x, 0.02, -128, -128, 127)
        weight = self.weight(self.depthwise, self.depthwise_scale)
        x = nn.functional.conv2d(x, weight, self.depthwise.bias, padding=1, stride=2, groups=8).relu()
        few = self.high < 127
        return self.head(self.rounded(x, 0.2 if few else 0.02, 0, 0, 15 if few else 255).mean((2, 3)))


def small_cnn(**options) -> SmallCnn:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return SmallCnn(**options).eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def initializers(path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def operators(path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


@pytest.fixture(scope="module")
def short_minilm():
    """The first layer of the real MiniLM."""
    model, _ = edgewright.load("minilm-l6")
    model.encoder.layer = model.encoder.layer[:1]
    return model


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
    wanted = onnx.TensorProto.INT8 if grid == "int8" else onnx.TensorProto.INT4
    codes = model[0].packed.codes
    assert tensor.data_type == wanted
    stored = numpy_helper.to_array(tensor).astype(np.int8).reshape(codes.shape)
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


# ---- torch's fake quantisation


def test_static_int8_becomes_qdq_with_the_codes_of_torch(tmp_path):
    model, path = small_cnn(static=True), tmp_path / "qdq.onnx"
    result = export_onnx(model, path, example_inputs=images())
    assert result.max_error < 0.02  # a step of the last activation, where a sum lies on the edge of two
    assert result.operators == {"DequantizeLinear": 6, "QuantizeLinear": 3}
    held = initializers(path)
    assert next(array for key, array in held.items() if key.startswith("first.bias_codes")).dtype == np.int32
    for name in ("first", "depthwise"):
        weight, scale = getattr(model, name).weight.detach(), getattr(model, f"{name}_scale")
        exact = torch.fake_quantize_per_channel_affine(weight, scale, model.zeros, 0, -127, 127)
        codes = next(array for key, array in held.items() if key.startswith(f"{name}.weight_codes"))
        assert codes.dtype == np.int8
        assert np.array_equal(codes * scale.numpy()[:, None, None, None], exact.numpy())
    assert not any(key.startswith("first.weight") and a.dtype == np.float32 and a.size > 8 for key, a in held.items())


def test_the_runtime_takes_its_integer_convolutions(tmp_path):
    import onnxruntime

    path, optimized = tmp_path / "qdq.onnx", tmp_path / "optimized.onnx"
    export_onnx(small_cnn(static=True), path, example_inputs=images())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert operators(optimized).count("QLinearConv") == 2


def test_weights_of_fewer_bits_stay_in_their_range(tmp_path):
    model, path = small_cnn(static=True, high=7), tmp_path / "four.onnx"
    assert "Clip" in operators(export_onnx(model, path, example_inputs=images()).path)
    codes = next(array for key, array in initializers(path).items() if key.startswith("first.weight_codes"))
    assert codes.min() >= -7 and codes.max() == 7


class InputScale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(
            x, x.abs().amax() / 127, torch.zeros((), dtype=torch.int32), -128, 127
        )


class RoundedEnd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.05, 3, 0, 255)


def test_a_rounded_output_keeps_its_name(tmp_path):
    x = torch.randn(2, 4)
    result = export_onnx(RoundedEnd(), tmp_path / "x.onnx", example_inputs=x, output_names=["scores"])
    with open_program(result.path, check=False) as program:
        assert [spec.name for spec in program.outputs] == ["scores"]
        assert np.array_equal(program.run([x.numpy()])[0], RoundedEnd()(x).numpy())


def test_a_scale_from_the_input_is_refused(tmp_path):
    with pytest.raises(Unsupported, match="scale from the input"):
        export_onnx(InputScale(), tmp_path / "x.onnx", example_inputs=torch.randn(2, 4))


# ---- float models and encoders


def test_a_float_cnn_at_any_batch(tmp_path):
    model, path = small_cnn(), tmp_path / "cnn.onnx"
    result = export_onnx(model, path, example_inputs=images(1), input_names=["image"], output_names=["scores"])
    assert result.max_error < 1e-5 and result.notes[0].endswith("batches of 2, 1, 3")
    with open_program(path) as program:
        assert str(program.inputs[0]) == "image float32 [any, 3, 12, 12]"
        for count in (1, 4):
            assert np.allclose(
                program.run({"image": images(count).numpy()})[0], model(images(count)).detach(), atol=1e-5
            )
    fixed = export_onnx(model, tmp_path / "fixed.onnx", example_inputs=images(1), dynamic_batch=False)
    with open_program(fixed.path, check=False) as program:
        assert program.inputs[0].shape == (1, 3, 12, 12)


def test_the_real_encoder_float_and_packed(short_minilm, tmp_path):
    model, float_path = short_minilm, tmp_path / "float.onnx"
    result = export_onnx(model, float_path, example_inputs=example_inputs_for(model))
    assert result.outputs == ("last_hidden_state", "pooler_output") and result.max_error < 1e-4
    quantize_(model, QuantConfig((Rule("*", WeightConfig("int4")),), skip=()))
    convert_(model)
    path = tmp_path / "int4.onnx"
    packed = export_onnx(model, path)
    assert packed.max_error < 1e-4
    linear = [m for m in model.modules() if hasattr(m, "in_features")]
    tables = [m for m in model.modules() if hasattr(m, "num_embeddings")]
    codes = sum(m.codes.numel() / 2 for m in (*linear, *tables))
    scales = 4 * sum(m.codes.shape[0] * max(m.in_features // 128, 1) for m in linear)
    scales += 4 * sum(m.codes.shape[0] for m in tables)
    rest = sum(4 * p.numel() for name, p in model.named_parameters() if "codes" not in name) + 8 * 512 * 2
    bound = codes + scales + rest
    assert bound * 0.95 < packed.bytes < bound * 1.02 + 65536  # the graph itself
    assert packed.bytes < 0.16 * result.bytes
    with open_program(path, check=False) as program:
        ids = torch.randint(0, 30522, (3, 11))
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        found = program.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask)
    # float sums in another order, of values of about 3
    assert np.abs(found[0] - expected.last_hidden_state.numpy()).max() < 1e-4


def test_a_causal_model(tiny_llama, tmp_path):
    ids = torch.randint(0, 256, (3, 9))
    result = export_onnx(tiny_llama, tmp_path / "llama.onnx")
    assert result.outputs == ("logits",) and tiny_llama.config.use_cache
    with open_program(result.path, check=False) as program, torch.no_grad():
        assert np.abs(program.run([ids.numpy()])[0] - tiny_llama(ids).logits.numpy()).max() < 1e-5


def test_the_model_is_left_as_it_was(tmp_path):
    model = convert_(quantize_(mlp(), QuantConfig.weights("int4"))).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 48))
    assert model.training and [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = convert_(quantize_(mlp(), QuantConfig.weights("int4")))
    x = torch.randn(2, 48)
    first, second = (export_onnx(model, tmp_path / f"{i}.onnx", example_inputs=x).path.read_bytes() for i in range(2))
    assert first == second
    assert b"/edgewright/" not in first and b"site-packages" not in first  # no stack traces


def test_over_the_limit_of_protobuf_the_tensors_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "EXTERNAL_FROM", 1000)
    x = torch.randn(2, 48)
    result = export_onnx(mlp(), tmp_path / "big.onnx", example_inputs=x)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["big.onnx", "big.onnx.data"]
    assert result.bytes == sum(file.stat().st_size for file in files) and "belongs beside" in result.notes[-1]
    with open_program(result.path) as program:
        assert np.allclose(program.run([x.numpy()])[0], mlp()(x).detach(), atol=1e-5)


# ---- what cannot be exported


class Strange(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_an_operator_without_translation_is_named_with_its_module(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"odd": Strange()})["odd"])
    with pytest.raises(Unsupported, match=r"special_bessel_j0.*module 1 \(Strange\)"):
        export_onnx(model, tmp_path / "x.onnx", example_inputs=torch.randn(2, 4))
    with pytest.raises(Unsupported, match="torch.export cannot follow .* in 1"):
        export_onnx(nn.Sequential(nn.Linear(4, 4), Branch()), tmp_path / "x.onnx", example_inputs=torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_otherwise_gets_no_name(tmp_path):
    model = convert_(quantize_(mlp(), QuantConfig.weights("int4")))
    with pytest.raises(CheckFailed, match="differs from PyTorch's by"):
        export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 48), tolerance=1e-12)
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path, monkeypatch):
    model, x = mlp(), torch.randn(2, 48)
    cases = (
        ({"path": tmp_path / "m.bin"}, UsageError, "ends in .onnx"),
        ({"opset": 12}, UsageError, "choose one of 21"),
        ({"tolerance": -1.0}, UsageError, "positive share"),
        ({"storage": "tiny"}, UsageError, "nibbles"),
        ({"example_inputs": None}, UsageError, "no example inputs are known for Sequential"),
        ({"example_inputs": "text"}, UsageError, "must be tensors"),
        ({"output_names": ["a", "b"]}, UsageError, "the model has 1 outputs"),
        ({"model": mlp().double()}, Unsupported, "export model.float"),
        ({"model": quantize_(mlp(), QuantConfig.weights("int4"))}, UsageError, "call convert_"),
        ({"path": "/proc/none/m.onnx"}, OutputError, "cannot"),
    )
    for change, kind, words in cases:
        options = {"model": model, "path": tmp_path / "m.onnx", "example_inputs": x, **change}
        with pytest.raises(kind, match=words):
            export_onnx(options.pop("model"), options.pop("path"), **options)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackage, match=r"edgewright\[onnx\]"):
        export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert not list(tmp_path.iterdir())
