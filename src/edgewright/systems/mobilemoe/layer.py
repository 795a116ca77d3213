"""Sparse mixture of experts for small models: sigmoid router with a selection bias, fine-grained and shared experts.

Source: "MobileMoE: Scaling On-Device Mixture of Experts", arXiv 2605.27358. For u [N, d], with E experts and top-k:
    z = u Wr^T in float32,  s = sigmoid(z),  K = the k largest of s + b (ties: the lower index),
    r_e = route_scale * s_e / (sum over K of s + 1e-20),  y = sum over K of r_e FFN_e(u) + FFN_shared(u)
b only selects; it is moved by `training.LoadBalancer`, never by a gradient. Parameters have the names of
transformers' Glm4MoeMoE, so that a conversion is a copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from edgewright.checks import check, check_fields, number, one_of, optional, whole
from edgewright.errors import CheckFailed, UsageError
from edgewright.models.decoder.model import FeedForward
from edgewright.systems.mobilemoe import backends

BACKENDS = ("auto", "loop", "sorted", "grouped_mm", "gather", "dense")


@dataclass(frozen=True)
class MoEConfig:
    """One sparse layer; also the `moe` field of an `EdgeDecoderConfig`. Defaults: the routing of the published S model.

    Args:
        num_experts: routed experts, E * g less the pieces of the shared one in the paper's variables.
        top_k: how many of them a token uses.
        expert_size: width of a routed expert.
        shared_size: width of the expert that every token uses; 0: none.
        score: "sigmoid", or "softmax" over all experts.
        norm_topk: the weights of the chosen experts add up to route_scale.
        route_scale: factor of the routed sum.
        capacity_factor: while training, an expert takes at most ceil(factor * tokens * top_k / num_experts) tokens and
            drops later ones; None, and always in eval mode: dropless.
        backend: one of BACKENDS, all with the same result; "auto" takes the fastest for device and mode.
        hidden_act: activation of the gate.
        group_axis: axis of the stored expert [out, in] along which quantisation groups run: "in", as trained; "out", as
            in the released packed files.

    Raises:
        UsageError: a value outside these.
    """

    num_experts: int = 60
    top_k: int = 4
    expert_size: int = 384
    shared_size: int = 1536
    score: str = "sigmoid"
    norm_topk: bool = True
    route_scale: float = 1.0
    capacity_factor: float | None = None
    backend: str = "auto"
    hidden_act: str = "silu"
    group_axis: Literal["in", "out"] = "in"

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("num_experts", "expert_size"), whole(1))
        names = {"score": one_of("sigmoid", "softmax"), "backend": one_of(*BACKENDS), "group_axis": one_of("in", "out")}
        positive = number(above=0)
        check_fields(self, {**counts, "shared_size": whole(0), **names, "hidden_act": one_of(*ACT2FN)})
        check_fields(self, {"top_k": whole(1, self.num_experts), "route_scale": positive})
        check_fields(self, {"capacity_factor": optional(positive)})

    @classmethod
    def split(
        cls, dense_size: int, experts: int = 8, granularity: int = 8, shared: bool = True, **settings: Any
    ) -> MoEConfig:
        """The paper's variables E, g, s around a dense width: neither g nor s changes active or total parameters.

        Each of E experts of width dense_size is cut into g pieces, of which g are active; with `shared`, g/2 of both
        become one piece that is always on: (d_ff 3072, 8, 8) gives 60 of 384, top 4, shared 1536. deviation: the
        paper's shared piece is 4 at its g = 8; other g scale it, which keeps half the work shared.

        Args:
            dense_size: width of the feed-forward layer that one expert replaces.
            experts: E.
            granularity: g, a divisor of dense_size.
            shared: s, whether half of the active width is always on.
            settings: further fields.

        Raises:
            UsageError: g does not divide the width, or leaves no routed piece.
        """
        for name, value in (("dense_size", dense_size), ("experts", experts), ("granularity", granularity)):
            check(name, value, whole(1))
        if dense_size % granularity:
            raise UsageError(f"granularity={granularity} does not divide the feed-forward width {dense_size}")
        if shared and granularity < 2:
            raise UsageError("granularity=1 leaves no routed piece beside a shared one; use 2 or more, or shared=False")
        pieces, width = granularity // 2 if shared else 0, dense_size // granularity
        return cls(experts * granularity - pieces, granularity - pieces, width, pieces * width, **settings)

    def capacity(self, tokens: int) -> int | None:
        """Slots of an expert for a batch of that many tokens, or None without a limit."""
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * tokens * self.top_k / self.num_experts)


class Routing(NamedTuple):
    """Where N tokens go: router logits z [N, E] float32, weights r [N, k] float32, expert indices [N, k] int64."""

    logits: Tensor
    weights: Tensor
    indices: Tensor

    @property
    def counts(self) -> Tensor:
        """Tokens that chose each expert, int64 [E], dropped ones included."""
        return torch.bincount(self.indices.reshape(-1), minlength=self.logits.shape[1])

    def detach(self) -> Routing:
        return Routing(self.logits.detach(), self.weights.detach(), self.indices)


class Router(nn.Module):
    """Scores and choice of experts, in float32 whatever the model's dtype: a rounded score would flip the choice."""

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, hidden, dtype=torch.float32))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    @torch.no_grad()
    def init_weights(self, config: Any) -> None:
        init.normal_(self.weight, mean=0.0, std=config.initializer_range)
        init.zeros_(self.e_score_correction_bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Devices change as asked, dtypes do not: `model.to(torch.bfloat16)` leaves the router in float32."""

        def moved(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        return super()._apply(moved, recurse)

    def forward(self, u: Tensor) -> Routing:
        """u: [N, hidden]. Raises CheckFailed for logits that are no numbers."""
        with torch.autocast(u.device.type, enabled=False):
            logits = F.linear(u.float(), self.weight.float())
        _check_finite(logits, u)
        scores = logits.sigmoid() if self.config.score == "sigmoid" else logits.softmax(-1)
        indices = _top_k(scores.detach() + self.e_score_correction_bias, self.config.top_k)
        weights = scores.gather(1, indices)
        if self.config.norm_topk:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(logits, weights * self.config.route_scale, indices)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.config.top_k} of {self.weight.shape[0]}"


class Experts(nn.Module):
    """E feed-forwards in two tensors: gate_up_proj [E, 2f, d] (gate rows first), down_proj [E, d, f].

    Under `quantize_` and `convert_` a tensor's place is taken by a QuantStack or PackedStack; see `weight_stacks`.
    """

    weight_stacks = ("gate_up_proj", "down_proj")

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.config, self.group_axis = config, config.group_axis
        count, width = config.num_experts, config.expert_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    @torch.no_grad()
    def init_weights(self, config: Any) -> None:
        init.normal_(self.gate_up_proj, mean=0.0, std=config.initializer_range)
        init.normal_(self.down_proj, mean=0.0, std=config.initializer_range)

    @property
    def weights(self) -> backends.Weights:
        """The tensors as the back-ends take them."""
        return backends.Weights(self.gate_up_proj, self.down_proj, self.act_fn)

    def forward(self, u: Tensor, routing: Routing, capacity: int | None = None) -> Tensor:
        """Sum over the chosen experts of r_e FFN_e(u). u: [N, d] -> [N, d]."""
        name = backends.choose(self.config.backend, u, routing.indices, self.config.num_experts)
        return backends.run(name, u, routing.indices, routing.weights, self.weights, capacity)


class SparseMoE(nn.Module):
    """Router, routed experts and a shared one (arXiv 2605.27358), without the residual.

    `last_routing` is the `Routing` of the latest call, without gradients. `expert_parallel` is set by
    `training.parallelize_experts`, which leaves this process a share of the experts.

    Args:
        hidden: width of u.
        config: shape and routing.
    """

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(hidden, config)
        self.experts = Experts(hidden, config)
        if config.shared_size:
            self.shared_experts = FeedForward(hidden, config.shared_size, config.hidden_act)
        self.last_routing: Routing | None = None
        self.expert_parallel: Any = None

    def forward(self, u: Tensor) -> Tensor:
        """U [B, T, d] -> [B, T, d]. Raises CheckFailed for router logits that are not finite."""
        flat = u.reshape(-1, u.shape[-1])
        routing = self.gate(flat)
        if not torch.compiler.is_compiling():
            self.last_routing = routing.detach()
        capacity = self.config.capacity(len(flat)) if self.training else None
        routed = self.experts if self.expert_parallel is None else self.expert_parallel
        out = routed(flat, routing, capacity)
        if self.config.shared_size:
            out = out + self.shared_experts(flat)
        return out.reshape(u.shape)

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.num_experts} of width {c.expert_size}, top {c.top_k}, shared {c.shared_size}"


def moe_layers(model: nn.Module) -> dict[str, SparseMoE]:
    """Every sparse layer of a model by name. Raises UsageError where there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseMoE)}
    if not layers:
        raise UsageError(f"{type(model).__name__} has no SparseMoE layer; build it with ffn_types='moe'")
    return layers


def _top_k(choice: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the largest entries, largest first, the lower index first among equals."""
    if torch.compiler.is_compiling():
        return choice.topk(k, dim=-1).indices  # exporters know this operator; equal scores do not occur in practice
    bits = choice.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # whole numbers in the order of the floats
    experts = choice.shape[1]
    keys = ordered * experts + torch.arange(experts - 1, -1, -1, device=choice.device)
    return keys.topk(k, dim=-1).indices


def _check_finite(logits: Tensor, u: Tensor) -> None:
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or torch.isfinite(logits).all():
        return  # elsewhere asking costs a wait, and the loss shows it
    where = "inputs" if not torch.isfinite(u).all() else "weights"
    raise CheckFailed(f"the router's logits are not finite: its {where} hold NaN or infinity; lower the learning rate")
