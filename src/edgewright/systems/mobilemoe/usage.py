"""Which experts a model uses for what: counts by domain, layer and expert, with the picture and the usual figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.measure.plot import plot
from edgewright.systems.mobilemoe.layer import Routing, moe_layers


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
    """Run token batches (int64 [B, T], or dicts with "input_ids") through the model and count the experts' tokens.

    loader: batches by domain, or batches of one unnamed domain. The model keeps its mode and gets no gradients. Raises
    UsageError for a model without sparse layers and for a domain without batches.
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
