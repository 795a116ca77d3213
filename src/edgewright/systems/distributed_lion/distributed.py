"""Distributed Lion (arXiv 2404.00438): data-parallel training in which each process sends one bit per parameter.

Process i of N keeps its own momentum m_i and sees only its own gradient g_i; all hold the same parameters x:

    d_i = sign(b1 * m_i + (1 - b1) * g_i)       its vote, sent at one bit
    m_i = b2 * m_i + (1 - b2) * g_i
    D   = sign(sum d_i)  or  sum d_i / N        majority vote ("mavo") or average ("avg")
    x   = x - e * (D + w * x)

D is the same everywhere, so the copies of x stay equal to the last bit. With one process this is Lion. Everything is
exchanged before anything changes: a process that loses another leaves parameters and momentum as they were.

Under DistributedDataParallel gradients stay local (`disable_gradient_allreduce`), or votes are sent during backward.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from edgewright.checks import check, number, one_of, optional, whole
from edgewright.errors import UsageError
from edgewright.systems.distributed_lion.exchange import (
    AGGREGATES,
    REPLIES,
    TOPOLOGIES,
    Bucket,
    Exchange,
    check_gradients_differ,
    check_replicas,
    check_shards,
)
from edgewright.systems.distributed_lion.lion import (
    advance_,
    apply_,
    check_gradient,
    check_parameter,
    check_settings,
    direction,
)
from edgewright.training.distributed import local

ZEROS = ("auto", "alternate", "ternary")
EMBEDDING_NAMES = ("embed", "wte", "wpe")  # parts of names of tables, most rows of which have no gradient
SHARED = "all processes"  # whose momentum a state dict holds, right after momenta were averaged


class DistributedLion(torch.optim.Optimizer):
    """Lion over processes that vote (arXiv 2404.00438, Algorithm 1); every process makes one over the same parameters.

    Gradients must be those of the process alone: see `disable_gradient_allreduce`. A gradient that is not finite, on
    any process, skips the step on all. Parameters without a gradient on all processes are left alone; where only some
    lack it, those vote 0. With one process this is Lion.

    Args:
        params: parameters or groups of them; with names, as named_parameters() gives, for zero="auto" and messages.
        lr: learning rate, above 0; a third to a tenth of AdamW's.
        betas: weights of the momentum in the vote and in its own average, at least 0 and below 1.
        weight_decay: decoupled, multiplied by lr, at least 0.
        aggregate: "mavo" (the majority's sign; the paper's choice for language models and small batches) or "avg" (for
            large batches).
        zero: what becomes of a vote of 0, as in embedding rows that no token touched; also per group. "ternary" sends
            it (1.6 bits an element), "alternate" replaces it by +1 or -1 by a hash of place and step; "auto" is ternary
            for parameters whose names say embedding (or use `lion_groups`), else alternate.
        process_group: the processes that vote; None: all.
        topology: "two_phase" (all_to_all of votes, all_gather of outcomes), "all_gather" (all votes to everybody) or
            "auto": the one of fewer bytes.
        reply: sums under "avg" as few "bits" or as "int8", up to 127 processes.
        bucket_mb: elements sent together, counted as float32 in MiB.
        momentum_sync_every: average the momenta every so many steps; 0: never, as in the paper.
        clip_local: largest norm of a process's own gradient; None: no clipping.
        checksum_every: compare the copies every so many steps; 0: before the first only.
        check_gradients: refuse a first step in which all processes have the same gradient.
        timeout: seconds to wait for another process.

    Raises:
        UsageError: a setting out of its range, a parameter without signs, gradients that were averaged.
        CheckFailed: copies of a parameter differ between processes.
        EdgewrightError: a process was lost; parameters and momentum are those before the step.
    """

    # torch's GradScaler then calls step() always, so that no process skips one that the others make.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        aggregate: str = "mavo",
        zero: str = "auto",
        process_group: Any = None,
        topology: str = "auto",
        reply: str = "bits",
        bucket_mb: float = 25.0,
        momentum_sync_every: int = 0,
        clip_local: float | None = None,
        checksum_every: int = 0,
        check_gradients: bool = True,
        timeout: float = 300.0,
    ) -> None:
        check("aggregate", aggregate, one_of(*AGGREGATES))
        check("topology", topology, one_of(*TOPOLOGIES))
        check("reply", reply, one_of(*REPLIES))
        check("bucket_mb", bucket_mb, number(above=0))
        check("momentum_sync_every", momentum_sync_every, whole(0), "0 never averages them")
        check("clip_local", clip_local, optional(number(above=0)))
        check("checksum_every", checksum_every, whole(0), "0 compares before the first step only")
        check("timeout", timeout, number(above=0), "seconds, as 300")
        self.aggregate, self.clip_local, self.check_gradients = aggregate, clip_local, check_gradients
        self.momentum_sync_every, self.checksum_every = momentum_sync_every, checksum_every
        self.skipped_steps = 0
        self.hooked = False  # set by register_distributed_lion_hook: gradients then hold D already
        self.broken = False  # the hook met a gradient that is not finite
        self.failure: Exception | None = None  # what stopped the hook, raised by the next step
        self._elements = int(bucket_mb * 2**20 / 4)
        self._checked = False
        distributed = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size(process_group) if distributed else 1
        self.exchange = Exchange(process_group, aggregate, topology, reply, timeout) if world > 1 else None
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "zero": zero, "step": 0}
        super().__init__(params, defaults)

    @property
    def world(self) -> int:
        """Processes that vote."""
        return self.exchange.world if self.exchange else 1

    @property
    def rank(self) -> int:
        """This process among them."""
        return self.exchange.rank if self.exchange else 0

    @property
    def steps(self) -> int:
        """Updates made so far."""
        return int(self.param_groups[0]["step"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with every setting and parameter checked.

        Args:
            param_group: "params", and settings that differ from the defaults.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["step"] = self.param_groups[0]["step"]
        check_settings(group["lr"], group["betas"], group["weight_decay"])
        check("zero", group["zero"], one_of(*ZEROS))
        for (_, parameter), name in zip(self.members(), self.names(), strict=True):
            check_parameter(local(parameter), name)
            check_shards(parameter, self.exchange)

    def members(self) -> list[tuple[dict[str, Any], Tensor]]:
        """(group, parameter) of all parameters in their order, which is that of `names`."""
        return [(group, parameter) for group in self.param_groups for parameter in group["params"]]

    def names(self) -> list[str]:
        """The parameters' names where they were given, else their place."""
        return [
            name
            for g, group in enumerate(self.param_groups)
            for name in group.get("param_names", [f"group {g} parameter {i}" for i in range(len(group["params"]))])
        ]

    def momentum(self, parameter: Tensor) -> Tensor:
        """m_i of a parameter, zeros before its first vote.

        Args:
            parameter: one of `members`.

        Returns:
            The tensor that the optimizer keeps, in the shape and dtype of the parameter's part on this process.
        """
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(local(parameter))
        momentum: Tensor = state["exp_avg"]
        return momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update on all processes: exchange the votes, then apply them.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            The closure's value, or None.

        Raises:
            UsageError, CheckFailed, EdgewrightError: see the class.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.failure is not None:
            raise self.failure
        members = self.members()
        gradients = self._gradients(members)
        if not self.hooked:
            self._clip(gradients)
        active, skip = self._agree(members, gradients)
        self._begin(gradients)
        if skip:
            self.skipped_steps += 1
        else:
            for index, delta in self._deltas(members, gradients, active).items():
                (group, parameter), gradient = members[index], gradients[index]
                if not self.hooked and gradient is not None:
                    advance_(self.momentum(parameter), gradient, group["betas"][1])
                apply_(local(parameter), delta, float(group["lr"]), float(group["weight_decay"]))
        for group in self.param_groups:
            group["step"] += 1
        if self.exchange:
            self.exchange.traffic.steps += 1
            self.exchange.traffic.elements += sum(
                local(p).numel() for (_, p), on in zip(members, active, strict=True) if on
            )
            if self.momentum_sync_every and self.steps % self.momentum_sync_every == 0:
                self.sync_momentum()
            if self.checksum_every and self.steps % self.checksum_every == 0:
                self.replica_checksum()
        return loss

    def _begin(self, gradients: Sequence[Tensor | None]) -> None:
        """Before the first exchange: are the copies equal, and the gradients each process's own?"""
        if self._checked or self.exchange is None:
            return
        self._checked = True
        check_replicas(self.exchange, [p for _, p in self.members()], self.names())
        if self.check_gradients and not self.hooked:
            check_gradients_differ(self.exchange, gradients)

    def replica_checksum(self) -> list[int]:
        """64-bit checksums of this process's parameters; CheckFailed (naming the first) when another has others."""
        return check_replicas(self.exchange, [p for _, p in self.members()], self.names())

    def sync_momentum(self) -> None:
        """Give every process the mean of all momenta (a float32 all-reduce: 32 times the bytes of a step)."""
        if self.exchange is None:
            return
        for _, parameter in self.members():
            momentum = self.momentum(parameter)
            mean = self.exchange.all_reduce(momentum.float().contiguous(), dist.ReduceOp.SUM) / self.world
            momentum.copy_(mean)

    def comm_stats(self) -> dict[str, float]:
        """`VoteTraffic` of this process so far, and the ratio to a ring all-reduce of float32 gradients."""
        return self.exchange.traffic.as_dict(self.world) if self.exchange else {}

    @property
    def differs_by_process(self) -> bool:
        """Whether every process has momentum of its own now: not in one process, and not right after averaging."""
        synced = self.momentum_sync_every and self.steps and self.steps % self.momentum_sync_every == 0
        return self.exchange is not None and not synced

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and whose momentum it is: of this process alone, or of all right after they were averaged."""
        holder = f"process {self.rank} of {self.world}" if self.differs_by_process else SHARED
        for group in self.param_groups:
            group["momentum_of"] = holder
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; every process calls.

        Args:
            state_dict: what `state_dict` gave on this process, or on any right after momenta were averaged.

        Raises:
            UsageError: on all processes, when any got the momentum of another or of a run of another size.
        """
        holder = state_dict["param_groups"][0].get("momentum_of", SHARED)
        wrong = holder not in (SHARED, f"process {self.rank} of {self.world}")
        if self.exchange is not None:
            flag = torch.tensor([wrong], dtype=torch.uint8, device=local(self.members()[0][1]).device)
            wrong = bool(self.exchange.all_reduce(flag).item())
        if wrong:
            raise UsageError(
                f"this state holds the momentum of {holder} and was given to others too, here to process {self.rank} "
                f"of {self.world}: use load_replicas(folder, model, optimizer, strategy='mean'), or save right after "
                "momenta were averaged (momentum_sync_every)"
            )
        super().load_state_dict(state_dict)

    def is_ternary(self) -> list[bool]:
        """For each member, whether its votes of 0 are sent."""
        return [sends_zeros(group["zero"], name) for (group, _), name in zip(self.members(), self.names(), strict=True)]

    def _deltas(
        self, members: list[tuple[dict[str, Any], Tensor]], gradients: list[Tensor | None], active: list[bool]
    ) -> dict[int, Tensor]:
        """D of every active member; nothing has changed yet."""
        numbers = [index for index, on in enumerate(active) if on]
        present = dict(enumerate(gradients))
        if self.exchange is not None and not self.hooked:
            return self._vote(self.exchange, self._plan(numbers), present)
        deltas = {index: gradient for index in numbers if (gradient := present[index]) is not None}
        if not self.hooked:
            for index, gradient in deltas.items():
                group, parameter = members[index]
                deltas[index] = direction(self.momentum(parameter), gradient, group["betas"][0]).sign_()
        return deltas

    def _vote(
        self, exchange: Exchange, buckets: Sequence[Bucket], gradients: Mapping[int, Tensor | None]
    ) -> dict[int, Tensor]:
        """Send sign(b1 * m + (1 - b1) * g) of the buckets' members; D of each in its shape and dtype."""
        members, votes = self.members(), []
        for bucket in buckets:
            parts = []
            for index, size in zip(bucket.members, bucket.sizes, strict=True):
                (group, parameter), gradient = members[index], gradients[index]
                if gradient is None:
                    parts.append(torch.zeros(size, dtype=torch.int8, device=local(parameter).device))
                else:
                    raw = direction(self.momentum(parameter), gradient, group["betas"][0])
                    parts.append(raw.sign_().to(torch.int8).flatten())
            votes.append((bucket, torch.cat(parts)))
        deltas = {}
        for bucket, outcome in zip(buckets, exchange.outcomes(votes, self.steps), strict=True):
            for index, part in zip(bucket.members, outcome.split(bucket.sizes), strict=True):
                like = local(members[index][1])
                delta = part.view(like.shape).to(like.dtype)
                deltas[index] = delta / self.world if self.aggregate == "avg" else delta
        return deltas

    def _plan(self, numbers: Iterable[int]) -> list[Bucket]:
        """Buckets of members: one device and one kind of vote each, about as large as asked for."""
        parameters, ternary = [local(parameter) for _, parameter in self.members()], self.is_ternary()
        sizes = [parameter.numel() for parameter in parameters]
        starts = list(accumulate(sizes, initial=0))
        kinds: dict[tuple[str, bool], list[list[int]]] = {}
        filled: Counter[tuple[str, bool]] = Counter()
        for index in numbers:
            kind = str(parameters[index].device), ternary[index]
            if kind not in kinds or filled[kind] + sizes[index] > self._elements:
                kinds.setdefault(kind, []).append([])
                filled[kind] = 0
            kinds[kind][-1].append(index)
            filled[kind] += sizes[index]
        return [
            Bucket(tuple(part), tuple(sizes[i] for i in part), tuple(starts[i] for i in part), kind[1])
            for kind, buckets in kinds.items()
            for part in buckets
        ]

    def _gradients(self, members: list[tuple[dict[str, Any], Tensor]]) -> list[Tensor | None]:
        scale: Tensor | None = getattr(self, "grad_scale", None)  # set by GradScaler for the time of a step
        gradients: list[Tensor | None] = []
        for (_, parameter), name in zip(members, self.names(), strict=True):
            gradient = parameter.grad
            if gradient is not None:
                check_gradient(gradient, name)
                gradient = local(gradient)
                if scale is not None and not self.hooked:
                    gradient.div_(scale.to(gradient.device))
            gradients.append(gradient)
        return gradients

    def _clip(self, gradients: list[Tensor | None]) -> None:
        present = [gradient for gradient in gradients if gradient is not None]
        if self.clip_local is not None and present:
            norm = torch.nn.utils.get_total_norm(present)
            for gradient in present:
                gradient.mul_((self.clip_local / (norm + 1e-6)).clamp(max=1.0).to(gradient.device, gradient.dtype))

    def _agree(
        self, members: list[tuple[dict[str, Any], Tensor]], gradients: list[Tensor | None]
    ) -> tuple[list[bool], bool]:
        """Which members have a gradient on any process, and whether any process has one that is not finite."""
        present = [gradient for gradient in gradients if gradient is not None]
        broken = self.broken or bool(getattr(self, "found_inf", 0))
        if present and not broken:
            broken = not all(bool(norm.isfinite()) for norm in torch._foreach_norm(present, math.inf))
        self.broken = False
        if self.exchange is None:
            return [gradient is not None for gradient in gradients], broken
        device = local(members[0][1]).device
        flags = torch.tensor([g is not None for g in gradients] + [broken], dtype=torch.uint8, device=device)
        *active, skip = self.exchange.all_reduce(flags).tolist()
        return [bool(on) for on in active], bool(skip)


