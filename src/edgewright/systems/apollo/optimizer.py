"""APOLLO: AdamW's step sizes from a random low-rank sketch of the gradient (arXiv 2412.05270, MLSys 2025).

Adam gives every weight its own learning rate; one for each channel, or one for a whole matrix, is enough. APOLLO runs
Adam on a sketch R = P G of r rows instead of the gradient G, takes from it how Adam would scale each channel, and
scales the raw gradient by that. The state is 2 r n numbers instead of 2 m n; P is drawn again from a seed.

groups = apollo_param_groups(model, rank=64)          # systems/apollo/groups.py; other parameters: plain AdamW
optimizer = APOLLO(groups, lr=1e-3, scale="auto")     # or APOLLOMini(apollo_param_groups(model, rank=1))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed, Unsupported, UsageError
from edgewright.io.hashing import mixed_seed
from edgewright.systems.apollo.groups import check_group, check_parameter
from edgewright.systems.apollo.state import add_moments, check_entry, restore_dtypes
from edgewright.systems.apollo.step import (
    Sketch,
    WeightFacts,
    WeightStep,
    adamw_step,
    advance,
    apply,
    chunks,
    column_norms,
    projection,
    read_moment,
    share_norms,
    sketch_of,
    svd_projection,
    write_moment,
)
from edgewright.training.distributed import all_agree, is_split, local, part_like, row_range


class APOLLO(torch.optim.Optimizer):
    """AdamW where a group's `rank` is None, APOLLO (arXiv 2412.05270) for its matrices where it is a number.

    Tensors of more than two dimensions are matrices [first, others]. Every option but `params` may differ by group.
    deviation: arithmetic and state of bfloat16 weights are float32; the official code stays in bfloat16.

    Args:
        params: parameters, (name, parameter) pairs or groups.
        lr: learning rate, at least 0; with scale="auto" AdamW's, with scale=1 a larger one, such as the paper's 1e-2.
        betas: of the two moments, at least 0 and below 1.
        eps: added to the root of the second moment, before bias correction.
        weight_decay: decoupled, at least 0, applied after the update.
        rank: of the sketch, at least 1; one beyond the smaller side of a weight is that side, with a UserWarning.
        scale_type: "channel" gives each channel its factor, "tensor" one to the matrix (the choice at rank 1).
        scale: alpha, whose square root multiplies the update; "auto" is m / r of each weight, m its smaller side.
        update_proj_gap: steps between two projections; the paper has 200.
        norm_growth: bound on the growth of an update's norm from step to step, at least 1; None: no limiter.
        scale_front: sqrt(alpha) multiplies before the limiter.
        proj: "random", or "svd": singular vectors of the gradient, which are stored.
        seed: of all projections, which use no global generator.
        foreach: batched sketches and list operations; None: on accelerators.
        state_dtype: "float32" or "bfloat16", also as a torch dtype; None: float32.
        side: "smaller" contracts the smaller dimension, "local" always the columns.
        maximize: go up the gradient.
        cache_projection: keep the projections in memory (not in the state).
        nan_policy: of gradients that are not finite. "raise" CheckFailed before anything changed, "skip" the whole
            step, or "ignore", which looks at no gradient and so never waits for the device.
        fused: refused where True.

    Raises:
        UsageError: a setting out of its range.
        Unsupported: complex or integer parameters, sparse gradients, singular vectors of split weights.
        CheckFailed: in a step, a gradient that is not finite.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int | None = None,
        scale_type: str = "channel",
        scale: float | str = 1.0,
        update_proj_gap: int = 200,
        norm_growth: float | None = 1.01,
        scale_front: bool = False,
        proj: str = "random",
        seed: int = 0,
        foreach: bool | None = None,
        state_dtype: Any = None,
        side: str = "smaller",
        maximize: bool = False,
        cache_projection: bool = False,
        nan_policy: str = "raise",
        fused: bool | None = None,
    ) -> None:
        if fused:
            raise UsageError("fused=True: APOLLO has no fused kernel; leave it out (plain AdamW groups use torch's)")
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "fused")}
        defaults = {name: value for name, value in defaults.items() if not name.startswith("__")}
        self._forget()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with every setting and parameter checked.

        Args:
            param_group: "params", and options that differ from the defaults.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            for p in group["params"]:
                check_parameter(p, group, self._name(p, group))
        except Exception:
            del self.param_groups[-1]
            raise
        wide = [p for p in group["params"] if self._sketch(p, group, clamp=False)]
        if wide:
            warnings.warn(
                f"rank={group['rank']} is more than the smaller side of {len(wide)} parameters, such as "
                f"{self._name(wide[0], group)} {list(wide[0].shape)}: there the rank is that side",
                stacklevel=3,
            )

    # -- a step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            The closure's value, or None.

        Raises:
            CheckFailed, Unsupported: see the class.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.hooked is None:
            self.update(p for group in self.param_groups for p in group["params"])
        else:
            self.hooked.clear()  # the update happened inside backward: apollo_layerwise
        return loss

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Update some parameters of the optimizer from their gradients.

        Args:
            parameters: those without a gradient are left alone.
        """
        chosen = {p for p in parameters if p.grad is not None}
        works: list[WeightStep] = []
        plain: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        for group in self.param_groups:
            mine = [p for p in group["params"] if p in chosen]
            for p in mine:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise Unsupported(f"the gradient of parameter {self._name(p, group)} is sparse; APOLLO needs dense")
            sketched = {p: sketch for p in mine if (sketch := self._sketch(p, group))}
            works += [self._work(p, group, sketch) for p, sketch in sketched.items()]
            plain.append((group, [p for p in mine if p not in sketched]))
        if not self._usable(works, plain):
            return
        for chunk in chunks(works):
            for work in chunk:
                work.state = self.state[work.weight]
                if not work.state:
                    self._begin(work)
                work.state["step"] += 1
            advance(chunk, self._projection)
        share_norms(works)
        for work in works:
            self.facts[work.weight] = apply(work)
        for group, rest in plain:
            self._adamw(group, rest)

    def _work(self, p: nn.Parameter, group: dict[str, Any], sketch: Sketch) -> WeightStep:
        assert p.grad is not None
        gradient, dtype = sketch.view(local(p.grad)), torch.promote_types(p.dtype, torch.float32)
        needed = group["norm_growth"] is not None or group["nan_policy"] != "ignore"
        norms = column_norms(gradient, dtype) if needed else None
        return WeightStep(p, group, sketch, row_range(p, self._name(p, group)), gradient, dtype, norms)

    def _usable(self, works: list[WeightStep], plain: list[tuple[dict[str, Any], list[nn.Parameter]]]) -> bool:
        """Whether to go on; every gradient is finite, or nobody asked. Nothing has changed yet."""
        sizes: list[tuple[nn.Parameter, dict[str, Any], Tensor]] = []
        for work in works:
            if work.group["nan_policy"] != "ignore" and work.norms is not None:
                sizes.append((work.weight, work.group, work.norms.sum()))
        for group, parameters in plain:
            parts = [(p, local(p.grad)) for p in parameters if p.grad is not None]
            if group["nan_policy"] != "ignore":
                sizes += [(p, group, torch.linalg.vector_norm(g, torch.inf)) for p, g in parts if g.numel()]
        if not sizes:
            return True
        good = bool(torch.stack([value.float().to(sizes[0][2].device) for *_, value in sizes]).isfinite().all())
        good = all_agree(good, [p for p, *_ in sizes], sizes[0][2].device)
        if good:
            return True
        bad = [(p, group) for p, group, value in sizes if not bool(value.isfinite())]
        if any(group["nan_policy"] == "raise" for group in self.param_groups):
            name = self._name(*bad[0]) if bad else "of another process"
            raise CheckFailed(
                f"the gradient of parameter {name} is not finite; nothing was updated. Lower the learning rate, look "
                "for such values in the data, or pass nan_policy='skip' to leave such steps out"
            )
        return False

    def _begin(self, work: WeightStep) -> None:
        """Zero moments, no norm yet, and the seed of this weight's projections."""
        state, like = work.state, work.gradient.new_empty((work.sketch.rank, work.gradient.shape[1]), dtype=work.dtype)
        state["step"] = torch.zeros((), dtype=torch.float32)
        add_moments(state, like, work.group["state_dtype"])
        if work.channels_split:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = part_like(state[name], work.weight, dim=1)
        state["last_norm"] = torch.zeros((), dtype=work.dtype, device=like.device)
        numbered = (p for group in self.param_groups for p in group["params"])
        number = next(i for i, p in enumerate(numbered) if p is work.weight)
        state["proj_seed"] = torch.tensor(mixed_seed(work.group["seed"], number), dtype=torch.int64)

    def _projection(self, work: WeightStep) -> Tensor:
        """P of the present window, as wide as the rows that lie here."""
        steps, gap = int(work.state["step"]) - 1, work.group["update_proj_gap"]
        if work.group["proj"] == "svd":
            if steps % gap == 0 or "projection" not in work.state:
                work.state["projection"] = svd_projection(work.gradient.to(work.dtype), work.sketch)
            return work.state["projection"].to(work.dtype)
        key = int(work.state["proj_seed"]), steps // gap
        known = self._projections.get(work.weight)
        if known is not None and known[0] == key:
            return known[1]
        whole = projection(*key, work.sketch)
        if work.contraction_split:
            whole = whole[:, work.rows.start : work.rows.stop]
        made = whole.to(work.gradient.device, work.dtype)
        if work.group["cache_projection"]:
            self._projections[work.weight] = key, made
        return made

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Torch's AdamW, for whole lists where state and parameters share a dtype, otherwise one by one in float32."""
        alike = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                add_moments(state, p.detach(), group["state_dtype"])
            if state["exp_avg"].dtype == p.dtype:
                alike.append(p)
                continue
            dtype = torch.promote_types(p.dtype, torch.float32)
            average, square = (read_moment(state, name, dtype) for name in ("exp_avg", "exp_avg_sq"))
            weight = local(p).to(dtype, copy=True)
            assert p.grad is not None
            gradient = local(p.grad).to(dtype)
            adamw_step(group, [weight], [gradient], [average], [square], [state["step"]])
            local(p).copy_(weight)
            write_moment(state, "exp_avg", average)
            write_moment(state, "exp_avg_sq", square)
        if alike:
            columns = [[self.state[p][name] for p in alike] for name in ("exp_avg", "exp_avg_sq", "step")]
            adamw_step(group, [*alike], [p.grad for p in alike], *columns)

    # -- what it can be asked ------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, float]:
        """Of the last step over the sketched weights: mean factor, share cut by the limiter, norm of all updates."""
        if not self.facts:
            return {}
        columns = zip(*self.facts.values(), strict=True)
        scale, cut, norm = (torch.stack([value.float() for value in column]) for column in columns)
        total = torch.linalg.vector_norm(norm)
        return {"mean_scale": float(scale.mean()), "limited": float(cut.mean()), "update_norm": float(total)}

    def layer_facts(self) -> dict[str, WeightFacts]:
        """The facts of the last step by name (names need (name, parameter) pairs, as apollo_param_groups makes)."""
        owner = {p: group for group in self.param_groups for p in group["params"]}
        return {self._name(p, owner[p]): facts for p, facts in self.facts.items()}

    # -- saving and loading --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict() with its group options.

        Args:
            state_dict: of an APOLLO over the same parameters, numbered or, from distributed checkpoints, named.

        Raises:
            UsageError: it is of other parameters or of another optimizer.
        """
        numbered = [(p, group) for group in self.param_groups for p in group["params"]]
        # Numbers in the order of the groups, or names where the state went through distributed checkpoints.
        keyed = [(key, group) for group in state_dict["param_groups"] for key in group["params"]]
        saved: list[tuple[nn.Parameter, Mapping[str, Any]]] = []
        if len(keyed) == len(numbered):  # otherwise torch says what differs
            for (p, group), (key, options) in zip(numbered, keyed, strict=True):
                if "rank" not in options:
                    raise UsageError("the saved optimizer is no APOLLO: its groups have no 'rank'; start without it")
                if entry := state_dict["state"].get(key):
                    sketch = self._sketch(p, options)
                    shape = tuple(p.shape) if sketch is None else sketch.shape
                    check_entry(self._name(p, group), entry, shape, sketch is not None)
                    saved.append((p, entry))
        super().load_state_dict(state_dict)
        restore_dtypes(self, saved)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()  # torch pickles and copies groups and state alone

    # -- small parts ---------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Reset what is no state: facts of the last step, cached projections."""
        self.facts: dict[nn.Parameter, WeightFacts] = {}
        self._projections: dict[nn.Parameter, tuple[tuple[int, int], Tensor]] = {}
        self.hooked: set[nn.Parameter] | None = getattr(self, "hooked", None)

    def _sketch(self, p: Tensor, group: Mapping[str, Any], clamp: bool = True) -> Sketch | None:
        """The sketch of a parameter, None where it is AdamW's. `clamp` False: only where the rank is too large."""
        if group["rank"] is None or p.ndim < 2 or not p.numel():
            return None
        sketch = sketch_of(p.shape, group["rank"], group["side"])
        return sketch if clamp or sketch.rank < group["rank"] else None

    def _name(self, p: Tensor, group: Mapping[str, Any]) -> str:
        names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        return names.get(id(p), f"of shape {list(p.shape)}")


