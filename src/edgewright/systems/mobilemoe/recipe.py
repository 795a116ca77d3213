"""MobileMoE (arXiv 2605.27358): a mixture of experts against dense models of its time and of its memory.

Small decoders read the bytes of documentation and of Python's own sources: with experts, with as much work a token,
with as many weights. The balancer is switched off once; the experts' use is counted by domain; and a dense model is
sliced into experts.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

import edgewright
from edgewright.evaluation.statistics import ratio_of_sums
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.systems.mobilemoe.design import moe_parameters
from edgewright.systems.mobilemoe.layer import MoEConfig, SparseMoE, moe_layers
from edgewright.systems.mobilemoe.scaling_law import ScalingLaw
from edgewright.systems.mobilemoe.training import LoadBalancer, MoELoss
from edgewright.systems.mobilemoe.upcycle import moe_from_dense
from edgewright.systems.mobilemoe.usage import expert_usage
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import row_over_seeds
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit
from edgewright.training.optimizer import default_optimizer

if TYPE_CHECKING:
    from torch import Tensor, nn

MODULES = (
    "argparse", "ast", "bdb", "calendar", "cgitb", "codecs", "configparser", "csv", "dataclasses", "datetime",
    "decimal", "difflib", "dis", "doctest", "enum", "fractions", "ftplib", "functools", "gettext", "inspect",
    "ipaddress", "locale", "mailbox", "optparse", "pdb", "pickle", "pickletools", "platform", "plistlib", "pstats",
    "pydoc", "random", "shutil", "smtplib", "socket", "sre_parse", "ssl", "statistics", "subprocess", "tarfile",
    "threading", "tokenize", "turtle", "typing", "uuid", "zipfile",
)  # fmt: skip
HELD_OUT = ("heapq", "imaplib", "logging/__init__", "selectors", "shlex", "string", "textwrap", "traceback", "weakref")


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
ALL_ON, DENSE, UPCYCLED, RANDOM = (
    "upcycled, all pieces on",
    "dense, sliced",
    "upcycled, trained",
    "random experts, trained",
)
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
        "native": Cell("moe_inference.csv", {"metric": "decode_speedup", "subject": "mixture"}),
        "cpp": Cell("moe_inference.csv", {"metric": "decode_speedup", "subject": "mixture, 4 bits in llama.cpp"}),
    },
)


def plan(settings: MobileMoE) -> Plan:
    tokens = settings.steps * settings.batch * settings.tokens
    block = settings.layers * settings.hidden**2
    work = block * (2 * 15 + 2 * 16.5 + 3 + 12 * settings.experts)  # parameters of the four models, per token
    slices = (
        settings.upcycle_steps
        * settings.upcycle_batch
        * settings.tokens
        * (5e7 if settings.upcycle != "own" else block * 15)
    )
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
    """Every figure is kept in points.json when it is measured."""
    store = output / "points.json"
    points: dict[str, list[dict[str, Any]]] = read_object(store) if store.exists() else {}
    bench: list[_Bench] = []  # built when the first missing figure needs the texts

    def measured(name: str, measure: Any) -> list[dict[str, Any]]:
        if name not in points:
            if not bench:
                bench.append(_Bench(settings, output))
            points[name] = measure(bench[0])
            write_text(store, json.dumps(points, indent=1) + "\n")
        return points[name]

    report = Report(f"MobileMoE: {settings.experts} experts cut in {settings.granularity}, on bytes")
    for name in (MOE, UNBALANCED, ACTIVE, TOTAL):
        runs = [
            measured(f"{name}/{seed}", lambda b, n=name, k=seed: b.model_rows(n, k)) for seed in range(settings.seeds)
        ]
        for rows in zip(*runs, strict=True):
            report.add(**row_over_seeds(list(rows)))
    for row in measured("upcycling", lambda b: b.upcycling_rows()):
        report.add(**row)
    report.notes.append(
        "loss in nats per byte on held-out documentation and sources; active parameters count all that a token "
        "touches, router and tied table included"
    )
    shutil.rmtree(output / "training", ignore_errors=True)  # everything is measured
    ScalingLaw.published().plot(output / "scaling_law.png")
    _plot(report, output / "loss.png")
    return report


class _Bench:
    """The texts as blocks of bytes, and the models by name."""

    def __init__(self, settings: MobileMoE, output: Path) -> None:
        self.settings, self.output = settings, output
        prose, other = load_texts(None, "calibration"), load_texts(None, "evaluation")
        self.training = self._blocks([*prose, *_sources(MODULES)], None)
        half = settings.held_out_blocks // 2
        self.domains = {"prose": self._blocks(other, half), "code": self._blocks(_sources(HELD_OUT), half)}

    def _blocks(self, texts: list[str], count: int | None) -> Tensor:
        """int64 [blocks, tokens], shuffled by the seed."""
        data = torch.tensor(list("\n\n".join(texts).encode()), dtype=torch.int64)
        blocks = data[: len(data) // self.settings.tokens * self.settings.tokens].view(-1, self.settings.tokens)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(self.settings.seed))
        return blocks[order[:count]]

    def config(self, name: str) -> Any:
        s = self.settings
        sparse = name in (MOE, UNBALANCED)
        moe = MoEConfig.split(4 * s.hidden, s.experts, s.granularity)
        return EdgeDecoderConfig(
            vocab_size=256,
            hidden_size=s.hidden,
            intermediate_size=4 * s.hidden * (s.experts if name == TOTAL else 1),
            num_hidden_layers=s.layers,
            num_attention_heads=s.hidden // 32,
            num_key_value_heads=1,
            ffn_types="moe" if sparse else "mlp",
            moe=asdict(moe) if sparse else None,
            qk_norm="l2",
            max_position_embeddings=s.tokens,
        )

    def trained(self, name: str, seed: int) -> nn.Module:
        """The model after training; a finished run gives its weights at once."""
        model = new_decoder(self.config(name), self.settings.seed + seed)
        rate = self.settings.balance_rate if name == MOE else 0.0
        self.fit(model, f"{name}, seed {seed}", self.training, self.settings.steps, self.settings.learning_rate, rate)
        return model

    def fit(
        self, model: nn.Module, name: str, blocks: Tensor, steps: int, learning_rate: float, rate: float,
        batch: int | None = None,
    ) -> None:  # fmt: skip
        optimizer: Any = default_optimizer(model, learning_rate, 0.1, (0.9, 0.95))
        loss: Any = _next_byte
        if any(isinstance(module, SparseMoE) for module in model.modules()):
            loss = MoELoss(loss, LoadBalancer(model, rate).attach(optimizer))
        fit(
            model,
            loss,
            BlockBatches(blocks, batch or self.settings.batch, seed=self.settings.seed),
            TrainConfig(steps, learning_rate, warmup_steps=max(1, steps // 20), checkpoint_every=max(10, steps // 5)),
            optimizer=optimizer,
            output=self.output / "training" / name,
            label=name,
        )

    def model_rows(self, name: str, seed: int) -> list[dict[str, Any]]:
        """Held-out loss and parameters; for sparse models also their loads and, for the balanced one, its usage."""
        model = self.trained(name, seed).eval()
        total, active = moe_parameters(model.config)  # type: ignore[arg-type]
        rows: list[dict[str, Any]] = [
            {**_loss(model, self.domains), "subject": name, "metric": "loss", "unit": "nats/byte"},
            {"metric": "parameters", "value": total, "subject": name},
            {"metric": "active_parameters", "value": active, "subject": name},
        ]
        if name in (MOE, UNBALANCED):
            rows += self.usage_rows(model, name, seed)
        return rows

    def usage_rows(self, model: nn.Module, name: str, seed: int) -> list[dict[str, Any]]:
        usage = expert_usage(model, {domain: blocks.split(16) for domain, blocks in self.domains.items()})
        rows = [
            {"metric": "max_load", "value": float(usage.max_load.max()), "subject": name, "unit": "of the mean"},
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
        dense, training, held_out = self.upcycled_model()
        calibration = [training[:8]]
        pieces = s.experts * s.granularity - s.granularity // 2
        count = dense.config.num_hidden_layers
        blocks = range(count - (s.upcycle_layers or count), count)
        sliced: dict[str, Any] = {"layers": blocks, "batches": calibration}
        everything = moe_from_dense(dense, s.experts, s.granularity, top_k=pieces, **sliced)
        rows = [self._perplexity(dense, DENSE, held_out), self._perplexity(everything, ALL_ON, held_out)]
        del everything
        for name in (UPCYCLED, RANDOM):
            sparse = moe_from_dense(dense, s.experts, s.granularity, top_k=s.upcycle_top_k, **sliced)
            if name == RANDOM:
                _draw_experts(sparse, s.seed)
            else:
                rows.append(self._perplexity(sparse, "upcycled, untrained", held_out))
            sparse.requires_grad_(False)
            for layer in moe_layers(sparse).values():
                layer.requires_grad_(True)
            self.fit(sparse, name, training, s.upcycle_steps, s.upcycle_learning_rate, s.balance_rate, s.upcycle_batch)
            rows.append(self._perplexity(sparse, name, held_out))
        return rows

    def upcycled_model(self) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """(dense model, training blocks, held-out blocks by domain)."""
        s = self.settings
        if s.upcycle == "own":
            return self.trained(ACTIVE, 0), self.training, self.domains
        model, tokenizer = edgewright.load(s.upcycle)
        training = token_blocks(load_texts(None, "calibration"), tokenizer, s.tokens, seed=s.seed)
        held_out = token_blocks(load_texts(None, "evaluation"), tokenizer, s.tokens, s.held_out_blocks // 4, s.seed)
        return model, training, {"prose": held_out}

    def _perplexity(self, model: nn.Module, subject: str, blocks: dict[str, Tensor]) -> dict[str, Any]:
        loss = _loss(model.eval(), blocks)
        value = exp(loss["value"])
        return {"metric": "perplexity", "subject": subject, "value": value, "se": value * loss["se"], "n": loss["n"]}


def _next_byte(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def _loss(model: nn.Module, domains: dict[str, Tensor]) -> dict[str, Any]:
    """Mean loss over all blocks, its standard error with the block as the unit of chance."""
    sums: list[float] = []
    counts: list[int] = []
    with torch.no_grad():
        for blocks in domains.values():
            for part in blocks.split(8):
                logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
                losses = F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").double().sum(1)
                sums += losses.tolist()
                counts += [part.shape[1] - 1] * len(part)
    found = ratio_of_sums(sums, counts)
    return {"value": found.value, "se": found.se, "n": found.clusters}


def _draw_experts(model: nn.Module, seed: int) -> None:
    """Random weights for every sparse layer, as a model from scratch has them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in moe_layers(model).values():
            for weight in layer.parameters():
                weight.normal_(0.0, 0.02, generator=generator)
            layer.gate.e_score_correction_bias.zero_()


def _sources(names: tuple[str, ...]) -> list[str]:
    """Modules of Python's own library; those that this version no longer has are passed over."""
    paths = [Path(os.__file__).parent / f"{name}.py" for name in names]
    return [path.read_text("utf-8") for path in paths if path.exists()]


def _plot(report: Report, path: Path) -> None:
    rows = [row for row in report.rows if row.metric == "loss"]
    with plot(path, (6, 4)) as axes:
        for row in rows:
            total, active = (report.value(metric, row.subject) for metric in ("parameters", "active_parameters"))
            points = axes.errorbar([active, total], [row.value] * 2, yerr=row.se or 0, fmt="o-", label=row.subject)
            points[0].set_markevery([0])
        axes.set_xscale("log")
        axes.set_xlabel("parameters: active (dot) to total")
        axes.set_ylabel("held-out loss (nats per byte)")
        axes.legend()
        axes.grid(alpha=0.25)
