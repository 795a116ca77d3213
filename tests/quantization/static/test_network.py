"""Preparing, calibrating, training and converting whole networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgewright.errors import FormatError, UsageError
from edgewright.quantization.static.batchnorm import ConvBNQuant2d, StaticLayer
from edgewright.quantization.static.config import StaticConfig, quantization
from edgewright.quantization.static.file import load_static, save_static
from edgewright.quantization.static.freezing import freeze_
from edgewright.quantization.static.network import calibrate_, convert_static, quantize_static, static_report
from edgewright.quantization.static.observers import FixedActivation
from tests.toy_network import images, toy_net


def prepared(config: StaticConfig | None = None, model: nn.Module | None = None) -> nn.Module:
    q = quantize_static(model or toy_net(), images(2), config)
    return calibrate_(q, images(16).split(4))


def test_quantisers_stand_where_integers_will_be() -> None:
    report = static_report(prepared())
    assert report.layers == [
        ("stem", "stem_bn"), ("deep.0", "deep.1"), ("back.0", "back.1"), ("side.0", "side.1"), ("head", ""),
    ]  # fmt: skip
    # the input before its padding, after each activation, the addition after its ReLU; max pooling has none of its own
    assert report.activations == [
        "x", "act", "deep.2", "back.0", "relu", "side.2", "adaptive_avg_pool2d", "head",
    ]  # fmt: skip
    assert not report.left_float and not report.notices


def test_scales_follow_the_rules() -> None:
    q = prepared()
    points = {m.name: m for m in convert_static(q).modules() if isinstance(m, FixedActivation)}
    assert points["deep.2"].scale == pytest.approx(6 / 255) and points["deep.2"].zero == 0  # ReLU6: (0, 6), not watched
    assert points["relu"].scale == points["side.2"].scale  # what is concatenated shares a scale
    assert points["relu"].zero == 0 and points["x"].zero > 0
    watched = {m.name: m for m in convert_static(prepared(StaticConfig(relu6_fixed=False))).modules()
               if isinstance(m, FixedActivation)}  # fmt: skip
    assert watched["deep.2"].scale < 6 / 255


def test_the_float_model_is_untouched_and_reached_by_switching_off() -> None:
    model = toy_net()
    before = copy.deepcopy(model.state_dict())
    q = prepared(model=model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    x = images(4, seed=1)
    with quantization(q, False):
        torch.testing.assert_close(q(x), model(x), rtol=1e-4, atol=1e-5)  # folding multiplies in another order
    assert not torch.equal(q(x), model(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_conversion_and_the_frozen_training_step_are_the_same_arithmetic(bits: int) -> None:
    q = prepared(StaticConfig(weight_bits=bits))
    x = images(4, seed=1)
    converted = convert_static(q)
    assert torch.equal(q(x), converted(x))
    q.train()
    optimizer = torch.optim.SGD(q.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        q(x).square().sum().backward()
        optimizer.step()
    freeze_(q)
    assert torch.equal(q(x), convert_static(q)(x)) and not torch.equal(q(x), converted(x))
    for layer in converted.modules():
        if isinstance(layer, StaticLayer):
            assert int(layer.codes.abs().max()) == 2 ** (bits - 1) - 1
            assert torch.equal(layer.codes * layer.scale.reshape(-1, *[1] * (layer.weight.ndim - 1)), layer.weight)


def test_zero_padding_is_exact() -> None:
    """A network of zeros around an image: padding inside the convolution and before it give the same bits."""
    conv = nn.Conv2d(3, 4, 3, padding=1)
    outside = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3))
    outside[1].load_state_dict(conv.state_dict())
    x = images(4) + 0.1  # asymmetric: zero is not in the middle
    results = [calibrate_(quantize_static(m, x), [x])(x) for m in (nn.Sequential(conv), outside)]
    assert torch.equal(*results)
    entry = next(m for m in convert_static(calibrate_(quantize_static(outside, x), [x])).modules()
                 if isinstance(m, FixedActivation))  # fmt: skip
    assert entry.zero not in (0, 255) and torch.equal(entry(torch.zeros(3)), torch.zeros(3))


def test_checkpoints_of_the_float_model_load() -> None:
    target = prepared(model=toy_net(seed=1))
    target.load_state_dict(toy_net().state_dict())
    x = images(4, seed=1)
    with quantization(target, False):
        torch.testing.assert_close(target(x), toy_net()(x), rtol=1e-4, atol=1e-5)
    other = copy.deepcopy(target)
    other.load_state_dict(toy_net(seed=1).state_dict())
    other.load_state_dict(target.state_dict())
    assert torch.equal(other(x), target(x))


@pytest.mark.parametrize("config", [StaticConfig(weight_bits=5), StaticConfig(symmetric=False, granularity="layer")])
def test_files_hold_the_same_bits(config: StaticConfig, tmp_path) -> None:
    converted = convert_static(prepared(config))
    size = save_static(converted, tmp_path / "toy.safetensors", config)
    assert size == (tmp_path / "toy.safetensors").stat().st_size
    loaded = load_static(toy_net(seed=9), images(2), tmp_path / "toy.safetensors")
    x = images(4, seed=1)
    assert torch.equal(loaded(x), converted(x))
    with pytest.raises(FormatError):
        load_static(nn.Sequential(nn.Conv2d(3, 4, 3)), images(2), tmp_path / "toy.safetensors")
    whole = (tmp_path / "toy.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="not a usable safetensors file"):
        load_static(toy_net(), images(2), tmp_path / "cut.safetensors")


class Gated(nn.Module):
    """An operation between layer and batch norm, a float activation, a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        return self.second(F.silu(self.bn(torch.tanh(self.first(x)))))


