"""LLM-QAT (arXiv 2305.17888): weights, activations and the key-value cache quantised together, trained without data.

SmolLM2 is quantised to 4-bit weights, 8-bit activations and a 4-bit cache, per row and per token. It then learns from
its full-precision self, on text that it wrote and, for comparison, on documentation that it did not write.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import edgewright
from edgewright.distillation.language import LanguageDistillation
from edgewright.distillation.self_generation import distinct_n, self_generate
from edgewright.evaluation.language import add_rows, evaluate_language, model_logits
from edgewright.io.text import load_texts, token_blocks
from edgewright.io.transformers_names import with_cache
from edgewright.measure.machine import best_device
from edgewright.measure.report import Report
from edgewright.quantization.api import quantize_
from edgewright.quantization.config import ActivationConfig, KVConfig, QuantConfig, Rule, WeightConfig
from edgewright.quantization.grids import grid_for_bits
from edgewright.systems.llm_qat.quant_cache import QuantCache
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, row_over_seeds
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LLMQAT:
    """tokens: length of a block; sequences: texts the model writes; layers 0 keeps the whole model.

    deviation: learning_rate is five times the published 2e-5, for fifty steps instead of twelve thousand.
    """

    seed: int = 0
    seeds: int = 1
    weight_bits: int = 4
    activation_bits: int = 8
    kv_bits: int = 4
    sequences: int = 240
    generated_tokens: int = 128
    steps: int = 48
    batch: int = 2
    tokens: int = 256
    learning_rate: float = 1e-4
    held_out_blocks: int = 12
    layers: int = 0


def tiny() -> LLMQAT:
    return LLMQAT(sequences=6, generated_tokens=8, steps=4, tokens=16, learning_rate=2e-4, held_out_blocks=2, layers=2)


def small() -> LLMQAT:
    return LLMQAT()


def paper() -> LLMQAT:
    """The published amounts: three passes over the vocabulary, blocks of 2048, one epoch."""
    return LLMQAT(
        sequences=3 * 49152,
        generated_tokens=2048,
        steps=12000,
        batch=8,
        tokens=2048,
        learning_rate=2e-5,
        held_out_blocks=64,
    )


CLAIMS = (
    Claim("kl", "qat, own text", "<", against="rtn", sizes=("small", "paper")),
    Claim("kl", "qat, own text", "<", against="rtn", factor=1 / 1.5, sizes=("small", "paper")),
    Claim("kl", "rtn, 8-bit cache", "<", against="rtn", sizes=("small", "paper")),
    Claim("distinct_2", "hybrid text", ">", against="greedy text"),
    Claim("cache_bytes", "4-bit, groups of 64", "<", against="float16", factor=0.2813),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "SmolLM2 at W4A8KV4, a step a row: KL {rtn:.2f} untrained, {own:.2f} after 48 steps on its own text",
    {
        "rtn": Cell("llm-qat.csv", {"metric": "kl", "subject": "rtn"}),
        "own": Cell("llm-qat.csv", {"metric": "kl", "subject": "qat, own text"}),
    },
)


def plan(settings: LLMQAT) -> Plan:
    layers = settings.layers or 30
    tokens = settings.batch * settings.tokens
    per_step = tokens * (0.0035 + 0.0004 * layers)  # an estimate: 8 s for 512 tokens and 30 layers
    generated = settings.sequences * settings.generated_tokens
    return Plan(
        steps=(
            f"the model writes {settings.sequences} texts of up to {settings.generated_tokens} tokens, some greedily",
            f"quantise to W{settings.weight_bits} A{settings.activation_bits} KV{settings.kv_bits}, without training",
            f"train {settings.steps} steps of {tokens} tokens on its own text and on documentation, "
            f"{settings.seeds} seed(s) each",
            f"KL to the full model on {settings.held_out_blocks} held-out blocks",
        ),
        seconds=20 + generated / 300 + 2 * settings.seeds * settings.steps * per_step,
        memory_bytes=int(4e9 if layers == 30 else 1.5e9),
        disk_bytes=int(5e8),
        outputs=("kl.png", "points.json"),
    )


def run(settings: LLMQAT, output: Path) -> Report:
    """The texts stay in generated/."""
    run = Run(
        output, f"LLM-QAT: SmolLM2-135M at W{settings.weight_bits}A{settings.activation_bits}KV{settings.kv_bits}"
    )
    bench = cache(partial(_Bench, settings, output))  # loads the model when the first missing figure needs it
    run.add_rows(run.memo("text", lambda: bench().text_rows()))
    run.add_rows(run.memo("cache", lambda: bench().cache_rows()))
    for name, bits in {"rtn": settings.kv_bits, "rtn, 8-bit cache": 8, "rtn, 16-bit cache": 16}.items():
        run.add_rows(run.memo(name, lambda: bench().quality_rows(name, bits)))  # noqa: B023
    for source, text in (("own", "own text"), ("documentation", "documentation")):
        name = f"qat, {text}"
        seeds = run.over_seeds(name, settings.seeds, lambda seed: bench().trained_rows(name, source, seed))  # noqa: B023
        run.add_rows(row_over_seeds(rows) for rows in zip(*seeds, strict=True))
    run.note("KL in nats per token to the full-precision model, on documentation topics that no run trained on")
    run.bars("kl.png", "kl", "KL to the full-precision model (nats per token)")
    return run.report


class _Bench:
    """The teacher, its own texts, and the texts of others."""

    def __init__(self, settings: LLMQAT, output: Path) -> None:
        self.settings, self.output = settings, output
        self.teacher, self.tokenizer = edgewright.load("smollm2-135m", device=best_device())
        if settings.layers:
            self.teacher.model.layers = self.teacher.model.layers[: settings.layers]
            self.teacher.config.num_hidden_layers = settings.layers
        calibration = load_texts(None, "calibration")
        self.documentation = token_blocks(calibration, self.tokenizer, settings.tokens, seed=settings.seed)
        held_out = load_texts(None, "evaluation")
        self.held_out = token_blocks(held_out, self.tokenizer, settings.tokens, settings.held_out_blocks, settings.seed)

    def generate(self, mode: str, sequences: int) -> Any:
        settings = self.settings
        return self_generate(
            self.teacher,
            self.tokenizer,
            n_sequences=sequences,
            max_length=settings.generated_tokens,
            seed=settings.seed,
            output=self.output / "generated" / mode,
            mode=mode,  # type: ignore[arg-type]
            progress=False,
        )

    def text_rows(self) -> list[dict[str, Any]]:
        """Variety of what the model writes: share of distinct pairs of tokens."""
        rows = []
        count = min(self.settings.sequences, 64)
        for mode in ("hybrid", "greedy"):
            data = self.generate(mode, self.settings.sequences if mode == "hybrid" else count)
            value = distinct_n(data.tokens[:count], 2, data.lengths[:count])
            rows.append({"metric": "distinct_2", "value": value, "subject": f"{mode} text", "n": count})
        return rows

    def cache_rows(self) -> list[dict[str, Any]]:
        """Bytes a token of the caches that really store codes, beside float16."""
        config = self.teacher.config
        heads = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        rows = [{"metric": "cache_bytes", "value": 2.0 * 2 * heads, "subject": "float16", "unit": "bytes/token"}]
        kinds = {
            "4-bit, groups of 64": KVConfig(4, granularity=64, when="post_rope"),
            "q8_0": KVConfig.llama_cpp(8),
            "q4_0": KVConfig.llama_cpp(4),
        }
        for name, kind in kinds.items():
            cache = QuantCache(config, kind)
            with torch.no_grad():
                self.teacher(
                    self.held_out[:1].to(self.teacher.device), use_cache=True, logits_to_keep=1, **with_cache(cache)
                )
            value = float(cache.bytes_per_token())
            rows.append({"metric": "cache_bytes", "value": value, "subject": name, "unit": "bytes/token"})
        return rows

    def student(self, kv_bits: int) -> nn.Module:
        weight = WeightConfig(grid_for_bits(self.settings.weight_bits).name, scale="absmax")
        rule = Rule("*_proj", weight, ActivationConfig(self.settings.activation_bits))
        kv = KVConfig(kv_bits) if kv_bits < 16 else None
        return quantize_(copy.deepcopy(self.teacher), QuantConfig(rules=(rule,), kv=kv))

    def quality_rows(self, subject: str, kv_bits: int, student: nn.Module | None = None) -> list[dict[str, Any]]:
        """KL, perplexity and agreement on held-out text of a student, one that was not trained unless it is given."""
        student = (student or self.student(kv_bits)).eval()
        logits = {subject: model_logits(student)}
        result = evaluate_language(logits, self.held_out, reference=model_logits(self.teacher), progress=False)
        report = Report("")
        add_rows(report, result)
        return [asdict(row) for row in report.rows if row.metric in ("kl", "perplexity", "top1_agreement")]

    def trained_rows(self, subject: str, source: str, seed: int) -> list[dict[str, Any]]:
        """`quality_rows` after training on `source`."""
        settings, student = self.settings, self.student(self.settings.kv_bits)
        folder = self.output / f"training-{source}-{seed}"
        fit(
            student,
            LanguageDistillation(self.teacher),
            BlockBatches(self.blocks(source), settings.batch, seed=settings.seed + seed),
            TrainConfig(steps=settings.steps, learning_rate=settings.learning_rate, seed=seed, checkpoint_every=20),
            output=folder,
            label=f"training on {source} text",
        )
        rows = self.quality_rows(subject, settings.kv_bits, student)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # measured: its state is no longer needed
        return rows

    def blocks(self, source: str) -> Tensor:
        own = self.generate("hybrid", self.settings.sequences).blocks(self.settings.tokens)
        return own if source == "own" else self.documentation[: len(own)]