def APOLLOMini(params: Any, lr: float | Tensor = 1e-2, **options: Any) -> APOLLO:
    """APOLLO at rank 1: one factor for a matrix, alpha 128; a state of 2 n + 2 numbers for an m x n weight, m <= n.

    Args:
        params: parameters or groups. Without groups every tensor of two and more dimensions is sketched, embeddings
            too: make groups with `apollo_param_groups(model, rank=1)` to leave them to AdamW as the paper does.
        lr: learning rate, at least 0.
        options: of APOLLO.

    Returns:
        The optimizer.
    """
    return APOLLO(params, lr, **{"rank": 1, "scale_type": "tensor", "scale": 128.0, **options})


def apollo_layerwise(
    model: nn.Module, groups: Any = None, *, clip_norm: float | None = None, accumulation: int = 1, **options: Any
) -> APOLLO:
    """An APOLLO over `groups` (default: all parameters of `model`) that works during `loss.backward()`.

    Each weight is updated when its gradient is ready, and the gradient is freed at once: at most a few layers' exist at
    a time. What needs all of them together cannot work: clipping by the global norm, accumulation, gradient scaling.

    Use it as any optimizer: its `step()` marks the end of a batch and updates nothing, schedulers act on its groups. A
    gradient that is not finite is found when later layers are updated already.

    Args:
        model: whose backward pass updates.
        groups: parameters or groups of them.
        clip_norm: None; a norm of all gradients is refused.
        accumulation: 1; more is refused.
        options: of APOLLO.

    Returns:
        The optimizer.

    Raises:
        UsageError: clip_norm, accumulation above 1 and, in backward, a second gradient before step().
        Unsupported: weights split over processes.
    """
    if clip_norm is not None:
        raise UsageError(f"clip_norm={clip_norm}: the norm of all gradients is never known here; APOLLO limits updates")
    if accumulation != 1:
        raise UsageError(f"accumulation={accumulation}: gradients are used at once; use larger batches, or APOLLO")
    optimizer = APOLLO(model.parameters() if groups is None else groups, **options)
    optimizer.hooked = set()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(is_split(p) for p in parameters):
        raise Unsupported("the weights are split over processes: use APOLLO, whose gradients are split too")

    def ready(parameter: nn.Parameter) -> None:
        assert optimizer.hooked is not None
        if parameter in optimizer.hooked:
            raise UsageError(
                "a second gradient before step(): layer-wise updates cannot accumulate gradients; call step() after "
                "every backward(), or use APOLLO"
            )
        optimizer.hooked.add(parameter)
        optimizer.update([parameter])
        parameter.grad = None

    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(ready)
    return optimizer
