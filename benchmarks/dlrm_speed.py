"""DLRM's speed: samples/s beside the gather ceiling of this machine, sparse beside dense gradients, exported files.

The ceiling is what the machine gives when nothing is done but to fetch the rows: `index_select` of as many random rows
from one table of the same bytes. `naive` looks up and computes one sample at a time, the loop that bags replace.
Inference and training are timed in turn with it. `exchange` rows are two gloo processes on this machine: seconds a step
in all-to-all, and the share of them that the bottom network's work covers. Files answer one request at a time.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from edgewright.measure.report import Report
from edgewright.measure.timing import Measurement, alternate, paired_ratio
from edgewright.runtime.program import open_program
from edgewright.systems.dlrm.clicks import ClickData, ClickLoss
from edgewright.systems.dlrm.model import DLRM, DLRMConfig, zipf_ids
from edgewright.systems.dlrm.optimizers import RowwiseAdagrad, dlrm_optimizer
from edgewright.systems.dlrm.serving import export_dlrm, requests
from edgewright.systems.dlrm.sharded import ShardedDLRM, mean_loss
from results import save

ROWS, TABLES, DIM, DENSE, BATCH = 200_000, 8, 64, 13, 2048  # 410 MB of tables, far larger than the cache
BOTTOM, TOP = (64, DIM), (64, 1)
STEPS = 20  # of the exchange
CALLS = 300


def make_model(rows: int = ROWS) -> DLRM:
    return DLRM(DLRMConfig(DENSE, (rows,) * TABLES, DIM, BOTTOM, TOP))


def make_batch(rows: int = ROWS, exponent: float = 0.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """One id a table; exponent 0: every row alike, so that the cache helps nobody."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([zipf_ids(BATCH, rows, exponent, generator) for _ in range(TABLES)], 1).to(torch.int32)
    labels = torch.randint(0, 2, (BATCH,), generator=generator).float()
    return {"dense": torch.randn(BATCH, DENSE, generator=generator), "ids": ids, "labels": labels}


