"""MobileMoE (arXiv 2605.27358): a mixture of experts against dense models of its time and of its memory.

Small decoders read the bytes of documentation and of Python's own sources: with experts, with as much work a token,
with as many weights. The balancer is switched off once; the experts' use is counted by domain; and a dense model is
sliced into experts.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import edgewright
from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.report import Report
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.systems.mobilemoe import tasks
from edgewright.systems.mobilemoe.design import ScalingLaw, moe_parameters
from edgewright.systems.mobilemoe.layer import MoEConfig, moe_layers
from edgewright.systems.mobilemoe.training import expert_usage
from edgewright.systems.mobilemoe.upcycle import moe_from_dense
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, row_over_seeds

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class MobileMoE:
    """experts, granularity: the paper's E and g, with a shared expert. tokens: bytes of a block.

    upcycle: the dense model that is sliced, "own" is the trained one of equal active size; upcycle_layers: how many of
    its last blocks are, 0: all; upcycle_top_k: routed pieces in use, of experts * granularity - granularity // 2. Only
    what was sliced is trained.

    deviation: balance_rate is ten times the published 1e-3, for hundreds of steps instead of a million: a bias that
    may move by a quarter in all cannot catch up with routers that specialise in their first fifty steps.
    """

    seed: int = 0
    seeds: int = 2
    experts: int = 8
    granularity: int = 4
    hidden: int = 96
    layers: int = 4
    tokens: int = 128
    batch: int = 16
    steps: int = 250
    learning_rate: float = 2e-3
    balance_rate: float = 1e-2
    held_out_blocks: int = 96
    upcycle: Literal["own", "smollm2-135m"] = "smollm2-135m"
    upcycle_layers: int = 4
    upcycle_top_k: int = 14
    upcycle_steps: int = 40
    upcycle_batch: int = 4
    upcycle_learning_rate: float = 5e-4


def tiny() -> MobileMoE:
    return MobileMoE(
        seeds=1, hidden=64, layers=1, tokens=64, batch=4, steps=5, held_out_blocks=32, upcycle="own", upcycle_layers=0,
        upcycle_steps=2,
    )  # fmt: skip


def small() -> MobileMoE:
    return MobileMoE()


def paper() -> MobileMoE:
    """The shape of the published S model at its granularity; the published 6.5 trillion tokens need their own data."""
    return MobileMoE(
        seeds=1, granularity=8, hidden=768, layers=20, tokens=2048, batch=512, steps=100_000, learning_rate=1e-3,
        balance_rate=1e-3, held_out_blocks=512, upcycle_layers=0, upcycle_steps=2000, upcycle_batch=16,
    )  # fmt: skip


MOE, UNBALANCED, ACTIVE, TOTAL = "MoE", "MoE, no balancing", "dense, equal active", "dense, equal total"
ALL_ON, DENSE = "upcycled, all pieces on", "dense, sliced"
UPCYCLED, RANDOM = "upcycled, trained", "random experts, trained"
LARGE = ("small", "paper")
CLAIMS = (
    Claim("loss", MOE, "<", against=ACTIVE, factor=0.98, sizes=LARGE),
    Claim("loss", MOE, ">", against=TOTAL, factor=0.98, sizes=LARGE),
    Claim("max_load", MOE, "<", threshold=2.0, sizes=LARGE),
    Claim("max_load", UNBALANCED, ">", against=MOE, factor=1.2, sizes=LARGE),
    Claim("divergence", MOE, ">", against="MoE, shuffled domains", sizes=LARGE),
    Claim("perplexity", ALL_ON, "<", against=DENSE, factor=1.01, sizes=LARGE),
    Claim("perplexity", ALL_ON, ">", against=DENSE, factor=0.99, sizes=LARGE),
    Claim("perplexity", UPCYCLED, "<", against=RANDOM, sizes=LARGE),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "loss {ours:.3f} nats/byte against {dense:.3f} of a dense model of equal work; decodes {native:.1f}x ({cpp:.1f}x "
    "in llama.cpp) as fast as a dense one of equal memory",
    {
        "ours": Cell("mobilemoe.csv", {"metric": "loss", "subject": "MoE"}),
        "dense": Cell("mobilemoe.csv", {"metric": "loss", "subject": "dense, equal active"}),
        "native": Cell("mobilemoe-inference.csv", {"metric": "decode_speedup", "subject": "mixture"}),
        "cpp": Cell("mobilemoe-inference.csv", {"metric": "decode_speedup", "subject": "mixture, 4 bits in llama.cpp"}),
    },
)


def plan(settings: MobileMoE) -> Plan:
    tokens = settings.steps * settings.batch * settings.tokens
    block = settings.layers * settings.hidden**2
    work = block * (2 * 15 + 2 * 16.5 + 3 + 12 * settings.experts)  # parameters of the four models, per token
    sliced = 5e7 if settings.upcycle != "own" else block * 15
    slices = settings.upcycle_steps * settings.upcycle_batch * settings.tokens * sliced
    flops = 6 * (settings.seeds * tokens * work + 2 * slices)
    return Plan(
        steps=(
            f"train four models of {settings.layers} layers on {tokens / 1e6:.3g} MB of text, {settings.seeds} seed(s)",
            "held-out loss, loads and usage by domain",
            f"slice {settings.upcycle_layers or 'all'} blocks of {settings.upcycle} into experts, "
            f"{settings.upcycle_steps} steps beside random experts",
        ),
        seconds=10 + flops / 2.5e10,
        memory_bytes=int(1e9 + 40 * block * 12 * settings.experts),
        disk_bytes=int(1e8 + 50 * block * 12 * settings.experts + (1.5e9 if settings.upcycle != "own" else 0)),
        outputs=("loss.png", "usage.png", "scaling_law.png", "points.json"),
    )


def run(settings: MobileMoE, output: Path) -> Report:
    run = Run(output, f"MobileMoE: {settings.experts} experts cut in {settings.granularity}, on bytes")
    bench = cache(lambda: _Bench(settings, output))
    for name in (MOE, UNBALANCED, ACTIVE, TOTAL):
        seeds = run.over_seeds(name, settings.seeds, lambda seed: bench().model_rows(name, seed))  # noqa: B023
        run.add_rows(map(row_over_seeds, zip(*seeds, strict=True)))
    run.add_rows(run.memo("upcycling", lambda: bench().upcycling_rows()))
    run.note(
        "loss in nats per byte on held-out documentation and sources; active parameters count all that a token "
        "touches, router and tied table included"
    )
    shutil.rmtree(output / "training", ignore_errors=True)  # everything is measured
    ScalingLaw.published().plot(output / "scaling_law.png")
    curves = {}
    for row in (row for row in run.report.rows if row.metric == "loss"):
        sizes = [run.report.value(metric, row.subject) for metric in ("active_parameters", "parameters")]
        curves[row.subject] = (sizes, [row.value] * 2, [row.se or 0.0] * 2)
    axes = ("parameters: active to total", "held-out loss (nats per byte)")
    run.lines("loss.png", curves, *axes, style="o-", xscale="log")
    return run.report


class _Bench:
    """The texts as blocks of bytes, and the models by name."""

    def __init__(self, settings: MobileMoE, output: Path) -> None:
        self.settings, self.output, self.folder = settings, output, output / "training"
        prose, other = load_texts(None, "calibration"), load_texts(None, "evaluation")
        length, seed, half = settings.tokens, settings.seed, settings.held_out_blocks // 2
        self.training = tasks.byte_blocks([*prose, *tasks.sources(tasks.MODULES)], length, seed)
        self.domains = {
            "prose": tasks.byte_blocks(other, length, seed, half),
            "code": tasks.byte_blocks(tasks.sources(tasks.HELD_OUT), length, seed, half),
        }

    def trained(self, name: str, seed: int) -> nn.Module:
        """The model after training; a finished run gives its weights at once."""
        s = self.settings
        sparse = name in (MOE, UNBALANCED)
        config = EdgeDecoderConfig(
            vocab_size=256,
            hidden_size=s.hidden,
            intermediate_size=4 * s.hidden * (s.experts if name == TOTAL else 1),
            num_hidden_layers=s.layers,
            num_attention_heads=s.hidden // 32,
            num_key_value_heads=1,
            ffn_types="moe" if sparse else "mlp",
            moe=asdict(MoEConfig.split(4 * s.hidden, s.experts, s.granularity)) if sparse else None,
            qk_norm="l2",
            max_position_embeddings=s.tokens,
        )
        model = new_decoder(config, s.seed + seed)
        rate = s.balance_rate if name == MOE else 0.0
        budget: Any = {"steps": s.steps, "batch": s.batch, "learning_rate": s.learning_rate, "balance_rate": rate}
        tasks.train(model, self.training, **budget, seed=s.seed, output=self.folder / f"{name}, seed {seed}")
        return model

    def model_rows(self, name: str, seed: int) -> list[dict[str, Any]]:
        """Held-out loss and parameters; for sparse models also their loads and, for the balanced one, its usage."""
        model: Any = self.trained(name, seed).eval()
        total, active = moe_parameters(model.config)
        rows: list[dict[str, Any]] = [
            {"metric": "loss", "subject": name, "unit": "nats/byte", **tasks.held_out_loss(model, self.domains)},
            {"metric": "parameters", "value": total, "subject": name},
            {"metric": "active_parameters", "value": active, "subject": name},
        ]
        if name not in (MOE, UNBALANCED):
            return rows
        usage = expert_usage(model, {domain: blocks.split(16) for domain, blocks in self.domains.items()})
        load = float(usage.max_load.max())
        rows += [
            {"metric": "max_load", "value": load, "subject": name, "unit": "of the mean"},
            {"metric": "dead_experts", "value": len(usage.dead), "subject": name},
        ]
        if name == MOE:
            if seed == 0:
                usage.plot(self.output / "usage.png")
            chance = float(usage.shuffled_divergence(200).quantile(0.95))
            rows += [
                {"metric": "divergence", "value": usage.divergence(), "subject": name, "unit": "bits"},
                {"metric": "divergence", "value": chance, "subject": "MoE, shuffled domains", "unit": "bits"},
            ]
        return rows

    def upcycling_rows(self) -> list[dict[str, Any]]:
        """Perplexity of a dense model, of its slices all in use, and after training with some of them in use."""
        s = self.settings
        dense, training, held_out = self._upcycled_model()
        count = dense.config.num_hidden_layers
        cut: Any = {"layers": range(count - (s.upcycle_layers or count), count), "batches": [training[:8]]}
        pieces = s.experts * s.granularity - s.granularity // 2
        everything = moe_from_dense(dense, s.experts, s.granularity, top_k=pieces, **cut)
        rows = [tasks.perplexity_row(dense, DENSE, held_out), tasks.perplexity_row(everything, ALL_ON, held_out)]
        del everything
        budget: dict[str, Any] = {"steps": s.upcycle_steps, "batch": s.upcycle_batch, "balance_rate": s.balance_rate}
        budget["learning_rate"] = s.upcycle_learning_rate
        for name in (UPCYCLED, RANDOM):
            sparse = moe_from_dense(dense, s.experts, s.granularity, top_k=s.upcycle_top_k, **cut)
            if name == RANDOM:
                tasks.draw_experts(sparse, s.seed)
            else:
                rows.append(tasks.perplexity_row(sparse, "upcycled, untrained", held_out))
            sparse.requires_grad_(False)
            for layer in moe_layers(sparse).values():
                layer.requires_grad_(True)
            tasks.train(sparse, training, **budget, seed=s.seed, output=self.folder / name)
            rows.append(tasks.perplexity_row(sparse, name, held_out))
        return rows

    def _upcycled_model(self) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """(dense model, training blocks, held-out blocks by domain)."""
        s = self.settings
        if s.upcycle == "own":
            return self.trained(ACTIVE, 0), self.training, self.domains
        model, tokenizer = edgewright.load(s.upcycle)
        training = token_blocks(load_texts(None, "calibration"), tokenizer, s.tokens, seed=s.seed)
        held_out = token_blocks(load_texts(None, "evaluation"), tokenizer, s.tokens, s.held_out_blocks // 4, s.seed)
        return model, training, {"prose": held_out}
