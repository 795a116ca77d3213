"""Distributed Lion under DistributedDataParallel: gradients that stay local, or votes sent during backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from edgewright.errors import UsageError
from edgewright.systems.distributed_lion.distributed import DistributedLion
from edgewright.systems.distributed_lion.exchange import Exchange
from edgewright.systems.distributed_lion.lion import advance_


def disable_gradient_allreduce(model: nn.Module) -> None:
    """Let every process keep its own gradients: a communication hook of DDP that sends nothing.

    For DistributedLion in its plain form, before the first backward. Buffers are still broadcast.
    """
    _wrapped(model).register_comm_hook(None, noop_hook)


class LocalGradients:
    """A loss function for `fit` in a distributed run, after whose first call gradients stay local.

    `fit` wraps the model by itself, so that this is where its wrapper is met: fit(model, LocalGradients(loss), ...,
    optimizer=DistributedLion(...)). State of the loss function is passed through.
    """

    def __init__(self, loss_function: Callable[[nn.Module, Any], Any]) -> None:
        self._loss_function = loss_function
        self._seen: nn.Module | None = None
        if hasattr(loss_function, "load_state_dict"):
            self.state_dict = getattr(loss_function, "state_dict")  # noqa: B009, a function has none
            self.load_state_dict = getattr(loss_function, "load_state_dict")  # noqa: B009

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        if isinstance(model, DistributedDataParallel) and model is not self._seen:
            disable_gradient_allreduce(model)
            self._seen = model
        return self._loss_function(model, batch)


def register_distributed_lion_hook(model: nn.Module, optimizer: DistributedLion) -> None:
    """Vote during backward: when a bucket of DDP is full, its votes leave; optimizer.step() only applies the outcome.

    After backward the gradients hold D (of the vote or the average). Momentum belongs to the parameter, so buckets may
    be rebuilt. The bits are those of the plain form, with two differences: a parameter that is unused on this process
    alone counts as one of zero gradient, and where a gradient is not finite the step is skipped on all, but momenta of
    buckets that were finite have moved, as they have when a process is lost, which step() raises. Raises UsageError for
    a model outside DDP and for clip_local, which would need all gradients before the first is sent.
    """
    wrapped = _wrapped(model)
    if optimizer.clip_local is not None:
        raise UsageError(
            "clip_local needs all gradients at once, the hook sends each when it is ready: clip_local=None"
        )
    if optimizer.exchange is None:
        disable_gradient_allreduce(model)
        return
    numbers = {id(parameter): number for number, (_, parameter) in enumerate(optimizer.members())}
    missing = [name for name, p in wrapped.module.named_parameters() if p.requires_grad and id(p) not in numbers]
    if missing:
        raise UsageError(f"the optimizer does not hold {missing[0]}, which the hook would have to vote on: add it")
    wrapped.register_comm_hook(_Voter(optimizer, numbers), _hook)
    optimizer.hooked = True


def _wrapped(model: nn.Module) -> DistributedDataParallel:
    if not isinstance(model, DistributedDataParallel):
        raise UsageError(
            f"{type(model).__name__} is no DistributedDataParallel: wrap it first, as DDP(model); without DDP, "
            "gradients are local anyway"
        )
    return model


class _Voter:
    """One thread that sends bucket after bucket, in the order in which DDP fills them on every process alike.

    It has a process group of its own, so that what the main thread sends cannot come in between. On an accelerator the
    same is done by a stream of its own.
    """

    def __init__(self, optimizer: DistributedLion, numbers: Mapping[int, int]) -> None:
        assert optimizer.exchange is not None
        self.optimizer, self.numbers, self.ternary = optimizer, numbers, optimizer.is_ternary()
        ours = optimizer.exchange
        ranks = ours.ranks()
        group = dist.new_group(ranks, use_local_synchronization=len(ranks) < dist.get_world_size())
        self.exchange = Exchange(group, ours.aggregate, ours._topology, ours.reply_form, ours.timeout)
        self.exchange.traffic = ours.traffic
        self.thread = ThreadPoolExecutor(1, "distributed-lion")
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def vote(self, bucket: dist.GradBucket, future: torch.futures.Future[Tensor]) -> None:
        """Runs the exchange of one bucket and puts D into its buffer. An error waits for step(): DDP would hide it."""
        try:
            if self.optimizer.failure is None:
                self._exchange(bucket)
        except Exception as error:
            self.optimizer.failure = error
        future.set_result(bucket.buffer())

    @torch.no_grad()
    def _exchange(self, bucket: dist.GradBucket) -> None:
        optimizer, buffer = self.optimizer, bucket.buffer()
        gradients = {self.numbers[id(p)]: g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
        finite = bool(buffer.abs().max().isfinite())
        optimizer.broken |= not finite
        members, rounds = optimizer.members(), []
        for ternary in (False, True):
            chosen = [number for number in gradients if self.ternary[number] == ternary]
            if chosen:
                part = optimizer.bucket(chosen, ternary)
                votes = optimizer.votes(part, gradients if finite else dict.fromkeys(chosen))
                rounds.append(self.exchange.start(votes, part, optimizer.steps))
        for number, gradient in gradients.items() if finite else ():
            group, parameter = members[number]
            advance_(optimizer.momentum(parameter), gradient, group["betas"][1])
        for round_ in rounds:
            self.exchange.reply(round_)
        for round_ in rounds:
            outcome = self.exchange.finish(round_)
            for number, part in zip(round_.bucket.members, outcome.split(round_.bucket.sizes), strict=True):
                gradients[number].copy_(optimizer.delta(part, members[number][1]))


def _hook(voter: _Voter, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    device = bucket.buffer().device
    voter.optimizer.begin([])
    if device.type == "cpu":
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        voter.thread.submit(voter.vote, bucket, future)
        return future
    future = torch.futures.Future(devices=[device])
    stream = voter.streams.setdefault(device, torch.cuda.Stream(device))
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        voter.vote(bucket, future)
    return future


# DDP compares the annotations themselves, which are texts in this file.
_hook.__annotations__.update({"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]})
