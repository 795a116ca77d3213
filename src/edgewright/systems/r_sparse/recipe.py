"""R-Sparse (arXiv 2504.19449): SmolLM2-135M reads half of its weights, chosen by the size of each input.

Perplexity and distance to the dense model over sparsity, every token sparse: plain magnitude, weighted by column norms,
TEAL's greedy allocation, low rank alone, our default and the searched division of R-Sparse; and all on 4-bit weights.

deviation: the paper's models have 7 and 8 billion weights; one of 135 million has fewer inputs to spare.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgewright
from edgewright.evaluation.language import model_logits
from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.report import Report
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.quantization.grids import grid_for_bits
from edgewright.systems.r_sparse import RSparseConfig, apply_rsparse, calibrate, remove_rsparse
from edgewright.systems.r_sparse.allocation import SearchConfig, search_rho, teal_path
from edgewright.systems.r_sparse.layer import Factors, budget
from edgewright.systems.r_sparse.model import model_traffic, setting, sparse_layers, sparse_logits
from edgewright.systems.r_sparse.plan import LayerPlan, default_plan, target_layers
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, language_rows

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("magnitude", "weighted", "TEAL greedy", "low rank", "R-Sparse default", "R-Sparse searched")
SEARCHED = 0.5  # where rho is searched; other sparsities take the same rho


@dataclass(frozen=True)
class RSparse:
    """tokens: length of calibration and held-out blocks; layers 0 keeps the whole model; search_tokens: length of the
    sequences that plans are scored on, teal_tokens: of the one that TEAL measures blocks on.
    """

    seed: int = 0
    sparsities: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    tokens: int = 256
    calibration_blocks: int = 16
    held_out_blocks: int = 8
    teal_tokens: int = 256
    teal_step: float = 0.05
    evals: int = 120
    search_tokens: int = 128
    search_blocks: int = 16
    quantized_bits: int = 4
    layers: int = 0


def tiny() -> RSparse:
    return RSparse(
        sparsities=(0.5,),
        tokens=32,
        calibration_blocks=8,
        held_out_blocks=2,
        teal_tokens=32,
        teal_step=0.25,
        evals=4,
        search_tokens=32,
        search_blocks=6,
        layers=1,
    )


def small() -> RSparse:
    return RSparse()


def paper() -> RSparse:
    """A search of an hour on a large GPU on 16 sequences, calibration on 512 tokens a sequence."""
    return RSparse(tokens=512, held_out_blocks=64, teal_tokens=512, evals=2000, search_tokens=512)


def at(method: str, sparsity: float) -> str:
    """The subject of a row."""
    return f"{method}, {sparsity:.0%}"


LARGE = ("small", "paper")
CLAIMS = (
    Claim("perplexity", at("low rank", 0.5), ">", against=at("weighted", 0.5), factor=2.0, sizes=LARGE),
    Claim("perplexity", at("weighted", 0.5), "<", against=at("magnitude", 0.5), sizes=LARGE),
    Claim("kl", at("weighted", 0.5), "<", against=at("magnitude", 0.5), sizes=LARGE),
    Claim("kl", at("weighted", 0.5), "<", against=at("low rank", 0.5), factor=0.5),
    Claim("kl", at("weighted", 0.3), "<", against=at("weighted", 0.5), sizes=LARGE),
    Claim("kl", at("weighted", 0.5), "<", against=at("weighted", 0.7), sizes=LARGE),
    Claim("perplexity", at("TEAL greedy", 0.5), "<", against=at("magnitude", 0.5), sizes=LARGE),
    # better than its own start on calibration text, and no worse than within noise on held-out text
    Claim("calibration_nll", "R-Sparse searched", "<", against="R-Sparse start", sizes=LARGE),
    Claim("kl", at("R-Sparse searched", 0.5), "<", against=at("weighted", 0.5), factor=1.02, sizes=LARGE),
    Claim("layer_reads", at("weighted", 0.5), "<", threshold=0.55, sizes=LARGE),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "SmolLM2 reading half of its weights: perplexity {ours:.1f}, {teal:.1f} with TEAL's allocation, {dense:.1f} with "
    "all; weighted scores do not beat plain magnitude",
    {
        name: Cell("r-sparse.csv", {"metric": "perplexity", "subject": subject})
        for name, subject in (("ours", "R-Sparse searched, 50%"), ("teal", "TEAL greedy, 50%"), ("dense", "dense"))
    },
)


def plan(settings: RSparse) -> Plan:
    share = (settings.layers or 30) / 30
    points = len(METHODS) * len(settings.sparsities) + 2
    tokens = settings.held_out_blocks * settings.tokens * (points + 2)
    tokens += 2 * settings.calibration_blocks * settings.tokens
    tokens += settings.evals * 4 * settings.search_tokens + 9 * settings.search_blocks * settings.search_tokens
    greedy = settings.teal_tokens * 2.5 * 7 * max(settings.sparsities) / settings.teal_step
    return Plan(
        steps=(
            f"calibrate on {settings.calibration_blocks} blocks of {settings.tokens} tokens, by both scores",
            f"TEAL's greedy allocation in steps of {settings.teal_step:g}",
            f"decompose the weights and search rho with {settings.evals} plans at {SEARCHED:.0%}",
            f"KL and perplexity of {points} models on {settings.held_out_blocks} held-out blocks",
            f"the same at {SEARCHED:.0%} on {settings.quantized_bits}-bit weights",
        ),
        # an estimate for two idle cores: 4 ms a token through 30 layers, 1 ms through the head
        seconds=8 + tokens * (0.001 + 0.004 * share) + (greedy * 0.004 + 30) * share,
        memory_bytes=int(1.5e9 + 2e9 * share + 2e5 * settings.held_out_blocks * settings.tokens),
        disk_bytes=int(1e7 + 4e8 * share),
        outputs=("kl.png", "points.json"),
    )


def run(settings: RSparse, output: Path) -> Report:
    run = Run(output, "R-Sparse: SmolLM2-135M with a part of its weights unread")
    bench = cache(lambda: _Bench(settings, output))
    run.add_rows(run.memo("dense", lambda: bench().rows(bench().reference, "dense")))
    greedy = run.memo("TEAL plans", lambda: bench().greedy())
    search = run.memo("search", lambda: bench().search())
    run.add("calibration_nll", search["start"], "R-Sparse start", "nats/token")
    run.add("calibration_nll", search["fitness"], "R-Sparse searched", "nats/token")
    for sparsity in settings.sparsities:
        for method in METHODS:
            subject = at(method, sparsity)
            plan = _plan(method, sparsity, greedy[str(sparsity)], search["rho"])
            score = "magnitude" if method in ("magnitude", "TEAL greedy") else "weighted"
            run.add_rows(run.memo(subject, lambda: bench().sparse(subject, score, plan)))  # noqa: B023
    run.add_rows(run.memo("quantized", lambda: bench().quantized()))
    run.note("KL in nats per token to the dense model; every token but the first of a block is sparse")
    run.note("layer_reads: bytes read of the sparsified layers, factors included, over their dense bytes")
    curves = {m: run.curve("kl", [at(m, s) for s in settings.sparsities], settings.sparsities) for m in METHODS}
    axes = ("share of weight reads left out", "KL to the dense model, held out (nats per token)")
    run.lines("kl.png", curves, *axes, style="o-", yscale="log")
    shutil.rmtree(output / "factors", ignore_errors=True)  # everything is measured: the decompositions can go
    return run.report


def _plan(method: str, sparsity: float, greedy: dict[str, float], rho: dict[str, float]) -> dict[str, LayerPlan]:
    """Sparsity and rho of every layer. greedy: their sparsities by TEAL; rho: as searched."""
    if method == "TEAL greedy":
        return {name: LayerPlan(value) for name, value in greedy.items()}
    if method == "R-Sparse default":
        rho = {name: layer.rho for name, layer in default_plan(rho, RSparseConfig(sparsity)).items()}
    elif method != "R-Sparse searched":
        rho = dict.fromkeys(rho, 0.0 if method == "low rank" else 1.0)
    return {name: LayerPlan(sparsity, value) for name, value in rho.items()}


class _Bench:
    """The model, its text, the thresholds of both scores and the dense model's logits."""

    def __init__(self, settings: RSparse, output: Path) -> None:
        self.settings, self.output = settings, output
        self.model, tokenizer = edgewright.load("smollm2-135m")
        if settings.layers:
            self.model.model.layers = self.model.model.layers[: settings.layers]
            self.model.config.num_hidden_layers = settings.layers
        texts, seed = load_texts(None, "calibration"), settings.seed
        self.calibration = token_blocks(texts, tokenizer, settings.tokens, settings.calibration_blocks, seed)
        self.teal_text = token_blocks(texts, tokenizer, settings.teal_tokens, 1, seed)
        self.search_text = token_blocks(texts, tokenizer, settings.search_tokens, settings.search_blocks, seed)
        held_out = load_texts(None, "evaluation")
        self.held_out = token_blocks(held_out, tokenizer, settings.tokens, settings.held_out_blocks, seed)
        # Kept: the layout of the weights, and with it the last bits, must not depend on what was measured before.
        function = model_logits(self.model)
        self.logits = {ids.numpy().tobytes(): function(ids) for ids in self.held_out.split(1)}
        self.factors = Factors(output / "factors")
        self.configs = {score: RSparseConfig(SEARCHED, score=score) for score in ("magnitude", "weighted")}
        parts = self.calibration.split(4)
        self.stats = {score: calibrate(self.model, parts, config) for score, config in self.configs.items()}
        self.names = list(target_layers(self.model, self.configs["weighted"]))

    def reference(self, ids: Tensor) -> Tensor:
        return self.logits[ids.numpy().tobytes()]

    def rows(self, function: Any, subject: str) -> list[dict[str, Any]]:
        return language_rows(function, self.held_out, self.reference, subject)

    def greedy(self) -> dict[str, dict[str, float]]:
        """TEAL's plans: sparsity (as text) -> layer -> sparsity of the layer. By magnitude, as TEAL is."""
        settings, config = self.settings, self.configs["magnitude"]
        batches, stats = self.teal_text.split(1), self.stats["magnitude"]
        path = teal_path(self.model, batches, config, stats, settings.sparsities, step=settings.teal_step)
        return {str(s): {name: layer.sparsity for name, layer in plan.items()} for s, plan in path.items()}

    def search(self) -> dict[str, Any]:
        """The searched rho of every layer, and the fitness on calibration text before and after."""
        for name in self.names:  # once, at the highest rank that any point needs
            layer: Any = self.model.get_submodule(name)
            low = min(*self.settings.sparsities, SEARCHED)
            self.factors.get(layer, budget(layer.out_features, layer.in_features, low, 0.0).rank)
        best = search_rho(
            self.model,
            self.search_text,
            self.configs["weighted"],
            search=SearchConfig(evals=self.settings.evals, seed=self.settings.seed),
            stats=self.stats["weighted"],
            factors=self.factors,
            resume=self.output / "search.json",
            progress=True,
        )
        best.plot(self.output / "search.png")
        rho = {name: layer.rho for name, layer in best.plan.items()}
        return {"rho": rho, "fitness": best.fitness, "start": best.start}

    def sparse(self, subject: str, score: str, plan: Any, packed: Any = None) -> list[dict[str, Any]]:
        """Rows of the model while it is sparse. packed: (another model, its calibration)."""
        model, stats = packed or (self.model, self.stats[score])
        apply_rsparse(model, self.configs[score], stats, plan, factors=self.factors)
        try:
            with setting(model, counting=True):
                rows = self.rows(sparse_logits(model), subject)
            kept = sum(layer.kept / layer.offered for layer in sparse_layers(model).values())
            figures = {"layer_reads": model_traffic(model).ratio, "channels_left_out": 1 - kept / len(self.names)}
        finally:
            remove_rsparse(model)
        return rows + [{"metric": metric, "value": value, "subject": subject} for metric, value in figures.items()]

    def quantized(self) -> list[dict[str, Any]]:
        """4-bit weights in groups of 32, dense and with half of the channels left out."""
        grid = grid_for_bits(self.settings.quantized_bits).name
        rule = Rule("*_proj", WeightConfig(grid, granularity=32, scale="mse"))
        packed = convert_(quantize_(copy.deepcopy(self.model), QuantConfig(rules=(rule,)))).eval()
        dense = self.rows(model_logits(packed), grid)
        stats = calibrate(packed, self.calibration.split(4), self.configs["weighted"])
        plan = {name: LayerPlan(SEARCHED) for name in self.names}
        return dense + self.sparse(at(f"{grid}, weighted", SEARCHED), "weighted", plan, (packed, stats))
