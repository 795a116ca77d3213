"""Ranges of activations: averages, percentiles, what is refused, several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.quantization.affine import AffineScheme
from edgewright.quantization.static.observers import ActivationQuantizer, ObserverConfig, RangeObserver
from tests.processes import run_script

BATCHES = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([0.0, 6.0])]


def watched(config: ObserverConfig, batches: list[torch.Tensor]) -> tuple[float, float]:
    observer = RangeObserver("stem", config)
    for batch in batches:
        observer.observe(batch)
    low, high = observer.range()
    return float(low), float(high)


def test_extremes_over_all_batches() -> None:
    assert watched(ObserverConfig("minmax"), BATCHES) == (-3.0, 6.0)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_moving_average_is_corrected_for_its_start(decay: float) -> None:
    low = high = weight = 0.0
    for batch in BATCHES:
        low = decay * low + (1 - decay) * float(batch.min())
        high = decay * high + (1 - decay) * float(batch.max())
        weight = decay * weight + (1 - decay)
    # the running form in float32 against the closed form in Python's double
    assert watched(ObserverConfig("ema", decay), BATCHES) == pytest.approx((low / weight, high / weight), rel=1e-6)


def test_percentiles_leave_out_outliers() -> None:
    x = torch.cat((torch.linspace(-1, 1, 9999), torch.tensor([1e6])))
    low, high = watched(ObserverConfig("percentile", percentile=0.999), [x])
    assert -1 < low < -0.99 and 0.99 < high < 1.01


def test_a_known_range_is_not_watched() -> None:
    observer = RangeObserver("stem", ObserverConfig(), fixed=(0.0, 6.0))
    observer.observe(torch.tensor([100.0]))
    assert [float(bound) for bound in observer.range()] == [0.0, 6.0]


@pytest.mark.parametrize("mode", ["ema", "minmax", "percentile"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_that_names_the_node(mode: str, value: float) -> None:
    with pytest.raises(FormatError, match="activation stem holds NaN or infinity"):
        watched(ObserverConfig(mode, percentile=1.0), [torch.tensor([0.0, value, 1.0])])


def test_without_batches_there_is_no_range() -> None:
    with pytest.raises(ValueError, match="stem has no range yet"):
        watched(ObserverConfig(), [])


def test_a_constant_activation_is_warned_about_by_name() -> None:
    quantizer = ActivationQuantizer("block.3", AffineScheme(8), ObserverConfig())
    quantizer.observer.observe(torch.zeros(4))
    with pytest.warns(UserWarning, match="block.3 was 0 in every"):
        assert quantizer.warn_if_constant()
    assert torch.equal(quantizer.eval()(torch.zeros(3)), torch.zeros(3))


def test_training_watches_until_it_is_frozen() -> None:
    quantizer = ActivationQuantizer("stem", AffineScheme(8), ObserverConfig("minmax"))
    quantizer(torch.tensor([0.0, 1.0]))
    quantizer.clock.frozen.fill_(True)
    quantizer(torch.tensor([0.0, 9.0]))
    assert float(quantizer.observer.high) == 1.0
    restored = ActivationQuantizer("stem", AffineScheme(8), ObserverConfig("minmax"))
    restored.load_state_dict(quantizer.state_dict())  # the flag is a part of the checkpoint
    restored.train()(torch.tensor([0.0, 9.0]))
    assert float(restored.observer.high) == 1.0


@pytest.mark.parametrize("settings", [{"mode": "mean"}, {"decay": 1.0}, {"percentile": 0.3}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(UsageError):
        ObserverConfig(**settings)


def test_two_processes_share_ranges_and_statistics(tmp_path: Path) -> None:
    """Ranges and synchronised batch-norm statistics of two halves are those of the whole batch."""
    script = Path(__file__).with_name("pair.py")
    run_script(script, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("equal-*")) == ["equal-0", "equal-1"]
