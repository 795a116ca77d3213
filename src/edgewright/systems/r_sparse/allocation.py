"""Allocation of what is left out: sparsity inside each block, and rho over all layers.

Blocks of a decoder are run one at a time, for thresholds from the sparsified prefix and for TEAL's greedy allocation
(arXiv 2408.14690): inside a block all layers start dense; the layer whose next step of sparsity moves the block's
output least takes it, until the parameter-weighted sparsity of the block is reached. Steps are inverse to the layers'
sizes, so that every step leaves out the same number of weights.

The search evolves rho, the division of every layer's reads between kept channels and the low-rank path. A genome has
one rho for each layer (and, if asked, one sparsity, whose parameter-weighted mean stays fixed); fitness is the mean
negative log-likelihood of calibration text with every token sparse. Mutation, crossover and selection are our choice:
the paper (arXiv 2504.19449) gives fitness and cost only. Every random number comes from one generator and every
fitness is kept under the hash of its genome, so a search that starts again with its file goes the same way.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import write_text
from edgewright.io.hashing import sha256
from edgewright.io.json_file import read_json
from edgewright.measure.plot import plot
from edgewright.measure.progress import ProgressBar
from edgewright.pruning.importance import decoder_layers
from edgewright.systems.r_sparse.layer import Factors, RSparseLinear
from edgewright.systems.r_sparse.model import apply_plan, apply_rsparse, remove_rsparse, setting, sparse_layers
from edgewright.systems.r_sparse.plan import (
    Calibration,
    LayerPlan,
    Plan,
    RSparseConfig,
    Tally,
    calibrate,
    check_text,
    default_plan,
    layer_sizes,
    score_scales,
    target_layers,
    text_hash,
    uniform_plan,
    watched,
)
from edgewright.training.snapshot import preserved_modes

MAX_RESUME_BYTES = 64 << 20
MOST = 0.98  # sparsity of one layer in a search over sparsities


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every layer is dense and each module in its own mode again."""
    with preserved_modes(model, False):
        try:
            yield
        finally:
            remove_rsparse(model)


@dataclass
class Stream:
    """What enters the blocks for one batch: `hidden` [B, T, d] of the next block, keyword arguments of every block."""

    hidden: Tensor
    arguments: list[dict[str, Any]]

    def through(self, index: int, block: nn.Module) -> Tensor:
        """The block's output; the stream stays where it is."""
        out = block(self.hidden, **self.arguments[index])
        return out if isinstance(out, Tensor) else out[0]  # type: ignore[no-any-return]


