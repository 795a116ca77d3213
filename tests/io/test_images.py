"""Pictures: two disjoint splits, the same crops for the same seed, readable errors."""

from __future__ import annotations

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.io.images import PHOTOGRAPHS, digits, image_crops, normalise, photographs, video_frames


def test_photographs_and_frames_are_colour_pictures_and_splits_share_none() -> None:
    assert not set(PHOTOGRAPHS["calibration"]) & set(PHOTOGRAPHS["evaluation"])
    for split in ("calibration", "evaluation"):
        pictures = {**photographs(split), **video_frames(split, 2)}
        assert len(pictures) == 6 + (2 if split == "calibration" else 4)
        for picture in pictures.values():
            assert picture.dtype == "uint8" and picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 5


def test_crops_repeat_with_their_seed_and_differ_with_another() -> None:
    first, again, other = image_crops(12, 32, 3), image_crops(12, 32, 3), image_crops(12, 32, 4)
    assert first.shape == (12, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(image_crops(5, 32, 3), first[:5])


def test_digits_are_split_by_writer_and_scaled() -> None:
    (train, labels), (test, _) = digits("calibration"), digits("evaluation")
    assert len(train) == 1297 and len(test) == 500 and train.shape[1:] == (1, 8, 8)
    assert train.min() == 0 and train.max() == 1 and set(labels.tolist()) == set(range(10))


def test_normalise_is_the_plain_formula() -> None:
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8)
    assert normalise(pixels, 127.0, 128.0).tolist() == [-127 / 128, 0.0, 1.0]


@pytest.mark.parametrize("call", [lambda: photographs("test"), lambda: video_frames("x"), lambda: digits("all")])  # type: ignore[arg-type]
def test_unknown_split_names_the_choices(call: object) -> None:
    with pytest.raises(UsageError, match="calibration"):
        call()  # type: ignore[operator]


def test_impossible_crops_are_refused() -> None:
    with pytest.raises(UsageError, match="0 crops"):
        image_crops(0, 32)
