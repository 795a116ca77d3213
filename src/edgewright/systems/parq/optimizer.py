"""PARQ: quantisation-aware training inside the optimizer, for any module and any base optimizer (arXiv 2503.15748).

The base optimizer moves latent weights; the module's parameters hold what a proximal map makes of them, at first the
latents themselves, in the end values on a grid. The gradient is thus taken at the (partly) quantised point and applied
to the latents (section 4, AProx in practice). The parameters keep their memory; the price is one copy for the latents.

groups = quantized_groups(model, QuantConfig.weights("ternary"))      # systems/parq/model.py
optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=1e-4), ProxPARQ(anneal_start=50, anneal_end=400))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, number, whole
from edgewright.errors import Unsupported, UsageError
from edgewright.quantization import shards
from edgewright.systems.parq.lsbq import TargetConfig
from edgewright.systems.parq.proximal import ProxHard, ProxMap, Targets
from edgewright.training import distributed

FLOATS = (torch.float32, torch.float64)
LATENT, TARGETS = "parq_latent", "parq_targets"


class QuantOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer; parameters in groups with a "targets" entry (LSBQ or Uniform) are quantised.

    PARQ (arXiv 2503.15748), section 4. The parameters are half quantised until `prox.anneal_end`: evaluate and save
    under `hard_weights()` before that. Averages of weights (EMA, SWA) belong under `latent_weights()`.
    deviation: a closure is evaluated at the quantised point, where the gradient belongs.

    Args:
        base: of one gradient a step, such as AdamW or SGD; other groups of its are left alone. A 1-d parameter such as
            a bias has one row, whatever the granularity.
        prox: the map with its schedule, in optimizer steps counted from 0, warm-up included.
        quant_period: steps between two updates of the targets, at least 1; the paper has 10.
        warmup_steps: of the base optimizer alone, at least 0.
        quant_shrink: latents are divided by max(1, sum of learning rates) on their way into the map.
        anneal_weight_decay: that share of the weight decay, 0 to 1, falls with the inverse slope.

    Raises:
        UsageError: a setting out of its range, LBFGS, a parameter that is not float32 or float64, no "targets".
        Unsupported: a sparse parameter, or one whose rows are split over devices.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        prox: ProxMap,
        *,
        quant_period: int = 10,
        warmup_steps: int = 0,
        quant_shrink: bool = False,
        anneal_weight_decay: float = 0.0,
    ) -> None:
        if isinstance(base, (torch.optim.LBFGS, QuantOptimizer)):
            kind = type(base).__name__
            raise UsageError(f"{kind} cannot be wrapped; use an optimizer of one gradient a step, such as AdamW or SGD")
        check("quant_period", quant_period, whole(1))
        check("warmup_steps", warmup_steps, whole(0))
        check("anneal_weight_decay", anneal_weight_decay, number(0, 1))
        self.base, self.prox = base, prox
        self.quant_period, self.warmup_steps = quant_period, warmup_steps
        self.quant_shrink, self.anneal_weight_decay = quant_shrink, anneal_weight_decay
        self.latents: dict[nn.Parameter, Tensor] = {}  # local shards where the parameter is sharded
        self.targets: dict[nn.Parameter, Targets] = {}
        self._standing_in = False
        super().__init__(base.param_groups, base.defaults)
        self._link()
        for group in self.quantized_groups():
            group |= {"quant_steps": 0, "cumulative_lr": 0.0, "initial_weight_decay": group.get("weight_decay", 0.0)}
            for p in group["params"]:
                self._check(p, group)

    # -- what a step does ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the base optimizer on the latents, then the map.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            The closure's value, or None.

        Raises:
            UsageError: inside latent_weights() or hard_weights().
        """
        if self._standing_in:
            raise UsageError("step() inside latent_weights() or hard_weights(): leave the block first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with shards.holding(self.latents, update=True):
            self.base.step()
        step = self.steps
        for group in self.quantized_groups():
            if step >= self.warmup_steps:
                group["cumulative_lr"] += float(group["lr"])
                self._quantize(group, step)
            group["quant_steps"] = step + 1
        return loss

    def _quantize(self, group: dict[str, Any], step: int) -> None:
        active = self.prox.starts_by(step)
        # The last update before the map starts is made too: the rhythm does not depend on where annealing begins.
        due = (step - self.warmup_steps) % self.quant_period == 0 and self.prox.starts_by(step + self.quant_period - 1)
        for p in group["params"]:
            if not p.requires_grad:
                continue
            local = distributed.local(p)
            if active and p not in self.latents:
                self.latents[p] = local.clone()
            latent = self.latents.get(p, local)
            if due or (active and p not in self.targets):
                self.targets[p] = self._fit(p, latent, group)
            if active:
                self.map_(p, latent, group, self.prox, step, local)
        if self.anneal_weight_decay and step >= self.warmup_steps:
            share = 1 - self.anneal_weight_decay * (1 - self.prox.inverse_slope(step))
            group["weight_decay"] = share * group["initial_weight_decay"]

    def _fit(self, p: nn.Parameter, latent: Tensor, group: Mapping[str, Any]) -> Targets:
        config: TargetConfig = group["targets"]
        matrix = self._shrunk(latent, group).reshape(shards.rows_columns(p, latent, config.granularity))
        reduce = distributed.reducer(p) if shards.matrix_rows(p, config.granularity) == 1 else None
        if not matrix.numel() and reduce is None:  # this device's shard holds nothing: targets of the right width
            return Targets(config.fit(latent.new_ones(1, 2))[:0], config.even)
        return Targets(config.fit(matrix, reduce), config.even)

    def map_(
        self, p: nn.Parameter, latent: Tensor, group: Mapping[str, Any], prox: ProxMap, step: int, out: Tensor
    ) -> Tensor:
        """Apply a map to latents.

        Args:
            p: a parameter that has targets.
            latent: in the shape of this device's part of it.
            group: that it belongs to.
            prox: the map.
            step: of the optimizer.
            out: shaped as `latent`.

        Returns:
            `out`.
        """
        if latent.numel():
            shape = shards.rows_columns(p, latent, group["targets"].granularity)
            matrix = self._shrunk(latent, group).reshape(shape)
            if out.is_contiguous():
                prox.apply(matrix, self.targets[p], step, out.view(shape))
            else:
                out.copy_(prox.apply(matrix, self.targets[p], step, matrix.new_empty(shape)).view(out.shape))
        return out

    def _shrunk(self, latent: Tensor, group: Mapping[str, Any]) -> Tensor:
        return latent / max(1.0, group["cumulative_lr"]) if self.quant_shrink else latent

    # -- what it can be asked ------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps done."""
        return next(self.quantized_groups())["quant_steps"]

    @property
    def inverse_slope(self) -> float:
        """Of the map that made the present weights: 1 untouched, 0 all on targets."""
        last = self.steps - 1
        return self.prox.inverse_slope(last) if last >= self.warmup_steps and self.prox.starts_by(last) else 1.0

    def quantized_groups(self) -> Iterator[dict[str, Any]]:
        """The groups that have targets. Raises UsageError when none has."""
        groups = [group for group in self.param_groups if group.get("targets") is not None]
        if not groups:
            raise UsageError("no parameter group has 'targets'; make the groups with quantized_groups(model, config)")
        return iter(groups)

    @contextmanager
    def latent_weights(self) -> Iterator[None]:
        """The model computes with its full-precision latents inside: to evaluate, average or save them."""
        with self._instead(self.latents):
            yield

    @contextmanager
    def hard_weights(self) -> Iterator[None]:
        """The model computes with fully quantised weights inside, however far the annealing is."""
        with self._instead(self.hard_tensors()):
            yield

    @torch.no_grad()
    def hard_tensors(self) -> dict[nn.Parameter, Tensor]:
        """Every quantised parameter with its fully quantised values, made from the latents and the present targets."""
        hard: dict[nn.Parameter, Tensor] = {}
        for group in self.quantized_groups():
            for p in (p for p in group["params"] if p.requires_grad):
                local = distributed.local(p)
                latent = self.latents.get(p, local)
                if p not in self.targets:
                    self.targets[p] = self._fit(p, latent, group)
                hard[p] = self.map_(p, latent, group, ProxHard(), 0, torch.empty_like(latent))
        return hard

    @contextmanager
    def _instead(self, tensors: dict[nn.Parameter, Tensor]) -> Iterator[None]:
        if self._standing_in:
            raise UsageError("latent_weights() and hard_weights() do not nest: leave the first block")
        self._standing_in = True
        try:
            with shards.holding(tensors, update=False):
                yield
        finally:
            self._standing_in = False

    # -- saving and loading --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, with latents and targets in each parameter's entry and settings in each group.

        The form is torch's own ({"state": {number: {name: tensor}}, "param_groups": [...]}, JSON values in the groups),
        so that checkpoints of any kind hold it. A parameter's entry has its latents as "parq_latent", and as
        "parq_targets" the levels or scales of its rows [rows, blocks a row, K]; both are DTensors where the parameter
        is one. The tensors are the live ones, as in torch.
        """
        saved = self.base.state_dict()
        entries = {index: dict(entry) for index, entry in saved["state"].items()}
        for index, (p, group) in enumerate(self._numbered()):
            if p in self.targets:
                entry = entries.setdefault(index, {})
                rows = shards.matrix_rows(p, group["targets"].granularity)
                values = self.targets[p].values
                values = values.reshape(1 if rows == 1 else distributed.local(p).shape[0], -1, values.shape[-1])
                entry[TARGETS] = distributed.part_like(values, p, 0 if rows > 1 else None)
                if p in self.latents:
                    entry[LATENT] = distributed.part_like(self.latents[p], p)
        groups = [dict(group) for group in saved["param_groups"]]
        for group in groups:
            if group.get("targets") is not None:
                group |= {"targets": group["targets"].to_dict(), "prox": self._settings()}
        return {"state": entries, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a `state_dict()`; the parameters get the values that belong to its latents.

        Args:
            state_dict: of an optimizer that was built alike.

        Raises:
            UsageError: it has other settings, or no latents although annealing had begun; nothing is changed then.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        configs = [group.get("targets") for group in self.param_groups]
        self._check_groups(groups)
        latents: dict[int, dict[str, Tensor]] = {}
        rest: dict[Any, Any] = {}
        for index, entry in state_dict["state"].items():
            latents[index] = {key: entry[key] for key in (LATENT, TARGETS) if key in entry}
            if others := {key: value for key, value in entry.items() if key not in (LATENT, TARGETS)}:
                rest[index] = others
        done = next(group["quant_steps"] for group in groups if "quant_steps" in group)
        begun = done > self.warmup_steps and self.prox.starts_by(done - 1)
        for index, (p, group) in enumerate(self._numbered()):
            if group.get("targets") is not None and p.requires_grad:
                _check_entry(index, p, latents.get(index, {}), done if begun else 0)
        for group in groups:
            group.pop("prox", None)
        self.base.load_state_dict({"state": rest, "param_groups": groups})
        self._link()
        for live, config in zip(self.param_groups, configs, strict=True):
            if config is not None:
                live["targets"] = config
        self.latents, self.targets = {}, {}
        for index, (p, group) in enumerate(self._numbered()):
            entry, local = latents.get(index, {}), distributed.local(p)
            if TARGETS in entry:
                values = distributed.local(entry[TARGETS]).to(local.device, local.dtype, copy=True)
                self.targets[p] = Targets(values.reshape(-1, values.shape[-1]), group["targets"].even)
            if LATENT in entry:
                self.latents[p] = torch.empty_like(local).copy_(distributed.local(entry[LATENT]))
                self.map_(p, self.latents[p], group, self.prox, done - 1, local)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # torch's own would forget the base optimizer and the latents

    # -- small parts ---------------------------------------------------------------------------------------------------

    def _link(self) -> None:
        """One list of groups and one state, seen from both optimizers: schedulers change what the base uses."""
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def _numbered(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """(parameter, group) in the order of the numbers in a state_dict."""
        return ((p, group) for group in self.param_groups for p in group["params"])

    def _settings(self) -> dict[str, Any]:
        own = {"quant_period": self.quant_period, "warmup_steps": self.warmup_steps, "quant_shrink": self.quant_shrink}
        prox: Any = self.prox
        return {"map": type(prox).__name__, **asdict(prox), **own, "anneal_weight_decay": self.anneal_weight_decay}

    def _check(self, p: nn.Parameter, group: Mapping[str, Any]) -> None:
        names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        name = names.get(id(p), f"of shape {list(p.shape)}")
        if p.dtype not in FLOATS:
            raise UsageError(
                f"parameter {name} is {str(p.dtype).removeprefix('torch.')}: its latents would lose small updates; "
                "keep the model in float32 and let autocast compute in less (TrainConfig(precision='bf16'))"
            )
        if p.layout != torch.strided:
            raise Unsupported(f"parameter {name} is {p.layout}; only dense parameters can be quantised")
        distributed.check_rows(p, name)
        shards.rows_columns(p, distributed.local(p), group["targets"].granularity, f"parameter {name}: ")

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        if len(groups) != len(self.param_groups):
            counts = f"{len(groups)} parameter groups, this one {len(self.param_groups)}"
            raise UsageError(f"the saved optimizer has {counts}; build it as it was")
        for index, (saved, live) in enumerate(zip(groups, self.param_groups, strict=True)):
            config = live.get("targets")
            if config is not None and "quant_steps" not in saved:
                raise UsageError("the saved optimizer is a bare one without latent weights: it cannot go on as PARQ")
            was, now = saved.get("targets"), None if config is None else config.to_dict()
            if was != now:
                raise UsageError(f"group {index} was saved with targets {was}, now they are {now}; use the same")
            if config is not None and saved.get("prox") != self._settings():
                raise UsageError(f"saved with {saved.get('prox')}, now {self._settings()}; use the same settings")


def _check_entry(index: int, p: nn.Parameter, entry: Mapping[str, Tensor], begun: int) -> None:
    """`begun`: steps done, where the map was at work; 0 where there need not be latents yet."""
    missing = LATENT not in entry or TARGETS not in entry
    if missing and begun:
        raise UsageError(f"parameter {index} has no latent weights in the saved optimizer, which did {begun} steps")
    if LATENT in entry and (missing or entry[LATENT].shape != p.shape):
        raise UsageError(f"parameter {index} was saved as {list(entry[LATENT].shape)}, now it is {list(p.shape)}")