def compute_cases() -> dict[str, Callable[[], object]]:
    """Each case works on BATCH samples, `naive` on 64 of them."""
    model, batch = make_model(), make_batch()
    data = ClickData(None, batch["dense"], batch["ids"], batch["labels"])  # type: ignore[arg-type]
    table = torch.cat([t.weight.detach() for t in model.tables])  # one table of the same bytes
    offsets = torch.arange(TABLES) * ROWS
    places = (batch["ids"].long() + offsets).flatten()
    loss, slots = ClickLoss((1,) * TABLES), (1,) * TABLES
    sparse = dlrm_optimizer(model)
    dense_model = make_model()
    for each in dense_model.tables:
        each.sparse = False  # type: ignore[union-attr]
    dense = dlrm_optimizer(dense_model)
    from edgewright.systems.dlrm.clicks import jagged

    bags = jagged(data.ids, slots)
    singles = [(batch["dense"][i : i + 1], jagged(data.ids[i : i + 1], slots)) for i in range(64)]

    @torch.no_grad()
    def forward() -> object:
        return model(batch["dense"], bags)

    @torch.no_grad()
    def naive() -> object:
        return [model(*single) for single in singles]

    def train(network: DLRM, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad()
            loss(network, batch).backward()
            optimizer.step()

        return step

    def ceiling() -> None:
        """What a step cannot do without: read the rows, read and write them again."""
        rows = table.index_select(0, places)
        table.index_add_(0, places, rows, alpha=0.0)

    return {
        "gather": lambda: table.index_select(0, places),
        "gather and update": ceiling,
        "inference": forward,
        "naive": naive,
        "training, sparse gradients": train(model, sparse),
        "training, dense gradients": train(dense_model, dense),
    }


def add_compute(report: Report, repeats: int) -> None:
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        torch.set_num_threads(threads)
        times = alternate(compute_cases(), repeats=repeats, warmup=1)
        label = f"{threads} thread{'s' if threads > 1 else ''}"
        for name, taken in times.items():
            count = 64 if name == "naive" else BATCH
            rate = taken.map(lambda s, n=count: n / s)  # type: ignore[misc]
            subject = f"{name}, {label}"
            report.add("samples", rate.median, subject=subject, se=rate.spread, n=rate.n, unit="samples/s")
            base = times["gather and update" if name.startswith("training") else "gather"]
            share = paired_ratio(base, taken).map(lambda r, n=count: 100 * r * n / BATCH)  # type: ignore[misc]
            report.add("of_ceiling", share.median, subject=subject, se=share.spread, n=share.n, unit="%")
    touched = len(torch.unique(make_batch()["ids"].long() + torch.arange(TABLES) * ROWS))
    row = 4 * DIM
    # gradient written and read, row read and written, and one accumulator of 4 bytes read and written
    report.add("bytes_per_step", touched * (4 * row + 8), subject="training, sparse gradients", unit="bytes")
    report.add("bytes_per_step", ROWS * TABLES * (4 * row + 8), subject="training, dense gradients", unit="bytes")


def add_exchange(report: Report) -> None:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        file = Path(folder, "clock.pt")
        processes.spawn(_process, args=(port, str(file)), nprocs=2)
        found = torch.load(file, weights_only=True)
    for name, seconds in found.items():
        measured = Measurement.of(seconds.tolist())
        unit = "%" if name == "exchange_hidden" else "ms"
        report.add(name, measured.median, subject="2 processes, one thread each", se=measured.spread, n=measured.n,
                   unit=unit)  # fmt: skip


def _process(rank: int, port: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    sharded = ShardedDLRM(make_model(ROWS // 8), plan="table")
    clock = sharded.clock
    assert clock is not None
    tables = RowwiseAdagrad(list(sharded.sparse_parameters()))
    networks = torch.optim.Adam(list(sharded.dense_parameters()))
    from edgewright.systems.dlrm.clicks import jagged

    batch = make_batch(ROWS // 8, seed=rank)
    bags = jagged(batch["ids"], (1,) * TABLES)
    rows: dict[str, list[float]] = {"step": [], "exchange": [], "exchange_hidden": []}
    for step in range(STEPS + 3):
        clock.flying = clock.waiting = 0.0
        start = time.perf_counter()
        for parameter in sharded.parameters():
            parameter.grad = None
        mean_loss(sharded(batch["dense"], bags), batch["labels"]).backward()
        sharded.sync_gradients()
        networks.step()
        tables.step()
        if step >= 3:
            rows["step"].append(1e3 * (time.perf_counter() - start))
            rows["exchange"].append(1e3 * clock.flying)
            rows["exchange_hidden"].append(100 * clock.hidden)
    if rank == 0:
        torch.save({name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}, file)
    dist.destroy_process_group()


def add_files(report: Report) -> None:
    from edgewright.systems.dlrm.clicks import jagged

    model = make_model(10_000).eval()
    batch = make_batch(10_000)
    single: Any = requests(model, batch["dense"][:1], jagged(batch["ids"][:1], (1,) * TABLES), (1,) * TABLES)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("model.onnx", "model.pte"):
            path = Path(folder, name)
            done = export_dlrm(model, path)
            with open_program(path, threads=1, check=False) as program:
                seconds = []
                for _ in range(CALLS + 20):
                    start = time.perf_counter()
                    program.run(single)
                    seconds.append(time.perf_counter() - start)
            p50, p99 = np.percentile(seconds[20:], [50, 99])
            report.add("file_size", done.bytes / 1e6, subject=name, unit="MB")
            report.add("latency_p50", 1e6 * float(p50), subject=name, n=CALLS, unit="µs")
            report.add("latency_p99", 1e6 * float(p99), subject=name, n=CALLS, unit="µs")


def measure(repeats: int = 9) -> Report:
    report = Report(f"DLRM: {TABLES} tables of {ROWS} x {DIM}, batches of {BATCH}")
    threads = torch.get_num_threads()
    add_compute(report, repeats)
    torch.set_num_threads(threads)
    add_exchange(report)
    add_files(report)
    return report


def main() -> None:
    report = measure()
    report.print_table()
    print(save(report, "dlrm-speed"))


if __name__ == "__main__":
    main()
