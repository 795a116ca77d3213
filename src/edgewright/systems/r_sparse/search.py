"""Evolutionary search over rho, the division of every layer's reads between kept channels and the low-rank path.

A genome has one rho for each layer (and, if asked, one sparsity, whose parameter-weighted mean stays fixed); fitness
is the mean negative log-likelihood of calibration text with every token sparse. Mutation, crossover and selection are
our choice: the paper (arXiv 2504.19449) gives fitness and cost only. Every random number comes from one generator and
every fitness is kept under the hash of its genome, so a search that starts again with its file goes the same way.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_json
from edgewright.measure.plot import plot
from edgewright.measure.progress import ProgressBar
from edgewright.systems.r_sparse.calibration import Calibration, calibrate, check_text, text_hash
from edgewright.systems.r_sparse.factors import Factors
from edgewright.systems.r_sparse.layer import budget
from edgewright.systems.r_sparse.model import apply_plan, apply_rsparse, remove_rsparse, setting, sparse_layers
from edgewright.systems.r_sparse.plan import LayerPlan, RSparseConfig, default_plan, layer_sizes, target_layers

MAX_RESUME_BYTES = 64 << 20
MOST = 0.98  # sparsity of one layer in a search over sparsities


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
    workers: int = 1,
    resume: str | Path | None = None,
    progress: bool = False,
) -> SearchResult:
    """Search rho for every layer at the configuration's sparsity on token ids [N, T]; the model is left as it was.

    stats: calibration, measured on the sequences where it is not given. resume: a JSON file of scored genomes, written
    after each; a call that finds it scores none of them again. workers: threads, each with layers of its own on shared
    weights. Raises UsageError, FormatError for a resume file of another search or a broken one.
    """
    search = search or SearchConfig()
    if evals is not None:
        search = SearchConfig(**{**asdict(search), "evals": evals})
    if workers < 1:
        raise UsageError(f"workers={workers}: at least one is needed")
    check_text([sequences])
    stats = stats or calibrate(model, sequences.split(4), config)
    layers = target_layers(model, config)
    factors = factors or Factors()
    with ProgressBar("decomposing", len(layers), shown=progress) as bar:
        for layer in layers.values():
            least = 0.0 if search.sparsities else config.sparsity
            factors.prepare(layer, budget(layer.out_features, layer.in_features, least, 0.0).rank)
            bar.advance()
    coder = _Coder(list(layers), layer_sizes(layers), config, search)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        apply_rsparse(model, config, stats, dict.fromkeys(layers, LayerPlan(0.0)), factors=factors)
        with setting(model, dense_tokens=1, path="reference"):
            judge = _Judge(model, sequences, stats, factors, coder, workers)
            identity = {
                "model": factors.fingerprint(layers.values()),
                "text": text_hash([sequences]),
                "calibration": stats.text,
                "configuration": repr((config, search)),
            }
            scores = _Scores(resume, identity)
            return _evolve(coder, judge, scores, search, progress)
    finally:
        remove_rsparse(model)
        for module in training:
            module.training = True


def project_mean(values: Tensor, weights: Tensor, mean: float, most: float = MOST) -> Tensor:
    """values + c, clipped to [0, most], with the c (found by bisection) that gives this weighted mean."""
    low, high = -1.0 - float(values.max()), 1.0 - float(values.min())
    for _ in range(60):
        middle = (low + high) / 2
        if float((values + middle).clamp(0.0, most) @ weights) < mean * float(weights.sum()):
            low = middle
        else:
            high = middle
    return (values + high).clamp(0.0, most)


class _Coder:
    """Between genomes, float64 [2, L] (rho, sparsity) on a grid of 1/1000, and plans."""

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


def _evolve(coder: _Coder, judge: _Judge, scores: _Scores, search: SearchConfig, progress: bool) -> SearchResult:
    generator = torch.Generator().manual_seed(search.seed)
    population = coder.starts(generator)[: search.evals]
    seen: dict[str, Tensor] = {}
    fitness: dict[str, float] = {}
    history: list[float] = []
    with ProgressBar("searching", search.evals, shown=progress) as bar:
        while True:
            new = {key: g for g in population if (key := _key(g)) not in seen}
            new = dict(list(new.items())[: search.evals - len(seen)])
            for key, value in judge.scores(new, search.quick, scores):
                seen[key], fitness[key] = new[key], value
                history.append(min([value, *history[-1:]]))
                bar.advance()
            ranked = sorted(seen, key=fitness.__getitem__)
            if len(seen) >= search.evals or not new:
                break
            parents = [seen[key] for key in ranked[: search.population]]
            population = parents[: search.elite]
            while len(population) < search.population:
                pair = [_tournament(len(parents), search.tournament, generator) for _ in range(2)]
                population.append(coder.child(parents[pair[0]], parents[pair[1]], generator))
    start = _key(coder.genome(torch.ones(len(coder.names), dtype=torch.float64)))
    finalists = {key: seen[key] for key in dict.fromkeys([start, *ranked[: search.finalists]])}
    final = dict(judge.scores(finalists, judge.count, scores))
    best = min(final, key=final.__getitem__)
    return SearchResult(coder.plan(seen[best]), final[best], final[start], len(seen), tuple(history))


def _tournament(count: int, size: int, generator: torch.Generator) -> int:
    """The best of a few drawn at random; parents are in the order of their fitness."""
    return int(torch.randint(count, (size,), generator=generator).min())


def _key(genome: Tensor) -> str:
    return hashlib.sha256((genome * 1e6).round().to(torch.int64).numpy().tobytes()).hexdigest()[:24]


class _Judge:
    """Scores genomes on text, each worker on a replica of the model that shares its weights."""

    def __init__(
        self,
        model: nn.Module,
        sequences: Tensor,
        stats: Calibration,
        factors: Factors,
        coder: _Coder,
        workers: int,
    ) -> None:
        self.sequences, self.stats, self.factors, self.coder = sequences, stats, factors, coder
        self.count = len(sequences)
        self.workers = workers
        self.models: SimpleQueue[nn.Module] = SimpleQueue()
        self.models.put(model)
        for _ in range(workers - 1):
            shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
            for layer in sparse_layers(model).values():
                shared.pop(id(layer.threshold))  # each replica has its own
            self.models.put(copy.deepcopy(model, shared))

    def scores(self, genomes: dict[str, Tensor], count: int, known: _Scores) -> Iterator[tuple[str, float]]:
        """(key, nats per token) of each genome on the first `count` sequences, in order."""
        table = known.table(min(count, self.count) < self.count)
        missing = [key for key in genomes if key not in table]
        if self.workers == 1:
            for key in genomes:
                if key not in table:
                    known.add(table, key, self._score(genomes[key], count))
                yield key, table[key]
            return
        threads = torch.get_num_threads()
        try:
            limit = max(1, threads // self.workers)
            with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(limit,)) as pool:
                results = pool.map(lambda key: self._score(genomes[key], count), missing)
                for key, value in zip(missing, results, strict=True):
                    known.add(table, key, value)
        finally:
            torch.set_num_threads(threads)
        yield from ((key, table[key]) for key in genomes)

    @torch.no_grad()
    def _score(self, genome: Tensor, count: int) -> float:
        model: Any = self.models.get()
        try:
            apply_plan(model, self.stats, self.coder.plan(genome), self.factors)
            total, tokens = 0.0, 0
            for ids in self.sequences[:count].split(1):
                ids = ids.to(next(model.parameters()).device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                total += float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
                tokens += ids[:, 1:].numel()
            value = total / tokens
            return value if value == value else float("inf")  # NaN is no fitness
        finally:
            self.models.put(model)


class _Scores:
    """Fitness by genome, quick and full, in a file if there is one."""

    def __init__(self, path: str | Path | None, identity: dict[str, str]) -> None:
        self.path = None if path is None else Path(path)
        self.identity = identity
        self.quick: dict[str, float] = {}
        self.full: dict[str, float] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def table(self, quick: bool) -> dict[str, float]:
        return self.quick if quick else self.full

    def add(self, table: dict[str, float], key: str, value: float) -> None:
        table[key] = value
        if self.path is not None:
            write_text(self.path, json.dumps({**self.identity, "quick": self.quick, "full": self.full}) + "\n")

    def _read(self, path: Path) -> None:
        data = read_json(path, MAX_RESUME_BYTES)
        tables = [data.get("quick"), data.get("full")] if isinstance(data, dict) else []
        for table in tables or [None]:
            if not isinstance(table, dict) or not all(isinstance(v, float) and len(k) == 24 for k, v in table.items()):
                raise FormatError(f"{path} holds no scores of a search; choose another resume file")
        if different := [key for key, value in self.identity.items() if data.get(key) != value]:
            raise UsageError(f"{path} is of a search with another {different[0]}; choose another resume file")
        self.quick, self.full = data["quick"], data["full"]
