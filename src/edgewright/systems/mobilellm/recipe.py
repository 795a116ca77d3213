"""MobileLLM (arXiv 2402.14905): which shape should a small language model have, and one that is trained and shipped.

Decoders of equal size but different depth learn the same text over several seeds; a stack whose blocks run twice stands
between the stack that runs once and the one of twice the blocks. Then a model of the better shape trains longer, leaves
as GGUF, and writes in llama.cpp.

deviation: a million weights and minutes instead of 125 million and 480 000 steps; text is the documentation inside
installed packages.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from edgewright.export.gguf.exporter import export_gguf
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.text import builtin_documents, docstrings
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.design import design_sweep
from edgewright.models.decoder.footprint import footprint
from edgewright.models.decoder.pretrain import PretrainSettings, pretrain
from edgewright.models.decoder.pretrain_data import prepare_data
from edgewright.runtime.llamacpp import LlamaCppEngine
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import over_seeds

SHARING = ("once", "twice", "twice as many")  # what becomes of the same stored blocks
GAIN = 0.99  # one per cent of loss is a difference


@dataclass(frozen=True)
class MobileLLM:
    """weights, depths: of the shapes that are compared; sharing_depth: stored blocks of the comparison of sharing.
    writer_*: the model that is trained at length; writer_weights 0 leaves it out. packages: whose documentation is the
    text, beside Python's own topics; documents: how many of all are used, 0 for every one."""

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
    """Figures of a trained model are kept in points.json; a training that was stopped goes on from its checkpoint."""
    store = output / "points.json"
    points: dict[str, dict[str, Any]] = read_object(store) if store.exists() else {}
    bench = _Bench(settings, output)
    shapes = bench.shapes()
    for name, config in shapes.items():
        for seed in range(settings.seeds):
            if f"{name}/{seed}" not in points:
                points[f"{name}/{seed}"] = bench.train(name, config, settings.seed + seed)
                write_text(store, json.dumps(points, indent=1) + "\n")
    if settings.writer_weights and not ("writer" in points and (output / "writer.gguf").exists()):
        points["writer"] = bench.write()
        write_text(store, json.dumps(points, indent=1) + "\n")

    report = Report("MobileLLM: shapes of small decoders, and one that writes")
    for name, config in shapes.items():
        losses = [points[f"{name}/{seed}"]["validation_loss"] for seed in range(settings.seeds)]
        report.add("validation_loss", subject=name, unit="nats/token", **over_seeds(losses))
        report.add("weights", points[f"{name}/0"]["weights"], subject=name)
        report.add("hidden", config.hidden_size, subject=name)
    deep = [report.row("validation_loss", _depth(d)) for d in settings.depths if 8 <= d <= 16]
    if deep:
        best = min(deep, key=lambda row: row.value)
        report.add("validation_loss", best.value, subject="deeper", se=best.se, n=best.n, unit=best.unit)
        report.notes.append("deeper: the better of the depths from 8 to 16")
    for row in points.get("writer", {}).get("rows", ()):
        report.add(**row)
    report.notes += [f"writer: {text!r}" for text in points.get("writer", {}).get("texts", ())]
    report.notes.append("standard errors are over seeds of weights and order; loss on held-out documents, nats a token")
    _plot(settings, report, output / "loss.png")
    return report


def _depth(blocks: int) -> str:
    return f"{blocks} block{'s' if blocks > 1 else ''}"


