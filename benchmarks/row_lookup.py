"""Lookups in packed tables beside float ones: rate against the limit of the bytes, latency of requests, size of files.

One table of 2,000,000 x 64, far larger than the cache, bags of 20 ids drawn evenly, so that every row comes from
memory. torch's fused operators (FBGEMM's kernels in torch), our plain torch form, and nn.EmbeddingBag take turns.
The limit is the ratio of the bytes of a row: what a kernel could gain that only waits for memory. `request` rows are a
whole DLRM, one request at a time. Files are what `save_pretrained` writes beside the arithmetic of the format.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgewright.io.row_codes import pack_rows, row_bytes
from edgewright.measure.report import Report
from edgewright.measure.timing import alternate, paired_ratio
from edgewright.systems.dlrm.clicks import JaggedBatch
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.low_precision_recsys import RowwiseQuantEmbeddingBag, apply_recipe, uniform_recipe
from edgewright.systems.low_precision_recsys.tables import Float16Rows, StoredRows
from edgewright.systems.low_precision_recsys.units import find_units
from results import save

ROWS, DIM, BATCH, BAG = 2_000_000, 64, 512, 20
REQUEST_ROWS, TABLES, CALLS = 200_000, 8, 300
BITS = (8, 4, 2)


def tables(rows: int) -> dict[str, nn.Module]:
    """The same random rows in every form, ready to look up."""
    weight = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(0)) * 0.05
    found: dict[str, nn.Module] = {
        "fp32": nn.EmbeddingBag(rows, DIM, mode="sum", include_last_offset=True, _weight=weight).requires_grad_(False)
    }
    for bits in BITS:
        stored = StoredRows(pack_rows(weight, bits))
        found[f"int{bits}, fused"] = RowwiseQuantEmbeddingBag(stored, include_last_offset=True)
        found[f"int{bits}, plain torch"] = RowwiseQuantEmbeddingBag(stored, include_last_offset=True, fused=False)
    found["fp16, plain torch"] = RowwiseQuantEmbeddingBag(
        StoredRows(Float16Rows(weight.half())), include_last_offset=True
    )
    return found


@torch.no_grad()
def add_lookups(report: Report, rows: int, repeats: int) -> None:
    models = tables(rows)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, rows, (repeats + 2, BATCH * BAG), generator=generator)
    offsets = torch.arange(0, BATCH * BAG + 1, BAG)

    def look_up(model: nn.Module, turn: list[int]) -> None:
        model(ids[turn[0]], offsets)  # other rows at every turn: none is in the cache from the last one
        turn[0] += 1

    cases: dict[str, Callable[[], object]] = {name: partial(look_up, model, [0]) for name, model in models.items()}
    times = alternate(cases, repeats=repeats, warmup=2)
    wanted = models["fp32"](ids[0], offsets)
    for name, taken in times.items():
        rate = taken.map(lambda s: BATCH * BAG / s)
        report.add("lookups", rate.median, subject=name, se=rate.spread, n=rate.n, unit="rows/s")
        ratio = paired_ratio(times["fp32"], taken)
        report.add("speed", ratio.median, subject=name, se=ratio.spread, n=ratio.n, unit="x")
        size = 4 * DIM if name == "fp32" else 2 * DIM if "fp16" in name else row_bytes(DIM, int(name[3]))
        report.add("byte_limit", 4 * DIM / size, subject=name, unit="x")
        report.add("of_limit", 100 * ratio.median * size / (4 * DIM), subject=name, unit="%")
        error = float((models[name](ids[0], offsets) - wanted).norm() / wanted.norm())
        report.add("error", error, subject=name)


@torch.no_grad()
def add_requests(report: Report, rows: int) -> None:
    model = DLRM(DLRMConfig(13, (rows,) * TABLES, DIM, (64, DIM), (64, 1))).eval()
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(CALLS, 1, 13, generator=generator)
    ids = torch.randint(0, rows, (CALLS, TABLES, 1), generator=generator)
    ends = (torch.tensor([0, 1]),) * TABLES
    bags = [JaggedBatch(tuple(row.unbind(0)), ends) for row in ids]
    forms = {"fp32": ("fp32", "fp32"), "int8": ("int8", "int8-dynamic"), "int4": ("int4-minmax", "int8-dynamic")}
    forms["int4 tables"] = ("int4-minmax", "fp32")
    models: dict[str, nn.Module] = {}
    for name, options in forms.items():
        low = apply_recipe(model, uniform_recipe(model, *options))
        models[name] = low
        with tempfile.TemporaryDirectory() as folder:
            low.save_pretrained(Path(folder, "model"))
            size = Path(folder, "model", "model.safetensors").stat().st_size
        options_of = {"table": options[0], "linear": options[1]}
        arithmetic = sum(unit.nbytes(options_of[unit.kind]) for unit in find_units(model).values())
        report.add("file_size", size / 1e6, subject=f"request, {name}", unit="MB")
        report.add("file_over_arithmetic", 100 * (size / arithmetic - 1), subject=f"request, {name}", unit="%")

    def serve(low: nn.Module, place: list[int]) -> None:
        low(dense[place[0] % CALLS], bags[place[0] % CALLS])
        place[0] += 1

    cases = {name: partial(serve, low, [0]) for name, low in models.items()}
    for name, taken in alternate(cases, repeats=CALLS, warmup=20).items():
        p50, p99 = np.percentile(taken.samples, [50, 99])
        report.add("latency_p50", 1e6 * float(p50), subject=f"request, {name}", n=CALLS, unit="µs")
        report.add("latency_p99", 1e6 * float(p99), subject=f"request, {name}", n=CALLS, unit="µs")


def measure(rows: int = ROWS, request_rows: int = REQUEST_ROWS, repeats: int = 15) -> Report:
    report = Report(f"Bags of {BAG} ids from a table of {rows} x {DIM}, {BATCH} bags; a DLRM of {TABLES} tables")
    add_lookups(report, rows, repeats)
    add_requests(report, request_rows)
    report.notes.append(f"{torch.get_num_threads()} thread(s); ± is half the interquartile range")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--dry", action="store_true", help="print only, leave results/ alone")
    arguments = parser.parse_args()
    report = measure(arguments.rows, min(arguments.rows, REQUEST_ROWS))
    report.print_table()
    if not arguments.dry:
        print(save(report, "low-precision-recsys-lookup"))


if __name__ == "__main__":
    main()
