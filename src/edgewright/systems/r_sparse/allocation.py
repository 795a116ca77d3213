"""Allocation of what is left out: sparsity inside each block, and rho over all layers.

Blocks of a decoder are run one at a time, for thresholds from the sparsified prefix and for TEAL's greedy allocation
(arXiv 2408.14690): inside a block all layers start dense; the layer whose next step of sparsity moves the block's
output least takes it, until the parameter-weighted sparsity of the block is reached. Steps are inverse to the layers'
sizes, so that every step leaves out the same number of weights.

The search evolves rho, the division of every layer's reads between kept channels and the low-rank path: one rho for
each layer; fitness is the mean negative log-likelihood of calibration text with every token sparse. Mutation, crossover
and selection are our choice: the paper (arXiv 2504.19449) gives fitness and cost only. Every random number comes from
one generator and every fitness is kept under the hash of its plan, so a search that starts again with its file goes the
same way.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, check_fields, number, whole
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
    flows: list[Stream] = []

    def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        if not flows[-1].arguments:
            flows[-1].hidden = hidden
        flows[-1].arguments.append(rest)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(entering, with_kwargs=True).remove)
        for batch in batches:
            flows.append(Stream(torch.empty(0), []))
            base: Any = model.model
            base(input_ids=batch.to(device), use_cache=False)
    return flows


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
    levels = sorted(set(sparsities))
    for level in levels:
        check("sparsity", level, number(0, below=1))
    check("step", step, number(above=0, below=1))
    layers = target_layers(model, config)
    sizes = layer_sizes(layers)
    free = dict.fromkeys(layers, LayerPlan(0.0))
    plans: dict[float, dict[str, LayerPlan]] = {s: {} for s in levels}
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
                    for s in levels:
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
    """Settings of `search_rho`; all but the number of sequences are our choice.

    Args:
        evals: plans scored on the first `quick` sequences.
        population: plans that have children.
        elite: best of them that stay.
        tournament: drawn at random for each parent, of which the best is taken.
        mutation: share of the values that change in a child.
        sigma: standard deviation of that change.
        quick: sequences of a quick score.
        finalists: best plans by the quick score, which are scored on all sequences.
        seed: of the one generator that every random number comes from.

    Raises:
        UsageError: a value outside its range.
    """

    evals: int = 400
    population: int = 32
    elite: int = 4
    tournament: int = 3
    mutation: float = 0.1
    sigma: float = 0.1
    quick: int = 4
    finalists: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("tournament", "quick", "finalists"), whole(1))
        check_fields(self, {"evals": whole(3), "population": whole(2), **counts})
        check_fields(self, {"elite": whole(1, self.population - 1), "mutation": number(0, 1), "sigma": number(above=0)})


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
        """The best fitness over evaluations, as a PNG at `path`."""
        with plot(path, (6.0, 3.5)) as axes:
            axes.plot(range(1, len(self.history) + 1), self.history)
            axes.set_xlabel("plans scored")
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
    """Search rho for every layer at the configuration's sparsity (arXiv 2504.19449); the model is left as it was.

    Args:
        model: dense.
        sequences: calibration tokens, int64 [N, T].
        config: sparsity, score and layers.
        search: its settings.
        evals: in place of the settings' own.
        stats: calibration, measured on the sequences where it is not given.
        factors: decompositions that are known already.
        resume: a JSON file of scores, written after each; a call that finds it computes none of them again.
        progress: show a bar.

    Returns:
        The best plan, for `apply_rsparse`, with its fitness.

    Raises:
        UsageError: no calibration text, or a resume file of another search.
        FormatError: a broken resume file.
    """
    search = search or SearchConfig()
    search = search if evals is None else dataclasses.replace(search, evals=evals)
    check_text([sequences])
    stats, factors = stats or calibrate(model, sequences.split(4), config), factors or Factors()
    layers = target_layers(model, config)
    parts = (factors.fingerprint(layers.values()), text_hash([sequences]), stats.text, repr((config, search)))
    identity = sha256(*parts)
    scores = _stored(resume, identity)

    def plan(rho: Tensor) -> dict[str, LayerPlan]:
        return {name: LayerPlan(config.sparsity, value) for name, value in zip(layers, rho.tolist(), strict=True)}

    def score(rho: Tensor, count: int) -> float:
        key = f"{_key(rho)}/{min(count, len(sequences))}"
        if key not in scores:
            apply_plan(model, stats, plan(rho), factors)
            scores[key] = mean_loss(model, sequences[:count])
            if resume is not None:
                write_text(resume, json.dumps({"search": identity, "scores": scores}) + "\n")
        return scores[key]

    generator, seen, history = torch.Generator().manual_seed(search.seed), dict[str, Tensor](), list[float]()
    ones = torch.ones(len(layers), dtype=torch.float64)
    default = torch.tensor([layer.rho for layer in default_plan(layers, config).values()], dtype=torch.float64)
    population = _first(default, search, generator)[: search.evals]
    with restored(model):
        # rho = 0: factors of the highest rank that a plan can ask for
        apply_rsparse(model, config, stats, plan(0 * ones), factors=factors, progress=progress)
        bar = ProgressBar("searching", search.evals, shown=progress)
        with setting(model, dense_tokens=1, path="reference"), bar:
            while True:
                new = {key: rho for rho in population if (key := _key(rho)) not in seen}
                for key, rho in list(new.items())[: search.evals - len(seen)]:
                    seen[key] = rho
                    history.append(min([score(rho, search.quick), *history[-1:]]))
                    bar.advance()
                ranked = sorted(seen.values(), key=lambda rho: score(rho, search.quick))
                if len(seen) >= search.evals or not new:
                    break
                parents = ranked[: search.population]
                population = parents[: search.elite]
                while len(population) < search.population:
                    # the better of a few drawn at random: parents are in the order of their fitness
                    draws = [torch.randint(len(parents), (search.tournament,), generator=generator) for _ in range(2)]
                    first, second = (parents[int(draw.min())] for draw in draws)
                    population.append(_child(first, second, search, generator))
            finalists = [ones, *ranked[: search.finalists]]
            best = min(finalists, key=lambda rho: score(rho, len(sequences)))
            fitness, start = (score(rho, len(sequences)) for rho in (best, ones))
    return SearchResult(plan(best), fitness, start, len(seen), tuple(history))


def mean_loss(model: Any, sequences: Tensor) -> float:
    """Nats per token of token ids [N, T], one sequence at a time; infinite where it is not a number."""
    total, tokens = 0.0, 0
    for ids in sequences.split(1):
        ids = ids.to(next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
        tokens += ids[:, 1:].numel()
    return math.inf if math.isnan(total) else total / tokens


def _rounded(rho: Tensor) -> Tensor:
    """On a grid of 1/1000, so that equal plans have equal keys."""
    return (rho.clamp(0.0, 1.0) * 1000).round() / 1000


def _first(default: Tensor, search: SearchConfig, generator: torch.Generator) -> list[Tensor]:
    """Rho = 1, 0.95, our default, then in turn a mutation of rho = 1 and a random level; float64 [layers] each."""
    ones = torch.ones_like(default)
    rhos = [ones, 0.95 * ones, default]
    while len(rhos) < search.population:
        level = 0.5 + 0.5 * torch.rand(1, generator=generator, dtype=torch.float64)
        spread = torch.rand(len(ones), generator=generator, dtype=torch.float64)
        rare = torch.rand(len(ones), generator=generator) < search.mutation
        rhos.append(torch.where(rare, 0.5 + 0.5 * spread, ones) if len(rhos) % 2 else level + 0.2 * (spread - 0.5))
    return [_rounded(rho) for rho in rhos]


def _child(first: Tensor, second: Tensor, search: SearchConfig, generator: torch.Generator) -> Tensor:
    """Uniform crossover, then Gaussian mutation of some values."""
    rho = torch.where(torch.rand(len(first), generator=generator) < 0.5, first, second)
    # two rows are drawn and one is used, so that a seed gives the plans of results/r-sparse.csv
    noise = search.sigma * torch.randn(2, len(rho), generator=generator, dtype=torch.float64)
    return _rounded(rho + (noise * (torch.rand(2, len(rho), generator=generator) < search.mutation))[0])


def _key(rho: Tensor) -> str:
    return sha256((rho * 1000).round().to(torch.int64))[:24]


def _stored(path: str | Path | None, identity: str) -> dict[str, float]:
    """Scores that an earlier call left in the file, by plan and number of sequences."""
    if path is None or not Path(path).exists():
        return {}
    data = read_json(path, MAX_RESUME_BYTES)
    scores = data.get("scores") if isinstance(data, dict) else None
    if not isinstance(scores, dict) or not all(isinstance(value, float) for value in scores.values()):
        raise FormatError(f"{path} holds no scores of a search; choose another resume file")
    if data.get("search") != identity:
        raise UsageError(f"{path} is of another search, model or text; choose another resume file")
    return scores
