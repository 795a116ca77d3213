"""Static int8 in ONNX: torch's fake quantisation becomes QDQ with torch's codes, and integer sums stay exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgewright.errors import Unsupported, UsageError
from edgewright.export.onnx.exporter import export_onnx
from edgewright.export.onnx.graph import eight_bits
from edgewright.runtime.program import open_program
from tests.export.onnx.onnx_models import images, initializers, operators, small_cnn

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
        assert codes.dtype == np.uint8  # around 128
        assert np.array_equal((codes.astype(np.int16) - 128) * scale.numpy()[:, None, None, None], exact.numpy())
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
    assert codes.min() >= 128 - 7 and codes.max() == 128 + 7


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


# ---- integer sums that do not fit 16 bits


class LargeSums(nn.Module):
    """A layer whose weights are codes of 100 to 127, most of one sign, on inputs of large codes."""

    def __init__(self, kind: str, signed: bool, out_step: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = {"convolution": (8, 16, 3, 3), "depthwise": (8, 1, 3, 3), "linear": (8, 16)}[kind]
        signs = torch.where(torch.rand(shape, generator=generator) < 0.8, 1, -1)
        self.codes = torch.randint(100, 128, shape, generator=generator) * signs
        self.weight = nn.Parameter(self.codes * 0.01)
        self.register_buffer("scale", torch.full((8,), 0.01))
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int32))
        self.kind, self.signed, self.out_step = kind, signed, out_step

    def rounded(self, x: torch.Tensor, step: float) -> torch.Tensor:
        low, high = (-128, 127) if self.signed else (0, 255)
        return torch.fake_quantize_per_tensor_affine(x, step, low, low, high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zeros, 0, -127, 127)
        x = self.rounded(x, 1.0)
        if self.kind == "linear":
            y = nn.functional.linear(x, weight)
        else:
            y = nn.functional.conv2d(x, weight, groups=8 if self.kind == "depthwise" else 1)
        return self.rounded(y.relu(), self.out_step)


def large_sums(kind: str, signed: bool) -> tuple[LargeSums, torch.Tensor, np.ndarray]:
    """(model, inputs, the exact answer from sums of integers)."""
    shape = {"convolution": (2, 16, 6, 6), "depthwise": (2, 8, 6, 6), "linear": (2, 16)}[kind]
    x = torch.randint(200, 256, shape, generator=torch.Generator().manual_seed(1)).double()
    codes = LargeSums(kind, signed, 1.0).codes.double()  # float64 holds every sum exactly
    sums = x @ codes.T if kind == "linear" else nn.functional.conv2d(x, codes, groups=8 if kind == "depthwise" else 1)
    out_step = float(np.float32(float(sums.max()) * 0.01 / 250))
    answer = (sums.clamp(min=0).numpy() * float(np.float32(0.01)) / out_step).round().clip(0, 255)
    return LargeSums(kind, signed, out_step).eval(), x.float(), (answer * out_step).astype(np.float32)


@pytest.mark.parametrize("signed", [False, True], ids=["uint8-inputs", "int8-inputs"])
@pytest.mark.parametrize("kind", ["convolution", "depthwise", "linear"])
def test_sums_beyond_16_bits_are_exact(kind, signed, tmp_path):
    model, x, answer = large_sums(kind, signed)
    result = export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert runtime_operators(result.path) & {"QLinearConv", "QGemm"}  # in integers, or it would prove nothing
    with open_program(result.path, threads=1, check=False) as program:
        np.testing.assert_allclose(program.run([x.numpy()])[0], answer, rtol=1e-6)  # the same codes, times a float


def test_signed_codes_are_for_those_who_ask(tmp_path):
    model, x, answer = large_sums("linear", False)
    path = tmp_path / "signed.onnx"
    export_onnx(model, path, example_inputs=x, integers="signed", tolerance=10.0)
    assert next(a for key, a in initializers(path).items() if key.startswith("weight_codes")).dtype == np.int8
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    if "avx2" in text and "vnni" not in text:  # where the hazard is, it is seen, so that nobody takes the default away
        with open_program(path, threads=1, check=False) as program:
            assert np.abs(program.run([x.numpy()])[0] - answer).max() > 10 * model.out_step
    with pytest.raises(UsageError, match="one of unsigned, signed"):
        export_onnx(model, path, example_inputs=x, integers="int8")


def test_eight_bits_keeps_every_value():
    codes, zero = np.arange(-128, 128).astype(np.int8), np.array(-3, np.int8)
    stored, point = eight_bits(codes, zero, "unsigned")
    assert stored.dtype == point.dtype == np.uint8
    assert np.array_equal(stored.astype(int) - int(point), codes.astype(int) + 3)
    assert eight_bits(codes, zero, "signed")[0] is codes
    small = np.arange(4).astype(np.uint8)
    assert eight_bits(small, small[:1], "unsigned")[0] is small


def runtime_operators(path: Path) -> set[str]:
    """The operators that ONNX Runtime makes of a file."""
    import onnxruntime

    optimized = path.with_suffix(".optimized")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(str(optimized)).graph.node}
