"""Signal to quantisation noise: closed forms, and why one step a layer fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgewright.errors import UsageError
from edgewright.quantization.affine import fake_quantize
from edgewright.quantization.static.config import StaticConfig
from edgewright.quantization.static.network import calibrate_, quantize_static
from edgewright.quantization.static.sqnr import (
    feature_sqnr,
    plot_channel_ranges,
    plot_sqnr,
    save_rows,
    scheme_named,
    sqnr,
    sqnr_report,
)
from tests.toy_network import images, toy_net


@pytest.mark.parametrize(("bits", "expected"), [(8, 48.10), (4, 22.92)])
def test_uniform_weights_have_the_closed_form(bits: int, expected: float) -> None:
    """Signal 1/3, noise step^2 / 12: 4 * (2^(b-1) - 1)^2."""
    weight = torch.linspace(-1, 1, 200001).reshape(1, -1)
    scheme = scheme_named("layer_sym", bits)
    assert float(sqnr(weight, fake_quantize(weight, *scheme.weight_parameters(weight), scheme))) == pytest.approx(
        expected, abs=0.1
    )


def test_no_noise_is_the_ceiling_and_channels_are_apart() -> None:
    x = torch.ones(2, 4)
    assert float(sqnr(x, x)) == 200.0
    assert sqnr(x, x * torch.tensor([[1.0], [0.9]]), channels=True).tolist() == pytest.approx([200.0, 20.0])


def spread_net() -> nn.Module:
    """A depthwise layer whose batch norm scales its channels from 1 to 1000."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
    net[1].weight.data = torch.logspace(0, 3, 8)
    return net


def test_folding_spreads_ranges_and_one_step_a_channel_mends_it(tmp_path) -> None:
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = sqnr_report(spread_net(), x)
    assert len(rows) == 2 * 4 * 3
    deep = {(row.scheme, row.bits): row for row in rows if row.kind == "depthwise"}
    one, each = deep["layer_sym", 8], deep["channel_sym", 8]
    assert one.spread_after > 5 * one.spread_before
    assert each.worst_channel > one.worst_channel + 30
    assert deep["channel_sym", 4].sqnr < deep["channel_sym", 6].sqnr < each.sqnr
    save_rows(rows, tmp_path / "rows.csv")
    plot_sqnr(rows, tmp_path / "sqnr.png")
    assert plot_channel_ranges(spread_net(), x, tmp_path / "ranges.png") == "0"
    assert all((tmp_path / name).stat().st_size > 0 for name in ("rows.csv", "sqnr.png", "ranges.png"))
    with pytest.raises(UsageError, match="layer='x'; it must be one of 0, 2"):
        plot_channel_ranges(spread_net(), x, tmp_path / "ranges.png", "x")


def test_features_lose_more_at_fewer_bits() -> None:
    figures = []
    for bits in (8, 4):
        q = calibrate_(quantize_static(toy_net(), images(2), StaticConfig(weight_bits=bits)), [images(16)])
        figures.append(feature_sqnr(q, [images(8, seed=1)]))
    assert list(figures[0]) == ["x", "act", "deep.2", "back.0", "relu", "side.2", "adaptive_avg_pool2d", "head"]
    assert figures[0]["x"] == figures[1]["x"] and figures[0]["head"] > figures[1]["head"] + 10
    with pytest.raises(UsageError, match="at least one batch"):
        feature_sqnr(q, [])


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(UsageError, match="scheme='row_sym'; it must be one of"):
        scheme_named("row_sym", 8)