class _Bench:
    """The text of a run, its shapes, and the training of one."""

    def __init__(self, settings: MobileLLM, output: Path) -> None:
        self.settings, self.output = settings, output
        self._documents: list[str] | None = None

    @property
    def documents(self) -> list[str]:
        if self._documents is None:
            found = builtin_documents("english") + docstrings(self.settings.packages)
            self._documents = found[: self.settings.documents or None]
        return self._documents

    def shapes(self) -> dict[str, EdgeDecoderConfig]:
        """Name -> configuration: depths at equal weights, then the three fates of the same blocks."""
        s = self.settings
        common: dict[str, Any] = {"max_position_embeddings": s.context}
        found = {
            _depth(config.num_stored_layers): config
            for config in design_sweep(s.weights, s.depths, s.vocab_size, **common)
        }
        (base,) = design_sweep(s.weights, [s.sharing_depth], s.vocab_size, **common)
        once = base.to_dict()
        blocks = range(s.sharing_depth)
        fields = ("mixers", "ffn_types", "share_map")
        again = {**once, **dict.fromkeys(fields), "ffn_types": "mlp", "num_hidden_layers": 2 * s.sharing_depth}
        found["blocks run once"] = base
        found["blocks run twice"] = EdgeDecoderConfig(**{**again, "share_map": [b for b in blocks for _ in range(2)]})
        found["twice as many blocks"] = EdgeDecoderConfig(**again)
        return found

    def pretrain(self, name: str, config: EdgeDecoderConfig, seed: int, steps: int, context: int, text: str) -> Any:
        """Train in `output/name`; the shards of `text` are made by the first and read by all."""
        s, folder = self.settings, self.output / name.replace(" ", "-")
        shared = self.output / text / "shards"
        settings = PretrainSettings(
            context=context,
            batch_size=s.batch,
            steps=steps,
            learning_rate=s.learning_rate,
            seed=seed,
            device=None,
            samples=0,
            evaluate_every=steps,
            checkpoint_every=100,
        )
        data: Any = shared if (shared / "manifest.json").exists() and folder.name != text else self.documents
        return pretrain(config, data, settings, folder, progress=steps > 50)

    def train(self, name: str, config: EdgeDecoderConfig, seed: int) -> dict[str, Any]:
        first = not (self.output / "study" / "shards" / "manifest.json").exists()
        if first:
            self.prepare("study", self.settings.vocab_size)
        result = self.pretrain(f"{name} {seed}", config, seed, self.settings.steps, self.settings.context, "study")
        shutil.rmtree(result.output)  # the figures are what is kept
        row = result.report.row("validation_loss")
        return {"validation_loss": row.value, "se": row.se, "weights": footprint(config).stored}

    def prepare(self, text: str, vocab_size: int) -> None:
        """Tokenizer and shards in output/text."""
        prepare_data(self.documents, vocab_size, 0.05, self.output / text, None, Accelerator(cpu=True))

    def write(self) -> dict[str, Any]:
        """Train the writer, export it, and let llama.cpp write."""
        s = self.settings
        (config,) = design_sweep(
            s.writer_weights, [s.writer_depth], s.writer_vocab, max_position_embeddings=s.writer_context
        )
        result = self.pretrain("writer", config, s.seed, s.writer_steps, s.writer_context, "writer")
        path = self.output / "writer.gguf"
        done = export_gguf(result.model, result.tokenizer, path, float_type="F16", embedding="F16", progress=False)
        stored = footprint(config, weight_bits=32).weight_bytes
        file = (result.output / "edge" / "model.safetensors").stat().st_size
        texts, speed = self.continuations(path)
        words = {word for text in self.documents for word in re.findall(r"[a-z]{3,}", text.lower())}
        used = [word for text in texts for word in re.findall(r"[a-z]{3,}", text.lower())]
        loss = result.report.row("validation_loss")
        subject = "writer in llama.cpp"
        rows = [
            {"metric": "validation_loss", "value": loss.value, "subject": "writer", "se": loss.se, "n": loss.n},
            {"metric": "weights", "value": footprint(config).stored, "subject": "writer"},
            {"metric": "file_ratio", "value": file / stored, "subject": "writer, float32"},
            {"metric": "top1_agreement", "value": done.checks["top1_agreement"], "subject": subject},
            {"metric": "known_words", "value": _share(used, words), "subject": subject, "n": len(used)},
            {"metric": "file_size", "value": done.bytes, "subject": subject, "unit": "bytes"},
            {"metric": "decode", "value": speed, "subject": subject, "unit": "tokens/s"},
        ]
        return {"rows": rows, "texts": texts}

    def continuations(self, path: Path) -> tuple[list[str], float]:
        """What the file writes behind a few beginnings, greedily, and tokens a second."""
        texts, seconds, tokens = [], 0.0, 0
        with LlamaCppEngine(path, threads=1, context=self.settings.writer_context) as engine:
            for start in ("The function returns", "If the argument is", "This class"):
                ids = engine.tokenize(start)
                began = time.perf_counter()
                room = min(self.settings.written_tokens, self.settings.writer_context - len(ids) - 1)
                written = list(engine.generate(ids, room, temperature=0.7, seed=self.settings.seed).ids)
                seconds, tokens = seconds + time.perf_counter() - began, tokens + len(written)
                texts.append(start + engine.detokenize(written))
        return texts, tokens / max(seconds, 1e-9)


def _share(used: list[str], known: set[str]) -> float:
    return sum(word in known for word in used) / len(used) if used else 0.0


def _plot(settings: MobileLLM, report: Report, path: Path) -> None:
    with plot(path, (7.0, 3.6)) as axes:
        for depths, subjects, label in (
            (settings.depths, [_depth(d) for d in settings.depths], f"{settings.weights:,.0f} weights"),
            (
                (settings.sharing_depth, 2 * settings.sharing_depth, 2 * settings.sharing_depth),
                ("blocks run once", "blocks run twice", "twice as many blocks"),
                f"{settings.sharing_depth} blocks: once, twice, twice as many",
            ),
        ):
            rows = [report.row("validation_loss", subject) for subject in subjects]
            axes.errorbar(depths, [r.value for r in rows], [r.se or 0 for r in rows], fmt="o-", label=label, capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("executed blocks")
        axes.set_ylabel("loss on held-out text (nats/token)")
        axes.grid(alpha=0.25)
        axes.legend()
