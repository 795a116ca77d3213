"""Distributed Lion on a wire: bytes that leave each of four hosts, and the time of a step at 1 Gbit/s and 100 Mbit/s.

Where the machine lets a process have network namespaces of its own, every worker is a host: a namespace with one
network card, tied to a bridge; `tc` limits the card to the rate in both directions, and the kernel's counters of the
card say what was sent, headers included. Elsewhere workers share the loopback, whose counters cover all of them, and a
token bucket stands in for the link: after each step a worker sleeps for what its payload would have taken. The report
says which of the two it was. All of it goes away with the processes.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from edgewright.io.bits import pack_codes
from edgewright.measure.machine import machine
from edgewright.measure.report import Report
from edgewright.measure.timing import Measurement, paired_ratio
from edgewright.systems.distributed_lion.distributed import (
    DistributedLion,
    disable_gradient_allreduce,
    register_distributed_lion_hook,
)
from edgewright.systems.distributed_lion.exchange import wire_bytes

WORLD, ELEMENTS, EXCHANGES, FEWER_EXCHANGES = 4, 4_000_000, 50, 10
RATES = {"unlimited": None, "1 Gbit/s": 1e9, "100 Mbit/s": 1e8}
NEW_NETWORK = 0x40000000  # CLONE_NEWNET
WIDTH, LAYERS, BATCH = 512, 16, 8  # 4.2 million parameters in square matrices
METHODS = (
    "DDP AdamW",
    "DDP AdamW, fp16 hook",
    "DDP AdamW, PowerSGD rank 4",
    "majority vote",
    "vote in the hook",
    "average",
)
BASE = METHODS[0]
REPEATS = 5


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)]
        return nn.Sequential(*layers)


def step_of(method: str, rank: int) -> tuple[Callable[[], None], Callable[[], float]]:
    """(one training step, the payload bytes that a step sends) of a method."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    model = network()
    # PowerSGD's hook sends from callbacks; those of several buckets come in another order on every process
    wrapped = DDP(model, bucket_cap_mb=1024 if "PowerSGD" in method else None)
    elements = sum(parameter.numel() for parameter in model.parameters())
    payload = wire_bytes("fp32", elements, WORLD)
    optimizer: Any
    if "AdamW" in method:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if "fp16" in method:
            wrapped.register_comm_hook(None, fp16_compress_hook)
            payload /= 2
        elif "PowerSGD" in method:
            state = PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
            wrapped.register_comm_hook(state, powerSGD_hook)
            # two factors of rank 4 for each matrix, biases whole
            payload *= LAYERS * (2 * 4 * WIDTH + WIDTH) / elements
    else:
        optimizer = DistributedLion(model.named_parameters(), 1e-4, aggregate="avg" if method == "average" else "mavo")
        (register_distributed_lion_hook if "hook" in method else _plain)(wrapped, optimizer)
        payload = wire_bytes("avg two_phase" if method == "average" else "mavo two_phase", elements, WORLD)
    generator = torch.Generator().manual_seed(rank)

    def step() -> None:
        x = torch.randn(BATCH, WIDTH, generator=generator)
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()

    return step, lambda: payload


def _plain(model: DDP, optimizer: DistributedLion) -> None:
    disable_gradient_allreduce(model)


def sent_by_card() -> int | None:
    """Bytes that the card of this namespace has sent; None on a shared loopback."""
    card = Path("/sys/class/net/eth0/statistics/tx_bytes")
    for line in Path("/proc/net/dev").read_text().splitlines():  # /sys shows the namespace that mounted it
        name, _, numbers = line.partition(":")
        if name.strip() == card.parts[4] and os.environ.get("LION_LINK_NAMESPACE"):
            return int(numbers.split()[8])
    return None


def loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def wire(rank: int) -> dict[str, Any]:
    """Bytes and seconds of an exchange of ELEMENTS, by scheme."""
    found: dict[str, Any] = {}
    gradient = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(rank))
    cases: dict[str, Callable[[], Any]] = {
        "fp32 all-reduce": lambda: dist.all_reduce(gradient.clone()),
        "bf16 all-reduce": lambda: dist.all_reduce(gradient.bfloat16()),
    }
    for name, options in (
        ("majority vote", {}),
        ("majority vote, all_gather", {"topology": "all_gather"}),
        ("average", {"aggregate": "avg", "topology": "two_phase"}),
        ("majority vote, ternary", {"zero": "ternary"}),
    ):
        parameter = nn.Parameter(torch.zeros(ELEMENTS))
        optimizer = DistributedLion([parameter], 1e-4, **options)
        parameter.grad = gradient
        cases[name] = optimizer.step
    for name, case in cases.items():
        case()
        dist.barrier()
        seconds = []
        before, card = loopback_bytes(), sent_by_card()
        count = EXCHANGES if name == "majority vote" else FEWER_EXCHANGES
        for _ in range(count):
            began = time.perf_counter()
            case()
            seconds.append(time.perf_counter() - began)
        dist.barrier()
        sent = (loopback_bytes() - before) / WORLD if card is None else (sent_by_card() or 0) - card
        found[name] = {"bytes": sent / count, "seconds": seconds}
    return found


def steps(rank: int, rate: float | None, bucket: bool) -> dict[str, list[float]]:
    """Seconds of a training step, the methods in turn; `bucket`: this process stands in for the link by sleeping."""
    made = {method: step_of(method, rank) for method in METHODS}
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in range(3 + REPEATS):  # PowerSGD and the rebuilding of buckets begin after two steps
        for method, (step, payload) in made.items():
            dist.barrier()
            began = time.perf_counter()
            step()
            if bucket and rate:
                time.sleep(8 * payload() / rate)
            dist.barrier()
            if turn >= 3:
                found[method].append(time.perf_counter() - began)
    return found


