"""Two gloo processes, each with half a batch: started by test_observers.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from edgewright.quantization.static.batchnorm import ConvBNQuant2d
from edgewright.quantization.static.observers import ObserverConfig, RangeObserver


def layer(kind: type) -> ConvBNQuant2d:
    torch.manual_seed(0)
    return ConvBNQuant2d(nn.Conv2d(3, 4, 3), kind(4)).train()


def half(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    whole = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    part = whole[4 * rank : 4 * rank + 4]
    alone = layer(nn.BatchNorm2d)
    expected = alone(whole)
    expected.square().sum().backward()

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    observer = RangeObserver("x", ObserverConfig())
    observer.observe(part)
    assert [float(bound) for bound in observer.range()] == [float(whole.min()), float(whole.max())]
    shared = layer(nn.SyncBatchNorm)
    result = shared(part)
    result.square().sum().backward()
    dist.all_reduce(shared.weight.grad)
    # the same sums in two halves: float32 rounding
    torch.testing.assert_close(result, expected[4 * rank : 4 * rank + 4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared.running_var, alone.running_var, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared.running_mean, alone.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared.weight.grad, alone.weight.grad, rtol=1e-3, atol=1e-3)
    Path(folder, f"equal-{rank}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(half, args=(sys.argv[1],), nprocs=2)
