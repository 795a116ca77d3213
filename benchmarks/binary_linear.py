"""A binary linear layer multiplied as bits, beside torch's float32 layer of the same shape.

Both layers of MiniLM's feed-forward network, at batches of 1 and 32 rows and 512 for the larger picture, on one thread
and on all. Inputs are float in every case: the binary layer's time includes turning them into bits. `kernel` is the
compiled path, `torch` the same in plain torch, `codes` a float product of the unpacked codes (what a machine without a
compiler gets).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from edgewright.kernels.popcount import binary_linear, pack_bits, tile, why_no_kernel
from edgewright.measure.report import Report
from edgewright.measure.timing import alternate, paired_ratio
from results import save

SHAPES = ((384, 1536), (1536, 384))
ROWS = (1, 32, 512)
CALLS = 20  # in one sample: a single call lasts microseconds


def cases(n: int, out: int, rows: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, n, generator=generator)
    signs = torch.randn(out, n, generator=generator) >= 0
    words, alpha_x, alpha_w, bias = pack_bits(signs), torch.tensor(0.7), torch.tensor([0.03]), torch.zeros(out)
    tiles, weight = tile(words), (signs.float() * 2 - 1) * alpha_w

    def binary(path: str) -> torch.Tensor:
        return binary_linear(x, words, alpha_x=alpha_x, alpha_w=alpha_w, bias=bias, tiles=tiles, path=path)

    paths = {"float32": lambda: F.linear(x, weight, bias)}
    if why_no_kernel() is None:
        paths["kernel"] = lambda: binary("kernel")
    if rows <= 32:  # plain torch needs tens of milliseconds a row
        paths["torch"] = lambda: binary("torch")
    return paths | {"codes": lambda: binary("float")}


def repeated(case: Callable[[], object], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            case()

    return run


def main(repeats: int = 7) -> None:
    report = Report("Binary linear layer as bits, beside float32")
    if reason := why_no_kernel():
        report.notes.append(f"no compiled kernel here: {reason}")
    most = torch.get_num_threads()
    for threads in dict.fromkeys((1, most)):
        torch.set_num_threads(threads)
        for n, out in SHAPES:
            for rows in ROWS:
                calls = {name: 1 if name == "torch" else CALLS for name in cases(n, out, rows)}
                timed = {name: repeated(case, calls[name]) for name, case in cases(n, out, rows).items()}
                times = alternate(timed, repeats=repeats, warmup=1)
                each = {name: time.map(lambda s, k=calls[name]: s / k, "s") for name, time in times.items()}
                for name, time in each.items():
                    subject = f"{name}, {n} to {out}, batch {rows}, {threads} thread{'s' if threads > 1 else ''}"
                    rate = time.map(lambda s, m=rows * n * out: m / s / 1e9)
                    report.add("time", time.median * 1e6, subject=subject, se=time.spread * 1e6, n=time.n, unit="us")
                    report.add("products", rate.median, subject=subject, se=rate.spread, n=rate.n, unit="GMAC/s")
                    ratio = paired_ratio(each["float32"], time)
                    report.add("speedup", ratio.median, subject=subject, se=ratio.spread, n=ratio.n)
    torch.set_num_threads(most)
    report.print_table()
    print(save(report, "bit-linear"))


if __name__ == "__main__":
    main()
