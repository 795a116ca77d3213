"""A convolutional network as an int8 ONNX file: python examples/int8_network.py FILE.onnx"""

from __future__ import annotations

import sys

import torch
from torch import nn

from edgewright import export_onnx, open_program
from edgewright.systems.int8_whitepaper import calibrate_, convert_static, quantize_static


def main(target: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prepared = calibrate_(quantize_static(network, images[:2]), images.split(16))
    done = export_onnx(convert_static(prepared), target, example_inputs=images[:1], original=network)
    with open_program(done.path) as program:
        (scores,) = program.run([images.numpy()])
    agree = (torch.from_numpy(scores).argmax(1) == network(images).argmax(1)).float().mean()
    print(f"{done.path}: {done.bytes} bytes, {agree:.0%} of first choices as in float")


if __name__ == "__main__":
    main(*sys.argv[1:])