def streams(model: nn.Module, batches: Iterable[Tensor]) -> list[Stream]:
    """Each batch before the first block."""
    layers = decoder_layers(model)
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        first: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def entering(
            _: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            first: list[Tensor] = first,
            arguments: list[dict[str, Any]] = arguments,
        ) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            if not first:
                first.append(hidden)
            arguments.append(rest)

        handles = [layer.register_forward_pre_hook(entering, with_kwargs=True) for layer in layers]
        try:
            base: Any = model.model
            base(input_ids=batch.to(device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        found.append(Stream(first[0], arguments))
    return found


@torch.no_grad()
def calibrate_sequential(
    model: nn.Module,
    batches: Iterable[Tensor],
    config: RSparseConfig,
    plan: Plan | None = None,
    *,
    factors: Factors | None = None,
    progress: bool = False,
) -> Calibration:
    """As `calibrate`, but every block is measured on what the sparsified blocks before it give it.

    The thresholds that follow fit this plan (default: the configuration's for every layer). The model is left as it
    was. deviation: the official code measures all layers on the dense model.
    """
    batches = list(batches)
    check_text(batches)
    layers = target_layers(model, config)
    plan = uniform_plan(layers, config) if plan is None else plan
    tally = Tally(score_scales(layers, config))
    factors = factors or Factors()
    with restored(model):
        flows = streams(model, batches)
        blocks = decoder_layers(model)
        with ProgressBar("calibrating", len(blocks), shown=progress) as bar:
            for index, block in enumerate(blocks):
                prefix = _name_of(model, block) + "."
                inside = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
                with watched(inside, tally):
                    dense = [flow.through(index, block) for flow in flows]
                if inside:
                    part = {name[len(prefix) :]: plan[name] for name in inside}
                    measured = {name[len(prefix) :]: tally.histograms[name] for name in inside}
                    local = dataclasses.replace(config, dense_prefill=False, path="reference")
                    apply_rsparse(block, local, Calibration(measured, 0, "", config.score), part, factors=factors)
                    dense = [flow.through(index, block) for flow in flows]
                    remove_rsparse(block)
                for flow, hidden in zip(flows, dense, strict=True):
                    flow.hidden = hidden
                bar.advance()
    return tally.result(batches, config)


@torch.no_grad()
def teal_path(
    model: nn.Module,
    batches: Iterable[Tensor],
    config: RSparseConfig,
    stats: Calibration,
    sparsities: Sequence[float],
    *,
    step: float = 0.05,
    lazy: bool = True,
    progress: bool = False,
) -> dict[float, dict[str, LayerPlan]]:
    """Greedy plans at several sparsities from one ascent, rho = 1 throughout. Sparsity -> plan.

    step: of sparsity, for a layer of the block's mean size. A block's error is that of its output on the dense model's
    input, squared and summed over all tokens but the first. The model is left as it was.
    deviation: with lazy=True a layer is tried again only while its last known cost is the least; that is the same
    ascent as long as costs grow along the way, and takes fewer trials. lazy=False tries all at every step.
    """
    wanted = sorted(set(sparsities))
    if not wanted or not 0.0 <= wanted[0] <= wanted[-1] < 1.0 or not 0.0 < step < 1.0:
        raise UsageError(f"sparsities={list(sparsities)} must be in [0, 1) and step={step} in (0, 1)")
    layers = target_layers(model, config)
    sizes = layer_sizes(layers)
    free = dict.fromkeys(layers, LayerPlan(0.0))
    plans: dict[float, dict[str, LayerPlan]] = {s: {} for s in wanted}
    with restored(model):
        flows = streams(model, batches)
        apply_rsparse(model, dataclasses.replace(config, dense_prefill=False, path="reference"), stats, free)
        blocks = decoder_layers(model)
        sparse = sparse_layers(model)
        with ProgressBar("allocating", len(blocks), shown=progress) as bar:
            for index, block in enumerate(blocks):
                prefix = _name_of(model, block) + "."
                inside = {name: layer for name, layer in sparse.items() if name.startswith(prefix)}
                targets = [flow.through(index, block) for flow in flows]  # thresholds below every score: dense
                if inside:
                    ascent = _Ascent(inside, sizes, stats, flows, targets, index, block, lazy)
                    for s in wanted:
                        plans[s] |= ascent.climb(s, step)
                    ascent.set(dict.fromkeys(inside, 0.0))
                for flow, hidden in zip(flows, targets, strict=True):
                    flow.hidden = hidden
                bar.advance()
        outside = {name: LayerPlan(0.0) for name in layers if not any(name in plan for plan in plans.values())}
    return {s: {name: (plan | outside)[name] for name in layers} for s, plan in plans.items()}


def teal_greedy(
    model: nn.Module,
    batches: Iterable[Tensor],
    config: RSparseConfig,
    stats: Calibration,
    *,
    step: float = 0.05,
    progress: bool = False,
) -> dict[str, LayerPlan]:
    """TEAL's allocation of the configuration's sparsity inside each block; a plan for `apply_rsparse`."""
    path = teal_path(model, batches, config, stats, [config.sparsity], step=step, progress=progress)
    return path[config.sparsity]


class _Ascent:
    """The greedy climb inside one block, which can stop at a sparsity and go on."""

    def __init__(
        self,
        layers: dict[str, RSparseLinear],
        sizes: dict[str, int],
        stats: Calibration,
        flows: list[Stream],
        targets: list[Tensor],
        index: int,
        block: nn.Module,
        lazy: bool,
    ) -> None:
        self.lazy = lazy
        self.layers, self.stats, self.flows, self.targets = layers, stats, flows, targets
        self.index, self.block = index, block
        total = sum(sizes[name] for name in layers)
        self.share = {name: sizes[name] / total for name in layers}
        self.level = dict.fromkeys(layers, 0.0)
        self.costs = dict.fromkeys(layers, 0.0)  # growth of the error by the layer's next step, when last tried
        self.error = 0.0

    def climb(self, sparsity: float, step: float) -> dict[str, LayerPlan]:
        """Raise layers until the weighted mean is `sparsity`; the last step is cut to meet it."""
        while (missing := sparsity - self._mean()) > 1e-9:
            open_layers = [name for name, level in self.level.items() if level < self._most(name) - 1e-9]
            if not open_layers:
                raise UsageError(f"sparsity={sparsity} cannot be reached: every layer must read at least one channel")
            name, level = self._cheapest(open_layers, step, missing)
            self.level[name] = level
            self.set(self.level)
            self.error += self.costs[name]
        return {name: LayerPlan(level) for name, level in self.level.items()}

    def set(self, levels: dict[str, float]) -> None:
        for name, level in levels.items():
            self.layers[name].set(self.stats.threshold(name, level))

    def _cheapest(self, names: list[str], step: float, missing: float) -> tuple[str, float]:
        stale = set(names)
        levels = {
            name: min(self.level[name] + min(step / len(self.layers), missing) / self.share[name], self._most(name))
            for name in names
        }
        while True:
            name = min(names if self.lazy or not stale else stale, key=self.costs.__getitem__)
            if name not in stale:
                return name, levels[name]
            self.layers[name].set(self.stats.threshold(name, levels[name]))
            self.costs[name] = self._measure() - self.error
            self.layers[name].set(self.stats.threshold(name, self.level[name]))
            stale.remove(name)

    def _measure(self) -> float:
        error = 0.0
        for flow, target in zip(self.flows, self.targets, strict=True):
            difference = flow.through(self.index, self.block) - target
            error += float(difference[:, 1:].double().square().sum())
        return error

    def _mean(self) -> float:
        return sum(self.share[name] * level for name, level in self.level.items())

    def _most(self, name: str) -> float:
        """The highest sparsity that leaves one channel."""
        return 1.0 - 1.0 / self.layers[name].in_features


def _name_of(model: nn.Module, block: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is block)


# -- search ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchConfig:
    """evals: genomes scored on the first `quick` sequences; the best `finalists` are scored on all of them."""

    evals: int = 400
    population: int = 32
    elite: int = 4
    tournament: int = 3
    mutation: float = 0.1
    sigma: float = 0.1
    quick: int = 4
    finalists: int = 8
    sparsities: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        fits = self.evals >= 3 and 0 < self.elite < self.population and self.tournament >= 1
        if not (fits and self.quick >= 1 and self.finalists >= 1 and 0 <= self.mutation <= 1 and self.sigma > 0):
            raise UsageError(
                f"{self} cannot work: evals >= 3, 0 < elite < population, tournament, quick and finalists >= 1, "
                "mutation in [0, 1], sigma > 0"
            )


@dataclass(frozen=True)
class SearchResult:
    """plan: the best found; fitness: its nats per token on all calibration sequences, `start` those of rho = 1.

    history: the best quick fitness after each new evaluation.
    """

    plan: dict[str, LayerPlan]
    fitness: float
    start: float
    evaluations: int
    history: tuple[float, ...] = field(repr=False)

    def plot(self, path: str | Path) -> None:
        """The best fitness over evaluations, as a PNG."""
        with plot(path, (6.0, 3.5)) as axes:
            axes.plot(range(1, len(self.history) + 1), self.history)
            axes.set_xlabel("genomes scored")
            axes.set_ylabel("best nats per token (quick score)")
            axes.grid(alpha=0.25)


@torch.no_grad()
def search_rho(
    model: nn.Module,
    sequences: Tensor,
    config: RSparseConfig,
    *,
    search: SearchConfig | None = None,
    evals: int | None = None,
    stats: Calibration | None = None,
    factors: Factors | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
) -> SearchResult:
    """Search rho for every layer at the configuration's sparsity on token ids [N, T]; the model is left as it was.

    stats: calibration, measured on the sequences where it is not given. resume: a JSON file of scored genomes, written
    after each; a call that finds it scores none of them again. Raises UsageError, FormatError for a resume file of
    another search or a broken one.
    """
    search = search or SearchConfig()
    search = search if evals is None else dataclasses.replace(search, evals=evals)
    check_text([sequences])
    stats, factors = stats or calibrate(model, sequences.split(4), config), factors or Factors()
    layers = target_layers(model, config)
    identity = {
        "model": factors.fingerprint(layers.values()),
        "text": text_hash([sequences]),
        "calibration": stats.text,
        "configuration": repr((config, search)),
    }
    scores = _stored(resume, identity)
    genomes = Genomes(list(layers), layer_sizes(layers), config, search)
    # rho = 0 at the lowest sparsity: factors of the highest rank that a genome can ask for
    widest = LayerPlan(0.0 if search.sparsities else config.sparsity, 0.0)

    def score(genome: Tensor, count: int) -> float:
        key = f"{_key(genome)}/{min(count, len(sequences))}"
        if key not in scores:
            apply_plan(model, stats, genomes.plan(genome), factors)
            scores[key] = mean_loss(model, sequences[:count])
            if resume is not None:
                write_text(resume, json.dumps({**identity, "scores": scores}) + "\n")
        return scores[key]

    with restored(model):
        apply_rsparse(model, config, stats, dict.fromkeys(layers, widest), factors=factors, progress=progress)
        with setting(model, dense_tokens=1, path="reference"):
            return _evolve(genomes, score, len(sequences), progress)


def mean_loss(model: Any, sequences: Tensor) -> float:
    """Nats per token of token ids [N, T], one sequence at a time; infinite where it is not a number."""
    total, tokens = 0.0, 0
    for ids in sequences.split(1):
        ids = ids.to(next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
        tokens += ids[:, 1:].numel()
    value = total / tokens
    return value if value == value else float("inf")


def project_mean(values: Tensor, weights: Tensor, mean: float, most: float = MOST) -> Tensor:
    """Values + c, clipped to [0, most], with the c (found by bisection) that gives this weighted mean."""
    low, high = -1.0 - float(values.max()), 1.0 - float(values.min())
    for _ in range(60):
        middle = (low + high) / 2
        if float((values + middle).clamp(0.0, most) @ weights) < mean * float(weights.sum()):
            low = middle
        else:
            high = middle
    return (values + high).clamp(0.0, most)


class Genomes:
    """Genomes, float64 [2, L] (rho, sparsity), rho on a grid of 1/1000, and the plans that they stand for."""

    def __init__(self, names: list[str], sizes: dict[str, int], config: RSparseConfig, search: SearchConfig) -> None:
        self.names, self.config, self.search = names, config, search
        self.weights = torch.tensor([float(sizes[name]) for name in names], dtype=torch.float64)

    def genome(self, rho: Tensor, sparsity: Tensor | None = None) -> Tensor:
        """Clipped, rounded (so that equal plans have equal hashes), with the mean sparsity of the configuration."""
        rho = (rho.clamp(0.0, 1.0) * 1000).round() / 1000
        fixed = torch.full_like(rho, self.config.sparsity)
        if sparsity is not None and self.search.sparsities:
            fixed = project_mean(sparsity, self.weights, self.config.sparsity)
        return torch.stack((rho, fixed))

    def plan(self, genome: Tensor) -> dict[str, LayerPlan]:
        rho, sparsity = genome.tolist()
        return {name: LayerPlan(s, r) for name, r, s in zip(self.names, rho, sparsity, strict=True)}

    def starts(self, generator: torch.Generator) -> list[Tensor]:
        """The first population: rho = 1, 0.95, our default, then in turn a mutation of rho = 1 and a random level."""
        ones = torch.ones(len(self.names), dtype=torch.float64)
        default = default_plan(self.names, self.config)
        rhos = [ones, 0.95 * ones, torch.tensor([default[name].rho for name in self.names], dtype=torch.float64)]
        while len(rhos) < self.search.population:
            level = 0.5 + 0.5 * torch.rand(1, generator=generator, dtype=torch.float64)
            spread = torch.rand(len(ones), generator=generator, dtype=torch.float64)
            rare = torch.rand(len(ones), generator=generator) < self.search.mutation
            rhos.append(torch.where(rare, 0.5 + 0.5 * spread, ones) if len(rhos) % 2 else level + 0.2 * (spread - 0.5))
        return [self.genome(rho) for rho in rhos]

    def child(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform crossover, then Gaussian mutation of some genes."""
        take = torch.rand(len(self.names), generator=generator) < 0.5
        rho, sparsity = torch.where(take, first, second)
        noise = self.search.sigma * torch.randn(2, len(self.names), generator=generator, dtype=torch.float64)
        hit = torch.rand(2, len(self.names), generator=generator) < self.search.mutation
        noise = noise * hit
        return self.genome(rho + noise[0], sparsity + noise[1])


def _evolve(genomes: Genomes, score: Callable[[Tensor, int], float], sequences: int, progress: bool) -> SearchResult:
    """score: nats per token of a genome on so many sequences; finalists are scored on all of them."""
    search, generator = genomes.search, torch.Generator().manual_seed(genomes.search.seed)
    population = genomes.starts(generator)[: search.evals]
    seen: dict[str, Tensor] = {}
    quick: dict[str, float] = {}
    history: list[float] = []
    with ProgressBar("searching", search.evals, shown=progress) as bar:
        while True:
            new = {key: genome for genome in population if (key := _key(genome)) not in seen}
            for key, genome in list(new.items())[: search.evals - len(seen)]:
                seen[key], quick[key] = genome, score(genome, search.quick)
                history.append(min([quick[key], *history[-1:]]))
                bar.advance()
            ranked = sorted(seen, key=quick.__getitem__)
            if len(seen) >= search.evals or not new:
                break
            parents = [seen[key] for key in ranked[: search.population]]
            population = parents[: search.elite]
            while len(population) < search.population:
                # the better of a few drawn at random: parents are in the order of their fitness
                draws = [torch.randint(len(parents), (search.tournament,), generator=generator) for _ in range(2)]
                first, second = (parents[int(draw.min())] for draw in draws)
                population.append(genomes.child(first, second, generator))
    start = _key(genomes.genome(torch.ones(len(genomes.names), dtype=torch.float64)))
    final = {key: score(seen[key], sequences) for key in dict.fromkeys([start, *ranked[: search.finalists]])}
    best = min(final, key=final.__getitem__)
    return SearchResult(genomes.plan(seen[best]), final[best], final[start], len(seen), tuple(history))


def _key(genome: Tensor) -> str:
    return sha256((genome * 1e6).round().to(torch.int64))[:24]


def _stored(path: str | Path | None, identity: Mapping[str, str]) -> dict[str, float]:
    """Scores of genomes that an earlier call left in the file, by genome and number of sequences."""
    if path is None or not Path(path).exists():
        return {}
    data = read_json(path, MAX_RESUME_BYTES)
    scores = data.get("scores") if isinstance(data, dict) else None
    if not isinstance(scores, dict) or not all(isinstance(value, float) for value in scores.values()):
        raise FormatError(f"{path} holds no scores of a search; choose another resume file")
    if different := [key for key, value in identity.items() if data.get(key) != value]:
        raise UsageError(f"{path} is of a search with another {different[0]}; choose another resume file")
    return scores
