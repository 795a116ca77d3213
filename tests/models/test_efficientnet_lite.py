"""EfficientNet-Lite0: the published parameter count, and real photographs recognised as what they show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import edgewright
from edgewright.errors import FormatError, UsageError
from edgewright.io import bundled
from edgewright.io.images import normalise, photographs
from edgewright.models.efficientnet_lite import INPUT_SIZE, MEAN, STD, check_size, load_efficientnet_lite0
from tests.fuzz_runs import hostile_pickles, write_pickle
from tests.pickle_guard import guard

# ImageNet classes: tabby, tiger and Egyptian cat; espresso and coffee mug; moped and motor scooter; tripod.
SHOWN = {"cat": {281, 282, 285}, "coffee": {967, 504, 968}, "motorcycle": {665, 670}, "cameraman": {872}}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_efficientnet_lite0()


def test_parameter_count_is_the_published_one(model: torch.nn.Module) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008


@torch.no_grad()
def test_photographs_are_recognised(model: torch.nn.Module) -> None:
    pictures = {**photographs("calibration"), **photographs("evaluation")}
    for name, classes in SHOWN.items():
        image = torch.from_numpy(pictures[name].copy()).permute(2, 0, 1)[None]
        height, width = image.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[..., top : top + side, left : left + side].float()
        square = F.interpolate(square, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True)
        assert int(model(normalise(square, MEAN, STD)).argmax()) in classes, name


def test_odd_sizes_and_the_wrong_door_are_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 32"):
        check_size(100)
    with pytest.raises(UsageError, match="load_efficientnet_lite0"):
        edgewright.load("efficientnet-lite0")


def test_weights_are_read_by_the_restricted_unpickler(tmp_path, monkeypatch):
    with guard() as seen:
        load_efficientnet_lite0()
    assert len(seen.files) == 1 and not seen.violations
    assert seen.unpickled == 5  # the file is of torch before 1.6: five pickles, one behind the other
    file = tmp_path / "weights.pth"
    monkeypatch.setattr(bundled, "bundled_path", lambda name: file)
    for name, data in hostile_pickles(tmp_path / "code-ran").items():
        for zipped in (True, False):
            torch.save({}, file)
            write_pickle(file, data) if zipped else file.write_bytes(data)
            with guard() as seen, pytest.raises(FormatError) as caught:
                load_efficientnet_lite0()
            assert not seen.violations and not (tmp_path / "code-ran").exists() and "\n" not in str(caught.value), name
    for content in ([1, 2], {"odd": torch.ones(1)}, {"a.b.c.d": torch.ones(1)}, {}):
        torch.save(content, file)
        with pytest.raises(FormatError):
            load_efficientnet_lite0()
