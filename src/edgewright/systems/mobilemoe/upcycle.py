"""A mixture of experts out of a dense model, by slicing its feed-forwards: no weight is added, few of them run.

Our addition to MobileMoE (arXiv 2605.27358), with its variables: a feed-forward of width d_ff is cut into E * g pieces;
the g / 2 most active of them become the shared expert, the others are routed. With every piece on and equal scores the
result is the dense model: SwiGLU is a sum over channels, and route_scale = top_k makes each weight one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgewright.checks import check, number, whole
from edgewright.errors import UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, FeedForward
from edgewright.systems.mobilemoe.layer import MoEConfig, SparseMoE

MOST_TOKENS = 1024  # of the calibration text, a layer
ROUNDS = 8  # of balanced k-means
RIDGE = 1e-2  # of the router's regression, times the mean square of its inputs
COPIED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads") + (
    "num_key_value_heads", "head_dim", "rope_parameters", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


@dataclass
class _Seen:
    """What calibration saw of one feed-forward: its inputs [S, d] and its channels' activations |a| [S, d_ff]."""

    inputs: Tensor
    activations: Tensor


@torch.no_grad()
def moe_from_dense(
    model: PreTrainedModel,
    experts: int = 8,
    granularity: int = 4,
    shared: bool = True,
    *,
    layers: Collection[int] | None = None,
    top_k: int | None = None,
    batches: Iterable[Any] | None = None,
    margin: float = 0.01,
    seed: int = 0,
) -> EdgeDecoderForCausalLM:
    """A new decoder whose plain feed-forwards are sliced; `model` is left as it was.

    Args:
        model: an edge decoder or a Llama without biases.
        experts: E; E * g pieces are made.
        granularity: g, pieces that are active.
        shared: make half of the active pieces, the most active ones, an expert that is always on.
        layers: stored blocks that are sliced, all where None.
        top_k: routed pieces that a token uses, granularity - granularity // 2 by default.
        batches: token batches, int64 [B, T] or dicts with "input_ids", by which channels are grouped (balanced k-means
            on which of them are active together) and the routers fitted (ridge regression on each piece's share of the
            output); without them channels are dealt out in strides and the routers are random.
        margin: spread of the router's logits. It decides who is chosen at any size; the smaller it is, the nearer the
            weights are to one, and at 0 all scores are equal.
        seed: of what is random.

    Returns:
        The sparse decoder in the mode, dtype and place of `model`.

    Raises:
        UsageError: widths that do not divide, blocks without a plain feed-forward, or another kind of model.
    """
    config = _edge_config(model)
    dense = _dense_blocks(model, layers)
    moes = {block: _sizes(mlp.gate_proj.out_features, experts, granularity, shared, top_k) for block, mlp in dense}
    if len({asdict(c)["expert_size"] for c in moes.values()}) > 1:
        raise UsageError("the feed-forwards differ in width; all sparse layers of a model have one shape")
    check("margin", margin, number(0))
    settings = next(iter(moes.values()))
    fields = config.to_dict() | {"moe": asdict(settings)}
    sliced = {block for block, _ in dense}
    stored = config.share_map or ()  # filled in by the configuration
    fields["ffn_types"] = ["moe" if b in sliced else kind for b, kind in zip(stored, config.ffn_types, strict=True)]
    fields["initializer_range"] = config.initializer_range
    for name in ("layer_types", "transformers_version", "model_type", "architectures", "dtype", "_name_or_path"):
        fields.pop(name, None)
    with torch.random.fork_rng(devices=[]):
        sparse = EdgeDecoderForCausalLM(EdgeDecoderConfig(**fields))
        sparse.to(dtype=model.dtype)  # type: ignore[call-arg]
    gone = tuple(f"model.layers.{block}.mlp." for block in sliced)
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith(gone)}
    sparse.load_state_dict(kept, strict=False)
    seen = _calibrate(model, dense, batches) if batches is not None else {}
    generator = torch.Generator().manual_seed(seed)
    for block, mlp in dense:
        layer = sparse.model.layers[block].mlp
        assert isinstance(layer, SparseMoE)
        _slice(layer, mlp, experts * granularity, seen.get(block), margin, generator)
    sparse.to(device=model.device)  # type: ignore[call-arg]
    return sparse.train(model.training)


