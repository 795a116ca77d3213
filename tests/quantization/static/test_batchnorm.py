"""Folded batch norm: phase 1 is nn.BatchNorm, phase 2 in training is the converted layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from edgewright.errors import UsageError
from edgewright.quantization.affine import AffineScheme
from edgewright.quantization.static.batchnorm import STATISTICS, ConvBNQuant2d, fold
from edgewright.quantization.static.freezing import freeze_, freeze_after_

WEIGHTS = AffineScheme(4, symmetric=True, narrow=True, per_channel=True)
LAYERS = {
    "plain": (lambda: nn.Conv2d(3, 6, 3, padding=1, bias=False), (4, 3, 7, 7)),
    "biased": (lambda: nn.Conv2d(3, 6, 3), (4, 3, 7, 7)),
    "depthwise, strided": (lambda: nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6), (4, 6, 8, 8)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same", groups=2), (4, 4, 9, 9)),
    "linear": (lambda: nn.Linear(5, 6), (8, 5)),
}


def pair(kind: str, momentum: float | None = 0.1) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A layer, its batch norm with statistics and parameters away from their defaults, and an input."""
    build, shape = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = build()
        bn = (nn.BatchNorm1d if kind == "linear" else nn.BatchNorm2d)(6, momentum=momentum)
        for tensor in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
            tensor.uniform_(0.5, 2.0)
        return layer, bn, torch.randn(shape)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_quantisation_phase_1_is_batch_norm(kind: str, statistics: str, momentum: float | None) -> None:
    layer, bn, x = pair(kind, momentum)
    ours = ConvBNQuant2d(copy.deepcopy(layer), copy.deepcopy(bn), None, statistics)
    reference = nn.Sequential(layer, bn).train()
    x_ours, x_reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    # spec: within 1e-5; both sides are float32 and sum in different orders
    close = {"rtol": 1e-5, "atol": 2e-5}
    for _ in range(2):
        y, expected = ours.train()(x_ours), reference(x_reference)
        torch.testing.assert_close(y, expected, **close)
        (y.sin().sum() / 10).backward()
        (expected.sin().sum() / 10).backward()
    torch.testing.assert_close(x_ours.grad, x_reference.grad, **close)
    torch.testing.assert_close(ours.weight.grad, layer.weight.grad, **close)
    torch.testing.assert_close(ours.gamma.grad, bn.weight.grad, **close)
    torch.testing.assert_close(ours.beta.grad, bn.bias.grad, **close)
    torch.testing.assert_close(ours.running_mean, bn.running_mean, **close)
    torch.testing.assert_close(ours.running_var, bn.running_var, **close)
    assert int(ours.num_batches_tracked) == 2
    torch.testing.assert_close(ours.eval()(x), reference.eval()(x), **close)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_phase_2_in_training_is_the_converted_layer_bit_for_bit(kind: str, per_channel: bool) -> None:
    layer, bn, x = pair(kind)
    scheme = AffineScheme(4, symmetric=True, narrow=True, per_channel=per_channel)
    ours = ConvBNQuant2d(layer, bn, scheme).train()
    ours(x)
    freeze_(ours)
    ours.train()  # a later call of train() changes nothing: the flag is its own
    mean = ours.running_mean.clone()
    trained = ours(x)
    assert torch.equal(ours.running_mean, mean)
    assert torch.equal(trained, ours.static()(x)) and torch.equal(trained, ours.eval()(x))
    trained.sum().backward()
    assert ours.gamma.grad is not None and ours.weight.grad is not None


@pytest.mark.parametrize("kind", LAYERS)
def test_fold_is_one_layer(kind: str) -> None:
    layer, bn, x = pair(kind)
    folded = copy.deepcopy(layer)
    weight, bias = fold(layer, bn)
    folded.weight.data.copy_(weight)
    folded.bias = nn.Parameter(bias)
    torch.testing.assert_close(folded(x), nn.Sequential(layer, bn).eval()(x), rtol=1e-5, atol=1e-5)


def test_corrected_weights_do_not_jump_with_the_batch() -> None:
    layer, bn, _ = pair("plain", momentum=0.0)  # running statistics stand still: only the batch's change
    codes: dict[str, list[torch.Tensor]] = {"correct": [], "naive": []}
    for statistics, seen in codes.items():
        ours = ConvBNQuant2d(copy.deepcopy(layer), copy.deepcopy(bn), WEIGHTS, statistics).train()
        quantised = ours._quantised
        ours._quantised = lambda w, seen=seen, quantised=quantised: seen.append(quantised(w)) or seen[-1]
        for scale in (0.5, 3.0):
            ours(scale * torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*codes["correct"]) and not torch.equal(*codes["naive"])


@pytest.mark.parametrize("statistics", STATISTICS)
def test_channels_with_gamma_zero_give_beta(statistics: str) -> None:
    layer, bn, x = pair("plain")
    bn.weight.data[2] = 0.0
    ours = ConvBNQuant2d(layer, bn, WEIGHTS, statistics).train()
    y = ours(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:, 2], bn.bias[2].expand_as(y[:, 2]))
    y.sum().backward()
    assert torch.isfinite(ours.weight.grad).all()


def test_one_value_a_channel_is_refused_as_torch_does() -> None:
    layer, bn, _ = pair("biased")
    with pytest.raises(ValueError) as theirs:
        nn.Sequential(layer, bn).train()(torch.randn(1, 3, 3, 3))
    with pytest.raises(ValueError) as ours:
        ConvBNQuant2d(layer, bn).train()(torch.randn(1, 3, 3, 3))
    numbers = str(theirs.value).replace("torch.Size(", "").replace(")", "")
    assert str(ours.value) == numbers


def test_it_freezes_by_itself_and_resumes_in_its_phase() -> None:
    layer, bn, x = pair("plain")
    ours = ConvBNQuant2d(layer, bn, WEIGHTS).train()
    freeze_after_(ours, steps=4, at=0.5)
    means = []
    for _ in range(4):
        ours(x)
        means.append(ours.running_mean.clone())
    assert not torch.equal(means[0], means[1]) and torch.equal(means[1], means[3])
    other = ConvBNQuant2d(*pair("plain")[:2], WEIGHTS).train()
    other.load_state_dict(ours.state_dict())
    other(x + 1)
    assert torch.equal(other.running_mean, means[3])
    freeze_(other, False)
    other(x + 1)
    assert not torch.equal(other.running_mean, means[3])


def test_freezing_past_the_end_is_warned_about() -> None:
    ours = ConvBNQuant2d(*pair("plain")[:2], WEIGHTS)
    with pytest.warns(UserWarning, match="freeze at step 500, but the run has 100"):
        freeze_after_(ours, steps=100, at=500)
    with pytest.raises(UsageError, match="no statistics to freeze"):
        freeze_(nn.Linear(2, 2))


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="6 channels do not fit a batch norm of 5"):
        ConvBNQuant2d(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(5))
    with pytest.raises(UsageError, match="keeps no running statistics"):
        ConvBNQuant2d(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))
    with pytest.raises(UsageError, match="padding_mode='reflect'"):
        ConvBNQuant2d(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(UsageError, match="statistics='batch' is unknown"):
        ConvBNQuant2d(nn.Conv2d(3, 6, 3), statistics="batch")