def worker(rank: int, rate: float | None, folder: Path, with_wire: bool, namespaces: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"wire": wire(rank) if with_wire else {}}
    found["steps"] = steps(rank, rate, not namespaces)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def hub(namespaces: bool, folder: Path) -> None:
    """Forks the workers for each rate, and ties their namespaces to a bridge in this process's own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if namespaces:
        if libc.unshare(NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "no network namespace")
        for command in ("link set lo up", "link add bridge type bridge", "link set bridge up"):
            _ip(command)
    import torch._dynamo  # noqa: F401, before the fork: every worker would import it

    for number, (name, rate) in enumerate(RATES.items()):
        place = folder / name.replace(" ", "_").replace("/", "_")
        place.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(29500 + number if namespaces else probe.getsockname()[1])
        children = []
        for rank in range(WORLD):
            ready, done = os.pipe()
            go, start = os.pipe()
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    if namespaces and libc.unshare(NEW_NETWORK):
                        raise OSError(ctypes.get_errno(), "no network namespace")
                    os.write(done, b"1")
                    os.read(go, 1)
                    if namespaces:
                        _ip("link set lo up")
                        _card("eth0", rate, f"10.77.{number}.{rank + 1}/24")
                        os.environ |= {"LION_LINK_NAMESPACE": "1", "GLOO_SOCKET_IFNAME": "eth0"}
                    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_PORT": port}
                    os.environ["MASTER_ADDR"] = f"10.77.{number}.1" if namespaces else "127.0.0.1"
                    worker(rank, rate, place, number == 0, namespaces)
                    code = 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    sys.stderr.flush()
                finally:
                    os._exit(code)
            os.read(ready, 1)
            if namespaces:
                _ip(f"link add host{rank} type veth peer name eth0 netns {child}")
                _ip(f"link set host{rank} master bridge")
                _card(f"host{rank}", rate, None)
            children.append((child, start))
        for _, start in children:
            os.write(start, b"1")
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
        if any(codes):
            raise SystemExit(f"workers ended with {codes}")


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def _card(name: str, rate: float | None, address: str | None) -> None:
    """A card goes up, with its address, and sends no faster than `rate` bits a second."""
    if address:
        _ip(f"addr add {address} dev {name}")
    _ip(f"link set {name} up")
    if rate:
        limit = f"qdisc add dev {name} root tbf rate {rate:.0f}bit burst 128kb latency 400ms"
        subprocess.run(["tc", *limit.split()], check=True, capture_output=True)


def may_have_namespaces() -> bool:
    if not all(shutil.which(tool) for tool in ("ip", "tc", "unshare")):
        return False
    script = "ip link add a type veth peer name b && tc qdisc add dev a root tbf rate 1mbit burst 32kb latency 100ms"
    return subprocess.run(["unshare", "--net", "sh", "-c", script], capture_output=True, check=False).returncode == 0


def packing(report: Report) -> None:
    """Signs of float32 values into bits, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    values: Tensor = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        pack_codes(values > 0, 1)
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    speed = Measurement.of(values.nbytes / 1e9 / s for s in seconds[1:])
    report.add("packing", speed.median, subject="majority vote", se=speed.spread, n=speed.n, unit="GB/s of float32")


def main() -> None:
    from results import save

    namespaces = may_have_namespaces()
    report = Report(f"Distributed Lion between {WORLD} hosts, {ELEMENTS / 1e6:.0f} million elements")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(
            [sys.executable, __file__, "hub", str(int(namespaces)), temporary],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        found = {
            name: [
                json.loads((folder / name.replace(" ", "_").replace("/", "_") / f"{rank}.json").read_text())
                for rank in range(WORLD)
            ]
            for name in RATES
        }
    measured = [one["wire"] for one in found["unlimited"]]
    base = statistics.mean(one["fp32 all-reduce"]["bytes"] for one in measured)
    for scheme in measured[0]:
        sent = [one[scheme]["bytes"] for one in measured]
        seconds = Measurement.of(measured[0][scheme]["seconds"])
        report.add("sent", statistics.mean(sent), subject=scheme, n=len(sent), unit="bytes a host and exchange")
        report.add("fewer_bytes", base / statistics.mean(sent), subject=scheme, unit="x")
        report.add("bits", 8 * statistics.mean(sent) / ELEMENTS, subject=scheme, unit="sent by a host per element")
        report.add("exchange", 1e3 * seconds.median, subject=scheme, se=1e3 * seconds.spread, n=seconds.n, unit="ms")
    for name in RATES:
        times = {method: Measurement.of(found[name][0]["steps"][method]) for method in METHODS}
        for method, taken in times.items():
            ratio = paired_ratio(times[BASE], taken)
            report.add(
                f"step at {name}", 1e3 * taken.median, subject=method, se=1e3 * taken.spread, n=taken.n, unit="ms"
            )
            report.add(f"faster at {name}", ratio.median, subject=method, se=ratio.spread, n=ratio.n, unit="x")
    packing(report)
    how = "network namespaces, cards limited by tc tbf" if namespaces else "shared loopback, token bucket by sleeping"
    report.notes.append(f"link: {how}; {WORLD} processes on {machine().get('cores', '?')} cores")
    report.notes.append(
        f"steps: {WIDTH} x {WIDTH} x {LAYERS} layers, batch {BATCH}; exchanges include clone and update"
    )
    report.print_table()
    print(save(report, "distributed-lion-link"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["hub"]:
        hub(sys.argv[2] == "1", Path(sys.argv[3]))
    else:
        main()