def balanced_kmeans(features: Tensor, clusters: int, generator: torch.Generator, rounds: int = ROUNDS) -> Tensor:
    """Clusters of equal size by cosine: features [C, S] -> indices int64 [clusters, C / clusters].

    Each round hands out places greedily, the most similar pair of item and centre first.
    """
    items = len(features)
    if clusters < 1 or items % clusters:
        raise UsageError(f"{items} channels do not divide into {clusters} clusters of equal size")
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    centres = unit[torch.randperm(items, generator=generator)[:clusters]]
    groups = torch.empty(0)
    for _ in range(rounds):
        owner = _assign(unit @ centres.t(), items // clusters)
        groups = torch.argsort(owner, stable=True).view(clusters, -1)
        centres = torch.nn.functional.normalize(unit[groups].sum(1), dim=1)
    return groups


def _assign(similarity: Tensor, size: int) -> Tensor:
    """Owner of each item [C] under `size` places a cluster; similarity [C, clusters]."""
    items, clusters = similarity.shape
    room, owner = [size] * clusters, [-1] * items
    for pair in similarity.flatten().argsort(descending=True, stable=True).tolist():
        item, cluster = divmod(pair, clusters)
        if owner[item] < 0 and room[cluster]:
            owner[item] = cluster
            room[cluster] -= 1
    return torch.tensor(owner)


def _sizes(width: int, experts: int, granularity: int, shared: bool, top_k: int | None) -> MoEConfig:
    pieces = experts * granularity
    if pieces < 2 or width % pieces:
        raise UsageError(
            f"experts={experts} x granularity={granularity} = {pieces} pieces do not divide the width {width}"
        )
    base = MoEConfig.split(width // experts, experts, granularity, shared)
    chosen = base.top_k if top_k is None else top_k
    return MoEConfig(base.num_experts, chosen, base.expert_size, base.shared_size, route_scale=float(chosen))


def _slice(
    layer: SparseMoE, mlp: Any, pieces: int, seen: _Seen | None, margin: float, generator: torch.Generator
) -> None:
    """Fill a sparse layer with the channels of a dense one."""
    width = mlp.gate_proj.out_features
    if seen is None:
        groups = torch.arange(width).view(-1, pieces).t()  # strides
        routed = groups
        taken = groups.new_empty(0)
    else:
        groups = balanced_kmeans(seen.activations.t(), pieces, generator)
        routed, taken = groups, groups.new_empty(0)
    count = layer.config.shared_size // layer.config.expert_size if layer.config.shared_size else 0
    energy = _energy(mlp, seen, groups)  # [S, pieces]
    if count:
        ranking = energy.mean(0).argsort(descending=True, stable=True)
        taken, routed = groups[ranking[:count]].flatten(), groups[ranking[count:].sort().values]
        energy = energy[:, ranking[count:].sort().values]
    gate, up, down = (m.weight.detach().cpu() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    layer.experts.gate_up_proj.copy_(torch.cat([gate[routed], up[routed]], dim=1))
    layer.experts.down_proj.copy_(down[:, routed].transpose(0, 1))
    if count:
        shared = layer.shared_experts
        shared.gate_proj.weight.copy_(gate[taken])
        shared.up_proj.weight.copy_(up[taken])
        shared.down_proj.weight.copy_(down[:, taken])
    router = layer.gate
    if seen is None:
        weight = torch.randn(router.weight.shape, generator=generator)
        router.weight.copy_(margin * weight / weight.shape[1] ** 0.5)
        return
    solution, offset = _fit_router(seen.inputs, energy)
    router.weight.copy_(margin * solution)
    # What a score of 0.5 + z / 4 lacks, since the router has no offset: it only selects, so the bias can hold it.
    router.e_score_correction_bias.copy_(margin * offset / 4)


def _energy(mlp: Any, seen: _Seen | None, groups: Tensor) -> Tensor:
    """Size of what each piece adds to the output, [S, pieces]; without calibration its weights' norm, [1, pieces]."""
    length = mlp.down_proj.weight.detach().float().norm(dim=0).cpu()  # [d_ff]
    if seen is None:
        sizes = (m.weight.detach().float().norm(dim=1).cpu() for m in (mlp.gate_proj, mlp.up_proj))
        for size in sizes:
            length = length * size
        return length[groups].sum(-1).unsqueeze(0)
    return (seen.activations * length)[:, groups].sum(-1)


def _fit_router(inputs: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [pieces, d], offsets [pieces]) such that inputs @ weights.T + offsets predicts the energy, in units of
    its spread over tokens and pieces.
    """
    spread = energy.std(correction=0).clamp_min(1e-12)
    target = (energy - energy.mean()) / spread
    x, y = inputs.double(), target.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.t() @ x
    gram += RIDGE * gram.diagonal().mean() * len(x) ** 0.5 * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, x.t() @ y)  # [d, pieces]
    return solution.t().float(), (y_mean - x_mean @ solution).float()


def _calibrate(model: PreTrainedModel, dense: list[tuple[int, Any]], batches: Iterable[Any]) -> dict[int, _Seen]:
    """Inputs and activations of every feed-forward on the first tokens of the batches."""
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {block: [] for block, _ in dense}
    inputs: dict[int, Tensor] = {}

    def keep_input(block: int) -> Any:
        return lambda module, arguments: inputs.__setitem__(block, arguments[0].flatten(0, -2))

    def keep_channels(block: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            parts[block].append((inputs[block].float().cpu(), arguments[0].flatten(0, -2).abs().float().cpu()))

        return hook

    training = model.training
    model.eval()
    tokens = 0
    with ExitStack() as stack:
        stack.callback(model.train, training)
        for block, mlp in dense:
            stack.callback(mlp.register_forward_pre_hook(keep_input(block)).remove)
            stack.callback(mlp.down_proj.register_forward_pre_hook(keep_channels(block)).remove)
        for batch in batches:
            ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
            model(input_ids=ids.to(model.device))
            tokens += ids.numel()
            if tokens >= MOST_TOKENS:
                break
    check("calibration tokens", tokens, whole(2))
    joined = {
        block: tuple(torch.cat(column)[:MOST_TOKENS] for column in zip(*p, strict=True)) for block, p in parts.items()
    }
    return {block: _Seen(*columns) for block, columns in joined.items()}


def _dense_blocks(model: PreTrainedModel, layers: Collection[int] | None) -> list[tuple[int, Any]]:
    """(stored block, its plain feed-forward) of every block in `layers` that has one; None: of all blocks."""
    names = ("gate_proj", "up_proj", "down_proj")
    blocks = [
        (i, block.mlp)
        for i, block in enumerate(model.model.layers)
        if isinstance(getattr(block, "mlp", None), FeedForward)
        or all(type(getattr(getattr(block, "mlp", None), name, None)) is nn.Linear for name in names)
    ]
    if not blocks:
        raise UsageError(f"{type(model).__name__} has no feed-forward of plain gate, up and down projections to slice")
    if layers is not None:
        unknown = sorted(set(layers) - {block for block, _ in blocks})
        if unknown or not layers:
            raise UsageError(
                f"layers={sorted(layers)}: name one or more of the blocks with a plain feed-forward, "
                f"{', '.join(str(block) for block, _ in blocks)}"
            )
        blocks = [(block, mlp) for block, mlp in blocks if block in set(layers)]
    if any(getattr(mlp, name).bias is not None for _, mlp in blocks for name in names):
        raise UsageError("the feed-forwards have biases; experts have none")
    return blocks


def _edge_config(model: PreTrainedModel) -> EdgeDecoderConfig:
    """The configuration of an edge decoder, or of the edge decoder that has a Llama's very state dict."""
    if isinstance(model.config, EdgeDecoderConfig):
        return model.config
    if model.config.model_type != "llama" or getattr(model.config, "attention_bias", False):
        raise UsageError(f"moe_from_dense takes an edge decoder or a Llama without biases, not {type(model).__name__}")
    return EdgeDecoderConfig(**{name: getattr(model.config, name) for name in COPIED})
