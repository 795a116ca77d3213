"""Integer-only execution against fake quantisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgewright.errors import Unsupported, UsageError
from edgewright.quantization.static.config import StaticConfig
from edgewright.quantization.static.integer import IntegerExecutor, fixed_point, rescale
from edgewright.quantization.static.network import calibrate_, convert_static, quantize_static
from tests.toy_network import images, toy_net


def converted(model: nn.Module, config: StaticConfig | None = None) -> nn.Module:
    return convert_static(calibrate_(quantize_static(model.eval(), images(2), config), images(16).split(4)))


def test_the_vector_of_the_multiplier() -> None:
    whole, shift = fixed_point(torch.tensor(0.0023, dtype=torch.float64))
    assert (int(whole), int(shift)) == (1264438372, 39)
    sums = torch.tensor([1000, -777, 43478, 217, 218], dtype=torch.int32)
    assert rescale(sums, whole, shift).tolist() == [2, -2, 100, 0, 1]


def test_multipliers_keep_31_bits_over_all_sizes() -> None:
    multipliers = torch.logspace(-12, 3, 400, dtype=torch.float64)
    whole, shift = fixed_point(multipliers)
    plain = shift < 62
    assert bool(((whole >= 2**30) & (whole < 2**31))[plain].all())
    back = whole.double() * torch.pow(2.0, -shift.double())
    assert float(((back - multipliers) / multipliers).abs()[plain].max()) <= 2.0**-31
    tiny = rescale(torch.tensor([2**31 - 1], dtype=torch.int64), *fixed_point(torch.tensor([1e-12])))
    assert tiny.tolist() == [0]


def test_integers_beside_a_numpy_like_double_loop() -> None:
    """The first layer's int32 sums against the definition, element by element."""
    from edgewright.quantization.static.batchnorm import StaticLayer
    from edgewright.quantization.static.integer import Codes, _compute

    config = StaticConfig(symmetric=False)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1)
    model = converted(nn.Sequential(nn.Conv2d(3, 2, 1), conv), config)
    layer = [m for m in model.modules() if isinstance(m, StaticLayer)][1]
    x = torch.randint(0, 256, (1, 2, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    zero, step = 37, 0.02
    result = _compute(Codes(x, step, zero), layer)
    codes, zeros = layer.codes, layer.zero
    for out in range(3):
        bias = round(float(layer.bias[out].double()) / (float(layer.scale[out].double()) * step))
        for row in range(3):
            for column in range(3):
                total = bias
                for i in range(2):
                    for a in range(3):
                        for b in range(3):
                            r, c = 2 * row + a - 1, 2 * column + b - 1
                            inside = 0 <= r < 5 and 0 <= c < 5
                            value = int(x[0, i, r, c]) - zero if inside else 0
                            total += (int(codes[out, i, a, b]) - int(zeros[out])) * value
                assert int(result.sums[0][0, out, row, column]) == total


@pytest.mark.parametrize(
    "config",
    [
        StaticConfig(),
        StaticConfig(granularity="layer", symmetric=False),
        StaticConfig(symmetric=False),
        StaticConfig(weight_bits=4),
        StaticConfig(activation_bits=4),
        StaticConfig(relu6_fixed=False),
    ],
    ids=["default", "layer, asymmetric", "channel, asymmetric", "4-bit weights", "4-bit activations", "watched ReLU6"],
)
def test_integers_equal_fake_quantisation(config: StaticConfig) -> None:
    model = converted(toy_net(), config)
    executor = IntegerExecutor(model)
    x = images(512, seed=1)
    for name, match in executor.compare(x).items():
        # floats sum in another order and torch rounds halves to even: a code next door, hardly ever
        assert match.worst <= 1 and match.equal > 0.999, (name, match)
    result = executor.reference(executor.quantize_input(x))
    assert result.codes.dtype == torch.int32
    expected = torch.round(model(x) / result.scale).to(torch.int32) + result.zero
    assert int((result.codes - expected).abs().max()) <= 1
    assert float((result.codes == expected).double().mean()) > 0.95  # 160 logits behind five layers


class Poolings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same", dilation=2)
        self.average = nn.AvgPool2d(2, 2)

    def forward(self, x):
        x = F.pad(F.relu6(self.conv(x)), (1, 1, 0, 2))
        x = F.max_pool2d(self.average(x), 3, 2, 1)
        return torch.flatten(F.relu(x).mean((2, 3), keepdim=True), 1)


def test_poolings_and_padding() -> None:
    model = converted(Poolings())
    for name, match in IntegerExecutor(model).compare(images(8, seed=1)).items():
        assert match.worst <= 1 and match.equal > 0.999, (name, match)


def test_a_channel_without_weight_keeps_its_bias() -> None:
    """A channel of weight 1e-9 and bias 2.99, as batch norm leaves them: no int32 holds it in units of its step."""
    conv = nn.Conv2d(3, 4, 3)
    conv.weight.data[1] *= 1e-9
    conv.bias.data[1] = 2.99
    model = converted(nn.Sequential(conv, nn.ReLU6()))
    for match in IntegerExecutor(model).compare(images(8, seed=1)).values():
        assert match.worst <= 1 and match.equal > 0.999, match


def test_what_has_no_integer_form_is_refused_by_name() -> None:
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1)))
    executor = IntegerExecutor(model)
    with pytest.raises(Unsupported, match="_1 .float. has no integer form"):
        executor(images(2))
    with pytest.raises(UsageError, match="needs a traced model"):
        IntegerExecutor(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="needs a traced model"):
        IntegerExecutor(converted(toy_net(), StaticConfig(activation_bits=None)))