def test_what_stands_between_layer_and_batch_norm_stays_float_and_is_listed() -> None:
    q = calibrate_(quantize_static(Gated().eval(), images(2)), [images(4)])
    report = static_report(q)
    assert report.layers == [("first", ""), ("second", "")]
    assert any("tanh" in line for line in report.left_float) and any(
        line.startswith("bn:") for line in report.left_float
    )
    assert report.activations == ["x", "first", "silu", "second"]
    assert torch.equal(q(images(2)), convert_static(q)(images(2)))


class Branching(nn.Module):
    """Control flow that no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        return self.head(x.mean((2, 3)) if x.sum() > -1e9 else x.amax((2, 3)))


def test_a_model_that_cannot_be_traced_is_prepared_by_names() -> None:
    model = Branching().eval()
    model.bn.running_var.fill_(0.5)
    q = calibrate_(quantize_static(model, images(2)), [images(8)])
    report = static_report(q)
    assert not report.traced and report.layers == [("conv", "bn"), ("head", "")]
    x = images(4, seed=1)
    converted = convert_static(q)
    assert torch.equal(q(x), converted(x))
    with torch.no_grad():
        assert float((q(x) - model(x)).abs().max()) < 0.05 * float(model(x).abs().max())
    q.load_state_dict(model.state_dict())
    assert torch.equal(q(x), converted(x))


def test_a_quantised_model_comes_back_as_it_is() -> None:
    q = prepared()
    with pytest.warns(UserWarning, match="quantised already"):
        assert quantize_static(q, images(2)) is q


def test_a_model_without_batch_norm_is_noticed() -> None:
    report = static_report(quantize_static(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images(2)))
    assert report.notices == ["no batch norm was found to fold; the model may be folded already"]


def test_bad_inputs() -> None:
    q = quantize_static(toy_net(), images(2))
    with pytest.raises(ValueError, match="no calibration batch"):
        calibrate_(q, [])
    with pytest.raises(ValueError, match="has no range yet; run calibrate_"):
        q(images(2))
    with pytest.raises(FormatError, match="activation x holds NaN"):
        calibrate_(q, [torch.full((2, 3, 16, 16), float("nan"))])
    for bits in (1, 9):
        with pytest.raises(ValueError, match="2 to 8 bits"):
            StaticConfig(weight_bits=bits)
        with pytest.raises(ValueError, match="2 to 8 bits"):
            StaticConfig(activation_bits=bits)
    with pytest.raises(UsageError, match="no convolution or linear layer"):
        quantize_static(nn.Sequential(nn.ReLU()), images(2))
    with pytest.raises(UsageError, match="no layer to convert"):
        convert_static(toy_net())
    with pytest.raises(UsageError, match="granularity='group'"):
        StaticConfig(granularity="group")
    with pytest.raises(UsageError, match="is not prepared"):
        calibrate_(toy_net(), [images(2)])


def test_a_constant_activation_is_warned_about() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[0].bias.data.fill_(-1e3)
    q = quantize_static(model, images(2))
    with pytest.warns(UserWarning, match="activation 1 was 0 in every"):
        calibrate_(q, [images(2)])
    assert torch.isfinite(q(images(2))).all()


def test_skipped_layers_and_float_halves() -> None:
    q = prepared(StaticConfig(skip=("head", "deep.*")))
    assert [name for name, _ in static_report(q).layers] == ["stem", "back.0", "side.0"]
    x = images(4, seed=1)
    assert torch.equal(q(x), convert_static(q)(x))
    weights_only = prepared(StaticConfig(activation_bits=None))
    assert not static_report(weights_only).activations
    assert torch.equal(weights_only(x), convert_static(weights_only)(x))
    activations_only = prepared(StaticConfig(weight_bits=None))
    assert all(layer.scheme is None for layer in activations_only.modules() if isinstance(layer, ConvBNQuant2d))
    assert torch.equal(activations_only(x), convert_static(activations_only)(x))
