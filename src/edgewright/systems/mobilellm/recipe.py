"""MobileLLM (arXiv 2402.14905): which shape should a small language model have, and one that is trained and shipped.

Decoders of equal size but different depth learn the same text over several seeds; a stack whose blocks run twice stands
between the stack that runs once and the one of twice the blocks. Then a model of the better shape trains longer, leaves
as GGUF, and writes in llama.cpp.

deviation: a million weights and minutes instead of 125 million and 480 000 steps; text is the documentation inside
installed packages.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from edgewright.io.text import builtin_documents, docstrings
from edgewright.measure.report import Report
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.design import design_sweep
from edgewright.models.decoder.footprint import footprint
from edgewright.models.decoder.pretrain import PretrainSettings, pretrain
from edgewright.models.decoder.pretrain_data import prepare_data
from edgewright.systems.mobilellm.writer import judge_writer
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run

GAIN = 0.99  # one per cent of loss is a difference
SHARING = ("blocks run once", "blocks run twice", "twice as many blocks")


@dataclass(frozen=True)
class MobileLLM:
    """weights, depths: of the shapes that are compared; sharing_depth: stored blocks of the comparison of sharing.
    writer_*: the model that is trained at length; writer_weights 0 leaves it out. packages: whose documentation is the
    text, beside Python's own topics; documents: how many of all are used, 0 for every one.
    """

    seed: int = 0
    seeds: int = 2
    weights: float = 1e6
    vocab_size: int = 2048
    depths: tuple[int, ...] = (2, 4, 8, 16)
    sharing_depth: int = 4
    steps: int = 250
    batch: int = 16
    context: int = 128
    learning_rate: float = 3e-3
    writer_weights: float = 4e6
    writer_vocab: int = 4096
    writer_depth: int = 10
    writer_steps: int = 700
    writer_context: int = 192
    written_tokens: int = 160
    packages: tuple[str, ...] = ("torch", "transformers", "numpy")
    documents: int = 0


def tiny() -> MobileLLM:
    return MobileLLM(
        seeds=1,
        weights=30_000,
        vocab_size=300,
        depths=(1, 2),
        sharing_depth=1,
        steps=3,
        batch=4,
        context=16,
        writer_weights=60_000,
        writer_vocab=300,
        writer_depth=2,
        writer_steps=4,
        writer_context=32,
        written_tokens=8,
        packages=(),
        documents=40,
    )


def small() -> MobileLLM:
    return MobileLLM()


def paper() -> MobileLLM:
    """The published 125M and its text length, on the text that is here."""
    return MobileLLM(
        seeds=3,
        weights=125e6,
        vocab_size=32000,
        depths=(12, 30, 48),
        sharing_depth=30,
        steps=120_000,
        batch=256,
        context=2048,
        learning_rate=2e-3,
        writer_weights=125e6,
        writer_vocab=32000,
        writer_depth=30,
        writer_steps=480_000,
        writer_context=2048,
    )


LARGE = ("small", "paper")
CLAIMS = (
    Claim("file_ratio", "writer, float32", ">", 0.99, sizes=LARGE),
    Claim("file_ratio", "writer, float32", "<", 1.01, sizes=LARGE),
    Claim("weights", "blocks run twice", "<", against="twice as many blocks", sizes=("tiny", *LARGE)),
    Claim("validation_loss", "deeper", "<", against="2 blocks", factor=GAIN, sizes=("small",)),
    Claim("validation_loss", "blocks run twice", "<", against="blocks run once", factor=GAIN, sizes=LARGE),
    Claim("validation_loss", "twice as many blocks", "<", against="blocks run twice", sizes=LARGE),
    Claim("top1_agreement", "writer in llama.cpp", ">", 0.9),
    Claim("known_words", "writer in llama.cpp", ">", 0.8, sizes=LARGE),
)
CLOCKED: tuple[str, ...] = ("decode",)
HEADLINE: Headline | None = Headline(
    "four million weights write docstrings in llama.cpp, {words:.0%} known words; after 250 steps depth and blocks run "
    "twice do not pay: loss {deep:.2f} against {two:.2f} of two wide blocks",
    {
        "words": Cell("mobilellm.csv", {"metric": "known_words", "subject": "writer in llama.cpp"}),
        "deep": Cell("mobilellm.csv", {"metric": "validation_loss", "subject": "deeper"}),
        "two": Cell("mobilellm.csv", {"metric": "validation_loss", "subject": "2 blocks"}),
    },
)


def plan(settings: MobileLLM) -> Plan:
    """Seconds from arithmetic: six operations a weight and token, 4e10 a second on two idle cores; an estimate."""
    study = len(settings.depths) + 4  # the stack of twice the blocks costs twice, and so does running them twice
    tokens = settings.steps * settings.batch * settings.context
    operations = 6 * settings.weights * tokens * study * settings.seeds
    operations += 6 * settings.writer_weights * settings.writer_steps * settings.batch * settings.writer_context
    launches = settings.steps * settings.seeds * sum(settings.depths) * 0.002
    return Plan(
        steps=(
            f"a tokenizer of {settings.vocab_size} tokens, and the text as shards",
            f"{len(settings.depths)} depths of {settings.weights:,.0f} weights, {settings.seeds} seed(s) each, "
            f"{settings.steps} steps of {settings.batch} x {settings.context} tokens",
            f"{settings.sharing_depth} blocks run once, run twice, and twice as many",
            f"a writer of {settings.writer_weights:,.0f} weights, {settings.writer_steps} steps, to GGUF, in llama.cpp",
        ),
        seconds=20 + 20 * len(settings.packages) + operations / 4e10 + launches,
        memory_bytes=int(1e9 + 20 * settings.writer_weights + 8 * settings.batch * settings.context * 2e4),
        disk_bytes=int(1e8 + 60 * settings.writer_weights),
        outputs=("loss.png", "points.json", "writer.gguf"),
    )


def run(settings: MobileLLM, output: Path) -> Report:
    """A training that was stopped goes on from its checkpoint."""
    run = Run(output, "MobileLLM: shapes of small decoders, and one that writes")
    documents = cache(
        lambda: (builtin_documents("english") + docstrings(settings.packages))[: settings.documents or None]
    )
    for name, config in _shapes(settings).items():
        losses = run.over_seeds(name, settings.seeds, partial(_study_loss, settings, documents, output, name, config))
        run.add("validation_loss", losses, name, "nats/token")
        run.add("weights", footprint(config).stored, name)
        run.add("hidden", config.hidden_size, name)
    deep = [run.report.row("validation_loss", _depth(d)) for d in settings.depths if 8 <= d <= 16]
    if deep:
        best = min(deep, key=lambda row: row.value)
        run.add("validation_loss", best.value, "deeper", best.unit, se=best.se, n=best.n)
        run.note("deeper: the better of the depths from 8 to 16")
    if settings.writer_weights:
        writer = run.memo("writer", partial(_write, settings, documents, output))
        run.add_rows(writer["rows"])
        for text in writer["texts"]:
            run.note(f"writer: {text!r}")
    run.note("standard errors are over seeds of weights and order; loss on held-out documents, nats a token")
    _plot(settings, run)
    return run.report


def _depth(blocks: int) -> str:
    return f"{blocks} block{'s' if blocks > 1 else ''}"


def _shapes(settings: MobileLLM) -> dict[str, EdgeDecoderConfig]:
    """Name -> configuration: depths at equal weights, then the same blocks run once, twice, and twice as many."""
    sweep: Any = partial(
        design_sweep, settings.weights, vocab_size=settings.vocab_size, max_position_embeddings=settings.context
    )
    shapes = {_depth(config.num_stored_layers): config for config in sweep(settings.depths)}
    blocks = settings.sharing_depth
    (once,) = sweep([blocks])
    fields = {**once.to_dict(), "mixers": None, "ffn_types": "mlp", "share_map": None, "num_hidden_layers": 2 * blocks}
    twice = {**fields, "share_map": [block for block in range(blocks) for _ in range(2)]}
    return shapes | dict(zip(SHARING, (once, EdgeDecoderConfig(**twice), EdgeDecoderConfig(**fields)), strict=True))


def _pretrain(settings: MobileLLM, config: EdgeDecoderConfig, data: Any, seed: int, steps: int, folder: Path) -> Any:
    chosen = PretrainSettings(
        context=config.max_position_embeddings,
        batch_size=settings.batch,
        steps=steps,
        learning_rate=settings.learning_rate,
        seed=seed,
        device=None,
        samples=0,
        evaluate_every=steps,
        checkpoint_every=100,
    )
    return pretrain(config, data, chosen, folder, progress=steps > 50)


def _study_loss(
    settings: MobileLLM,
    documents: Callable[[], list[str]],
    output: Path,
    name: str,
    config: EdgeDecoderConfig,
    seed: int,
) -> float:
    """Loss on held-out documents after training; tokenizer and shards are made by the first and read by all."""
    shards = output / "study" / "shards"
    if not (shards / "manifest.json").exists():
        prepare_data(documents(), settings.vocab_size, 0.05, output / "study", None, Accelerator(cpu=True))
    folder = output / f"{name} {seed}".replace(" ", "-")
    result = _pretrain(settings, config, shards, settings.seed + seed, settings.steps, folder)
    shutil.rmtree(result.output)  # the figure is what is kept
    return result.report.value("validation_loss")


def _write(settings: MobileLLM, documents: Callable[[], list[str]], output: Path) -> dict[str, Any]:
    """Train the writer, export it, and let llama.cpp write."""
    (config,) = design_sweep(
        settings.writer_weights,
        [settings.writer_depth],
        settings.writer_vocab,
        max_position_embeddings=settings.writer_context,
    )
    trained = _pretrain(settings, config, documents(), settings.seed, settings.writer_steps, output / "writer")
    return judge_writer(trained, documents(), output / "writer.gguf", settings.written_tokens, settings.seed)


def _plot(settings: MobileLLM, run: Run) -> None:
    depths, blocks = settings.depths, settings.sharing_depth
    curves = {
        f"{settings.weights:,.0f} weights": run.curve("validation_loss", [_depth(d) for d in depths], depths),
        f"{blocks} blocks: once, twice, twice as many": run.curve(
            "validation_loss", SHARING, (blocks, 2 * blocks, 2 * blocks)
        ),
    }
    run.lines("loss.png", curves, "executed blocks", "loss on held-out text (nats/token)", style="o-", xscale="log")
