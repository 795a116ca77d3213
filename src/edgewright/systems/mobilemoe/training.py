"""Training a mixture of experts: balanced loads, small logits, experts shared out between processes, usage counted.

Source: MobileMoE, arXiv 2605.27358. After each optimizer step, with n_e tokens routed to e over the global batch,
    b_e += rate * sign(mean(n) - n_e)
and the loss gets 1e-4 * mean over tokens of (logsumexp_e z_e)^2 on the router logits z. There is no auxiliary loss.

Expert parallelism: each process of a group keeps a share of the experts; tokens travel to them and back. The layout is
torchtitan's: a DeviceMesh with dimensions "dp" and "ep". Every process has its own batch. Experts are DTensors sharded
over "ep" and the same over "dp"; everything else is the same everywhere. Checkpoints written with
torch.distributed.checkpoint hold whole [E, ...] tensors, so that another number of processes can go on.

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    parallelize_experts(model, mesh)
    ...; loss.backward(); sync_gradients(model, mesh); optimizer.step(); balancer.step()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from edgewright.checks import check, number
from edgewright.errors import UsageError
from edgewright.measure.plot import plot
from edgewright.systems.mobilemoe import backends
from edgewright.systems.mobilemoe.layer import Experts, Router, Routing, moe_layers
from edgewright.training.distributed import is_split, split

Z_WEIGHT = 1e-4


class LoadBalancer:
    """Moves the selection bias of every sparse layer towards equal loads.

    It counts what the routers choose in training mode, over all micro batches and all processes, until `step()`. Call
    `step()` after the optimizer's, or `attach(optimizer)` once and it is called. The biases are buffers of the model
    and saved with it; `state_dict` holds the counts of an unfinished step. `loads`: counts of the latest step by layer.

    Args:
        model: with sparse layers.
        rate: of one move; 1e-3 is the paper's, 0 switches it off.

    Raises:
        UsageError: a rate outside [0, 1), or a model without sparse layers.
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3) -> None:
        check("LoadBalancer rate", rate, number(0, below=1))
        self.rate = rate
        self.routers: dict[str, Router] = {name: layer.gate for name, layer in moe_layers(model).items()}
        self.counts = {name: _no_tokens(router) for name, router in self.routers.items()}
        self.loads: dict[str, Tensor] = {}
        self._handles = [
            router.register_forward_hook(lambda module, _, routing, name=name: self._count(name, module, routing))
            for name, router in self.routers.items()
        ]

    def _count(self, name: str, router: Router, routing: Routing) -> None:
        if router.training and not _in_backward():
            self.counts[name] = self.counts[name].to(routing.indices.device) + routing.counts

    @torch.no_grad()
    def step(self) -> None:
        """One move of every bias, from the counts since the last one; layers without tokens stay as they are."""
        if dist.is_available() and dist.is_initialized():
            for counts in self.counts.values():
                dist.all_reduce(counts)
        for name, router in self.routers.items():
            counts, bias = self.counts[name], router.e_score_correction_bias
            load = counts.to(bias.device, torch.float64)
            bias += self.rate * torch.sign(load.mean() - load).to(bias.dtype)
            self.loads[name] = counts
            self.counts[name] = torch.zeros_like(counts)

    def attach(self, optimizer: torch.optim.Optimizer) -> LoadBalancer:
        """Step after every step of this optimizer, for loops that offer no other place; returns itself."""
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.step()))  # type: ignore[arg-type]
        return self

    def max_load(self) -> dict[str, float]:
        """Largest load over the mean one in the latest step, by layer: 1 is perfect, num_experts / top_k the worst."""
        return {name: imbalance(counts) for name, counts in self.loads.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate, "counts": {name: counts.cpu() for name, counts in self.counts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UsageError for the state of another model."""
        if set(state["counts"]) != set(self.counts):
            other = sorted(set(state["counts"]) ^ set(self.counts))[0]
            raise UsageError(f"this balancer's state is of another model: it and the model disagree on layer {other!r}")
        self.rate = state["rate"]
        self.counts = {name: state["counts"][name].to(counts.device) for name, counts in self.counts.items()}

    def close(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[tuple[str, Routing]]]:
    """The routings of every forward inside the block, in order, with their gradients; a layer that runs twice is twice.

    with record_routing(model) as routings:
        loss = model(ids, labels=ids).loss
    """
    routings: list[tuple[str, Routing]] = []

    def hook(name: str) -> Any:
        return lambda module, inputs, routing: routings.append((name, routing))

    handles = [layer.gate.register_forward_hook(hook(name)) for name, layer in moe_layers(model).items()]
    try:
        yield routings
    finally:
        for handle in handles:
            handle.remove()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of (logsumexp over experts)^2; logits [N, E], zero for no tokens."""
    return torch.logsumexp(logits.float(), -1).square().sum() / max(len(logits), 1)


def imbalance(counts: Tensor) -> float:
    """Largest load over the mean load; 1.0 for no tokens at all."""
    mean = counts.double().mean()
    return float(counts.max() / mean) if mean > 0 else 1.0


class MoELoss:
    """A loss function for `edgewright.fit` around another one: adds the router z-loss, keeps the balancer's state.

    Records "z_loss" (unweighted, mean over layers) and "max_load" (the worst layer's largest load over its mean).

    Args:
        loss_function: (model, batch) -> loss or (loss, metrics), as `fit` takes it.
        balancer: attached to the optimizer.
        z_weight: of the z-loss, the paper's.
    """

    def __init__(self, loss_function: Any, balancer: LoadBalancer | None = None, z_weight: float = Z_WEIGHT) -> None:
        self.loss_function, self.balancer, self.z_weight = loss_function, balancer, z_weight

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        with record_routing(model) as routings:
            result = self.loss_function(model, batch)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        z_loss = torch.stack([router_z_loss(routing.logits) for _, routing in routings]).mean()
        worst = max(imbalance(routing.counts) for _, routing in routings)
        return loss + self.z_weight * z_loss, {**metrics, "z_loss": z_loss.detach(), "max_load": worst}

    def state_dict(self) -> dict[str, Any]:
        return self.balancer.state_dict() if self.balancer else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.balancer:
            self.balancer.load_state_dict(state)


def _no_tokens(router: Router) -> Tensor:
    return torch.zeros(router.config.num_experts, dtype=torch.int64, device=router.weight.device)


def balanced_loss(loss: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> MoELoss:
    """`loss` with the loss of the routers added, and a balancer of the model's experts behind the optimizer's steps."""
    return MoELoss(loss, LoadBalancer(model).attach(optimizer))


def _in_backward() -> bool:
    """Whether a checkpointed block is being run again for its gradients: its tokens were counted already."""
    return torch._C._current_graph_task_id() != -1


class ExpertParallel:
    """Stands in for the experts of one layer: rows to the processes that own their experts, results back."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        self.experts, self.group, self.size = experts, mesh.get_group(), mesh.size()

    def __call__(self, u: Tensor, routing: Routing, capacity: int | None = None) -> Tensor:
        """As `Experts.forward`; a capacity counts the tokens of this process. u: [N, d] -> [N, d]."""
        weights = self.experts.weights
        total, k = self.experts.config.num_experts, routing.indices.shape[1]
        u = backends.quantized_input(weights.gate_up, u)
        sent = backends.keep_first(backends.counting_sort(routing.indices.reshape(-1), total), capacity)
        received = torch.empty_like(sent.counts)  # [processes * local experts], what each sends to each expert of ours
        dist.all_to_all_single(received, sent.counts, group=self.group)
        outgoing = sent.counts.view(self.size, -1).sum(1).tolist()
        incoming = received.view(self.size, -1).sum(1).tolist()
        rows = self._exchange(u.index_select(0, sent.order // k), outgoing, incoming)

        local = total // self.size
        owner = torch.arange(local, device=u.device).repeat(self.size).repeat_interleave(received)
        ours = backends.counting_sort(owner, local)
        name = "grouped_mm" if self.experts.config.backend == "grouped_mm" or u.is_cuda else "sorted"
        results = backends.on_rows(name, rows.index_select(0, ours.order), ours.counts, weights)
        results = torch.zeros_like(results).index_copy(0, ours.order, results)
        back = self._exchange(results, incoming, outgoing)
        return backends.combine(back, sent.order, routing.weights, u)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Rows [sum(send), d] -> [sum(receive), d]; gradients take the way back."""
        from torch.distributed.nn.functional import all_to_all_single

        out = rows.new_empty(sum(receive), rows.shape[1])
        return all_to_all_single(out, rows.contiguous(), receive, send, group=self.group)


def parallelize_experts(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leave this process its share of the experts of every layer, in place.

    Args:
        model: with sparse layers; the first process of each group gives its experts to the others.
        mesh: with the dimensions "dp" and "ep".

    Returns:
        The model.

    Raises:
        UsageError: a mesh without these dimensions, experts that do not divide among the processes of "ep", or ones
            that are quantised or distributed already.
    """
    if mesh.mesh_dim_names is None or not {"dp", "ep"} <= set(mesh.mesh_dim_names):
        raise UsageError(
            f"the mesh has dimensions {mesh.mesh_dim_names}; expert parallelism needs ('dp', 'ep'), for example "
            "init_device_mesh('cpu', (1, 2), mesh_dim_names=('dp', 'ep'))"
        )
    group = mesh["ep"]
    layers = moe_layers(model)
    for name, layer in layers.items():
        if layer.config.num_experts % group.size():
            raise UsageError(
                f"{name}: num_experts={layer.config.num_experts} does not divide among {group.size()} processes of ep"
            )
        for stack in Experts.weight_stacks:
            weight = getattr(layer.experts, stack)
            if not isinstance(weight, nn.Parameter) or is_split(weight):
                raise UsageError(f"{name}.experts.{stack} is distributed or quantised already; parallelise it first")
    for layer in layers.values():
        for stack in Experts.weight_stacks:
            weight = getattr(layer.experts, stack)
            shard = nn.Parameter(split(weight, group, 0), requires_grad=weight.requires_grad)
            setattr(layer.experts, stack, shard)
        layer.expert_parallel = ExpertParallel(layer.experts, group)
    return model


@torch.no_grad()
def parallel_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups that do not mix distributed and plain parameters, which torch's multi-tensor steps refuse."""
    trained = [p for p in model.parameters() if p.requires_grad]
    halves = ([p for p in trained if is_split(p)], [p for p in trained if not is_split(p)])
    return [{"params": half} for half in halves if half]


@dataclass(frozen=True)
class ExpertUsage:
    """Counts of routed tokens. sequences: int64 [S, layers, E], one row a sequence; labels: int64 [S], its domain."""

    domains: tuple[str, ...]
    layers: tuple[str, ...]
    sequences: Tensor
    labels: Tensor

    @property
    def counts(self) -> Tensor:
        """int64 [domains, layers, E]."""
        return _by_domain(self.sequences, self.labels, len(self.domains))

    @property
    def share(self) -> Tensor:
        """Part of a layer's assignments that each expert gets, float64 [domains, layers, E]; rows add up to 1."""
        return _normalised(self.counts)

    @property
    def variation(self) -> Tensor:
        """Coefficient of variation of the loads over all domains, float64 [layers]; 0 is perfect balance."""
        load = self.counts.sum(0).double()
        return load.std(-1, correction=0) / load.mean(-1).clamp_min(1e-300)

    @property
    def max_load(self) -> Tensor:
        """Largest load over the mean one, float64 [layers]."""
        load = self.counts.sum(0).double()
        return load.amax(-1) / load.mean(-1).clamp_min(1e-300)

    @property
    def dead(self) -> list[tuple[str, int]]:
        """(layer, expert) of every expert that no token chose."""
        none = (self.counts.sum(0) == 0).nonzero().tolist()
        return [(self.layers[layer], expert) for layer, expert in none]

    def divergence(self) -> float:
        """Jensen-Shannon divergence between the domains' usages in bits, mean over layers; 0 for one domain."""
        return _divergence(self.counts)

    def shuffled_divergence(self, repeats: int = 100, seed: int = 0) -> Tensor:
        """The same with the labels of the sequences shuffled, float64 [repeats]: what chance alone gives."""
        generator = torch.Generator().manual_seed(seed)
        values = []
        for _ in range(repeats):
            labels = self.labels[torch.randperm(len(self.labels), generator=generator)]
            values.append(_divergence(_by_domain(self.sequences, labels, len(self.domains))))
        return torch.tensor(values, dtype=torch.float64)

    def plot(self, path: str | Path) -> Path:
        """Heat map layer x expert, domains side by side, experts in the order of their use in the first domain."""
        share = self.share * self.sequences.shape[2]  # 1 is an equal share
        order = share[0].argsort(-1, descending=True).expand_as(share)
        picture = share.gather(-1, order).transpose(0, 1).flatten(1)  # [layers, domains * E]
        experts = self.sequences.shape[2]
        with plot(path, (1.5 + 3 * len(self.domains), 1.5 + 0.3 * len(self.layers))) as axes:
            image = axes.imshow(picture.numpy(), aspect="auto", cmap="viridis", vmin=0)
            for domain in range(1, len(self.domains)):
                axes.axvline(domain * experts - 0.5, color="white")
            axes.set_xticks([(i + 0.5) * experts - 0.5 for i in range(len(self.domains))], self.domains)
            axes.set_yticks(range(len(self.layers)), [str(i) for i in range(len(self.layers))])
            axes.set_ylabel("layer")
            axes.figure.colorbar(image, label="load over the mean load")
        return Path(path)


@torch.no_grad()
def expert_usage(model: nn.Module, loader: Mapping[str, Iterable[Any]] | Iterable[Any]) -> ExpertUsage:
    """Run tokens through the model and count which experts take them.

    Args:
        model: with sparse layers of equal size; it keeps its mode and gets no gradients.
        loader: token batches (int64 [B, T], or dicts with "input_ids") by domain, or of one unnamed domain.

    Returns:
        The counts, one row a sequence.

    Raises:
        UsageError: a model without sparse layers or with unequal ones, or a domain without batches.
    """
    layers = moe_layers(model)
    domains = dict(loader) if isinstance(loader, Mapping) else {"all": loader}
    experts = {layer.config.num_experts for layer in layers.values()}
    if len(experts) > 1:
        raise UsageError(f"the layers have {sorted(experts)} experts; usage is compared between equal layers only")
    size = experts.pop()
    position = {name: i for i, name in enumerate(layers)}
    rows: list[Tensor] = []
    labels: list[int] = []
    table = torch.empty(0)

    def hook(name: str) -> Any:
        def count(module: nn.Module, inputs: Any, routing: Routing) -> None:
            chosen = routing.indices.reshape(len(table), -1).cpu()
            table[:, position[name]].scatter_add_(1, chosen, torch.ones_like(chosen))

        return count

    handles = [layer.gate.register_forward_hook(hook(name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        for label, (domain, batches) in enumerate(domains.items()):
            before = len(rows)
            for batch in batches:
                ids: Any = batch["input_ids"] if isinstance(batch, Mapping) else batch
                table = torch.zeros(len(ids), len(layers), size, dtype=torch.int64)
                model(input_ids=ids.to(next(model.parameters()).device))
                rows.append(table)
                labels += [label] * len(ids)
            if len(rows) == before:
                raise UsageError(f"domain {domain!r} has no batches")
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return ExpertUsage(tuple(domains), tuple(layers), torch.cat(rows), torch.tensor(labels))


def _by_domain(sequences: Tensor, labels: Tensor, domains: int) -> Tensor:
    return sequences.new_zeros(domains, *sequences.shape[1:]).index_add(0, labels, sequences)


def _normalised(counts: Tensor) -> Tensor:
    return counts.double() / counts.sum(-1, keepdim=True).clamp_min(1).double()


def _divergence(counts: Tensor) -> float:
    share = _normalised(counts)  # [domains, layers, E]
    mixed = _entropy(share.mean(0)) - _entropy(share).mean(0)
    return float(mixed.mean())


def _entropy(share: Tensor) -> Tensor:
    return -(share * share.clamp_min(1e-300).log2()).sum(-1)
