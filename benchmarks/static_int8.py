"""EfficientNet-Lite0 in int8 beside torchao's pt2e with ExecuTorch's XNNPACK quantiser: points, SQNR, first choices.

python benchmarks/static_int8.py [--images 64]    # results/int8-whitepaper-pt2e.csv

Both calibrate on the same crops and are compared with the float network on others; both run as simulated integers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from edgewright import Report
from edgewright.io.images import image_crops, normalise
from edgewright.models.efficientnet_lite import INPUT_SIZE, MEAN, STD, load_efficientnet_lite0
from edgewright.quantization.static.observers import FixedActivation
from edgewright.quantization.static.sqnr import sqnr
from edgewright.systems.int8_whitepaper import calibrate_, convert_static, quantize_static
from results import save


def pt2e(network: torch.nn.Module, images: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """The network through prepare_pt2e and convert_pt2e; the points at which it rounds activations."""
    batch = torch.export.Dim("batch", min=2, max=1024)
    graph = torch.export.export(network, (images[:2],), dynamic_shapes=({0: batch},)).module()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(graph, quantizer)
    for part in images.split(8):
        prepared(part)
    converted = convert_pt2e(prepared)
    rounding = torch.ops.quantized_decomposed.quantize_per_tensor.default
    return converted, sum(node.target is rounding for node in converted.graph.nodes)


def ours(network: torch.nn.Module, images: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """The same through quantize_static, calibrate_ and convert_static."""
    converted = convert_static(calibrate_(quantize_static(network, images[:2]), images.split(8)))
    return converted, sum(isinstance(module, FixedActivation) for module in converted.modules())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    network = load_efficientnet_lite0().eval()
    calibration = normalise(image_crops(args.images, INPUT_SIZE), MEAN, STD)
    images = normalise(image_crops(args.images, INPUT_SIZE, seed=1, split="evaluation"), MEAN, STD)
    report = Report("int8-whitepaper-pt2e", {"images": args.images})
    with torch.no_grad():
        reference = network(images)
        for name, make in (("edgewright", ours), ("torchao pt2e", pt2e)):
            model, points = make(network, calibration)
            output = torch.cat([model(part) for part in images.split(8)])
            per_image = torch.stack([sqnr(a, b) for a, b in zip(reference, output, strict=True)])
            same = (output.argmax(1) == reference.argmax(1)).double()
            count = len(images)
            report.add("points", points, subject=name)
            report.add(
                "sqnr",
                float(per_image.mean()),
                subject=name,
                se=float(per_image.std()) / count**0.5,
                n=count,
                unit="dB",
            )
            share, error = 100 * float(same.mean()), 100 * float(same.std()) / count**0.5
            report.add("first_choice", share, subject=name, se=error, n=count, unit="%")
    report.print_table()
    print(save(report, "int8-whitepaper-pt2e"))


if __name__ == "__main__":
    main()
