"""Static int8 in a .pte: our codes and scales, XNNPACK's integers, and what happens where no integer kernel is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from edgewright.errors import Unsupported
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.executorch.layers import import_executorch
from edgewright.export.executorch.static import FakeQuantizationTrace, has_fake_quantization, place_codes_
from edgewright.export.executorch.verify import QUANTIZED
from edgewright.quantization.static.config import StaticConfig
from edgewright.quantization.static.integer import IntegerExecutor
from edgewright.quantization.static.network import calibrate_, convert_static, quantize_static
from edgewright.runtime.executorch_program import ExecuTorchProgram, weights_of


class Network(nn.Module):
    """All that a mobile network has: uneven padding, depthwise, addition, pooling, concatenation, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.2)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(self.pad(x))
        y = x + self.project(self.deep(x))
        y = torch.cat([self.pool(y), self.pool(x)], 1)
        return self.head(self.drop(y.mean((2, 3))))


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def converted(config: StaticConfig = StaticConfig()) -> nn.Module:  # noqa: B008  (frozen)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Network()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.2, 1.0)
    prepared = quantize_static(model.eval(), images(2), config)
    return convert_static(calibrate_(prepared, images(64).split(16)))


def traced(model: nn.Module, example: torch.Tensor):
    import_executorch()
    with torch.no_grad(), FakeQuantizationTrace():
        return torch.export.export(model.eval(), (example,), strict=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, its export), lowered once for all tests."""
    model = converted()
    path = tmp_path_factory.mktemp("static") / "net.pte"
    return model, export_executorch(model, None, path, example_inputs=images(2), dynamic_batch=True)


# ---- the file


def test_the_file_computes_our_integers(exported):
    model, export = exported
    assert export.delegation.share == 1.0 and not export.delegation.kept and not export.notes
    assert export.static == {"layers": 4, "activations": 7}
    x = images(200, seed=1)
    with ExecuTorchProgram(export.path, check=False) as program:
        ours = torch.cat([torch.from_numpy(program.run([part.numpy()])[0]) for part in x.split(8)])
    executor = IntegerExecutor(model)
    scale = executor.reference(executor.quantize_input(x[:1])).scale
    for theirs in (model(x), executor(x)):
        codes = ((ours - theirs) / scale).round().abs()
        # A value on the border of two codes may take either: floats, our integers and XNNPACK's (a product in float32,
        # halves to even) round it differently. Such a code moves later ones, but by no more than itself.
        assert codes.max() <= 2 and (codes == 0).float().mean() > 0.9
    assert export.checks["relative_error"] <= export.checks["tolerance"] < 0.2


def test_codes_and_scales_are_placed_as_they_are(exported):
    model, export = exported
    data = export.path.read_bytes()
    for name in ("project.0", "head"):  # in XNNPACK's order: output channels last in depthwise layers only
        layer = model.get_submodule(name)
        assert layer.codes.to(torch.int8).numpy().tobytes() in data
        assert layer.scale.numpy().tobytes() in data
        assert layer.weight.detach().numpy().tobytes() not in data
    told = weights_of(export.path)
    biases = 4 * (3 * 16 + 10)
    assert export.parts == {"codes": 16 * 27 + 16 * 9 + 256 + 320, "steps": biases, "float": biases}
    assert told.bytes == sum(export.parts.values()) and told.count == export.parts["codes"] + biases // 4


def test_summary_says_what_became_integers(exported):
    _, export = exported
    assert any("4 layers as codes, 7 activations rounded" in line for line in export.summary())
    assert export.to_dict()["static"]["layers"] == 4


# ---- the program in front of XNNPACK


@pytest.mark.parametrize(
    "config",
    [
        StaticConfig(weight_bits=4, activation_bits=4),
        StaticConfig(granularity="layer"),
        StaticConfig(skip=("deep.0",)),
        StaticConfig(weight_bits=None),
    ],
    ids=["4-bit", "layer", "skip", "float-weights"],
)
def test_placing_changes_no_value(config):
    model, x = converted(config), images(3, seed=2)
    program = traced(model, x)
    placed = place_codes_(program)
    assert not has_fake_quantization(program)
    assert torch.equal(program.module()(x), model(x))  # the same floats, code for code
    expected = 4 - len(config.skip) if config.weight_bits else 0
    assert placed.layers == expected and placed.activations == 7


def test_unsigned_weights_are_placed_around_zero():
    from edgewright.quantization.static.batchnorm import StaticLayer

    model, x = converted(), images(2)
    for layer in model.modules():
        if isinstance(layer, StaticLayer):
            layer.zero += 128
            layer.lowest, layer.highest = layer.lowest + 128, layer.highest + 128
    program = traced(model, x)
    assert place_codes_(program).layers == 4
    assert torch.equal(program.module()(x), model(x))


class FloatEnd(nn.Module):
    """A rounded input and weight, an output that nobody rounds."""

    def __init__(self, per_channel_input: bool = False, scale_from_input: bool = False, bits: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("scale", self.layer.weight.detach().abs().amax(1) / 127)
        self.register_buffer("zero", torch.zeros(4, dtype=torch.int32))
        self.per_channel_input, self.scale_from_input, self.bits = per_channel_input, scale_from_input, bits

    def forward(self, x):
        if self.per_channel_input:
            steps = torch.full((8,), 0.02)
            x = torch.fake_quantize_per_channel_affine(x, steps, torch.zeros(8, dtype=torch.int32), 1, 0, 255)
        else:
            scale = x.abs().amax() / 127 if self.scale_from_input else 0.02
            zero = torch.zeros((), dtype=torch.int32) if self.scale_from_input else 0
            high = 2 ** (self.bits - 1) - 1
            x = torch.fake_quantize_per_tensor_affine(x, scale, zero, -high - 1, high)
        weight = torch.fake_quantize_per_channel_affine(self.layer.weight, self.scale, self.zero, 0, -127, 127)
        return nn.functional.linear(x, weight, self.layer.bias)


def test_a_float_output_keeps_its_layer_float_and_says_so(tmp_path):
    model, x = FloatEnd().eval(), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    export = export_executorch(model, None, tmp_path / "x.pte", example_inputs=[x])
    assert export.static == {"layers": 0, "activations": 1}
    assert len(export.notes) == 1 and "output stays float" in export.notes[0]
    assert export.checks["relative_error"] < 1e-5 and export.parts["codes"] == 0  # the values of the codes


def test_a_program_of_ones_own_is_not_changed(tmp_path):
    model, x = FloatEnd().eval(), torch.randn(2, 8)
    program = torch.export.export(model, (x,), strict=False)
    before = [str(node) for node in program.graph.nodes]
    export = export_executorch(program, None, tmp_path / "x.pte")
    assert export.static["activations"] == 1 and [str(node) for node in program.graph.nodes] == before


# ---- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per_channel_input": True}, "FloatEnd has a scale a channel"),
        ({"scale_from_input": True}, "computes its scale from the input"),
        ({"bits": 16}, "to -32768..32767; XNNPACK takes 8 bits"),
    ],
)
def test_roundings_without_a_kernel_are_refused(options, words):
    with pytest.raises(Unsupported, match=words):
        place_codes_(traced(FloatEnd(**options), torch.randn(2, 8)))


def test_asymmetric_weights_name_their_layer():
    model = converted(replace(StaticConfig(), symmetric=False))
    with pytest.raises(Unsupported, match=r"module stem\.0 \(\w+\) has a zero point of its own"):
        place_codes_(traced(model, images(2)))


def test_another_answer_is_not_kept(tmp_path, monkeypatch):
    """A scale that is off by a tenth must not pass the verification, however generous its tolerance."""
    from edgewright.errors import CheckFailed
    from edgewright.export.executorch import exporter as executorch

    def off(program):
        placed = place_codes_(program)
        for node in program.graph.nodes:
            if "dequantize_per_channel" in str(node.target):
                key = program.graph_signature.inputs_to_buffers[node.args[1].name]
                program.state_dict[key] = program.state_dict[key] * 1.1
        return placed

    monkeypatch.setattr(executorch, "place_codes_", off)
    with pytest.raises(CheckFailed, match="computes something else"):
        export_executorch(converted(), None, tmp_path / "x.pte", example_inputs=images(2))
    assert not list(tmp_path.iterdir()) and QUANTIZED < 0.1