def sends_zeros(zero: str, name: str) -> bool:
    """Whether votes of 0 of a parameter are sent as such, under the option `zero` of its group."""
    return zero == "ternary" or (zero == "auto" and any(part in name.lower() for part in EMBEDDING_NAMES))


def lion_groups(model: torch.nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for DistributedLion: tables of nn.Embedding vote ternary, the rest alternates; only matrices decay.

    Args:
        model: its parameters that require gradients are taken, with their names.
        weight_decay: of parameters with two or more dimensions.

    Returns:
        Groups with "params" (pairs of name and parameter), "zero" and "weight_decay".
    """
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in tables, parameter.ndim > 1), []).append((name, parameter))
    return [
        {
            "params": named,
            "zero": "ternary" if table else "alternate",
            "weight_decay": weight_decay if matrix else 0.0,
        }
        for (table, matrix), named in groups.items()
    ]


def disable_gradient_allreduce(model: nn.Module) -> None:
    """Let every process keep its own gradients: a communication hook of DDP that sends nothing.

    For DistributedLion in its plain form. Buffers are still broadcast.

    Args:
        model: in its DistributedDataParallel wrapper, before the first backward pass.

    Raises:
        UsageError: the model is not wrapped.
    """
    _wrapped(model).register_comm_hook(None, noop_hook)


class LocalGradients:
    """A loss function for `fit` in a distributed run, after whose first call gradients stay local.

    `fit` wraps the model by itself, so that this is where its wrapper is met: fit(model, LocalGradients(loss), ...,
    optimizer=DistributedLion(...)). State of the loss function is passed through.

    Args:
        loss_function: (model, batch) -> the loss of this process's batch.
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
    buckets that were finite have moved, as they have when a process is lost, which step() raises.

    Args:
        model: in its DistributedDataParallel wrapper, before the first backward pass.
        optimizer: holds every parameter of the model that requires a gradient.

    Raises:
        UsageError: a model outside DDP, a parameter that the optimizer lacks, or clip_local, which would need all
            gradients before the first is sent.
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
        self.optimizer, self.numbers = optimizer, numbers
        exchange, ranks = optimizer.exchange, optimizer.exchange.ranks()
        group = dist.new_group(ranks, use_local_synchronization=len(ranks) < dist.get_world_size())
        self.exchange = Exchange(
            group, exchange.aggregate, exchange._topology, exchange.reply_form, exchange.timeout, exchange.traffic
        )
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
        deltas = optimizer._vote(
            self.exchange, optimizer._plan(gradients), gradients if finite else dict.fromkeys(gradients)
        )
        for index, gradient in gradients.items():
            if finite:
                group, parameter = optimizer.members()[index]
                advance_(optimizer.momentum(parameter), gradient, group["betas"][1])
            gradient.copy_(deltas[index])


def _hook(voter: _Voter, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    device = bucket.buffer().device
    voter.optimizer._begin([])
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
