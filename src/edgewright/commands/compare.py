"""Compare models and exported files on the same text: perplexity, KL to the first of them, top-1 agreement.

What is evaluated is what ships: a .gguf file runs in llama.cpp (`--in pytorch` reads its weights into PyTorch instead).
Every figure has a standard error over blocks of text. With --output, a folder gets report.json, report.md and kl.png.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.errors import OutputError, UsageError
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.runtime.engine import open_engine

if TYPE_CHECKING:
    from edgewright.evaluation.language import LanguageMetrics, LogitsFunction

COLUMNS = ("perplexity", "perplexity_ratio", "kl", "kl_p99", "top1_agreement", "tokens")
ENGINES = ("llama.cpp", "pytorch")
# What tokenisers differ in: spaces, digits, case, line ends, accents, other scripts, code.
SAMPLE = "  Don't split 12345.678 as I do!\n\n\tif x >= 0: naïve café, Привет, 你好 🙂\r\nHELLO_world  (end)"
SMALLEST_CONTEXT = 512  # one llama.cpp batch; less saves nothing worth having
SAMPLE_CHARACTERS = 20_000  # of the evaluation text itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model folder, a bundled name or an exported file")
    parser.add_argument("--reference", metavar="MODEL", help="what the others are held against (default: the first)")
    parser.add_argument(
        "--text", metavar="FILE", help="a text, .jsonl, .json or .csv file (default: Python's documentation topics)"
    )
    parser.add_argument(
        "--split",
        choices=("evaluation", "calibration", "all"),
        help="the part of the text to use (default: evaluation of the built-in text, all of a --text file)",
    )
    parser.add_argument("--blocks", type=int, default=40, help="at most so many blocks of text (default: 40)")
    parser.add_argument("--block-length", type=int, default=256, help="tokens in a block (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the blocks (default: 0)")
    parser.add_argument(
        "--in", dest="engine", choices=ENGINES, default=ENGINES[0], help="what runs .gguf files (default: llama.cpp)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--output", metavar="FOLDER", help="save report.json, report.md and kl.png here")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    if args.output:
        _check_output(Path(args.output))
    report, results = compare(
        args.models,
        reference=args.reference,
        text=args.text,
        split=args.split,
        blocks=args.blocks,
        block_length=args.block_length,
        seed=args.seed,
        engine=args.engine,
        threads=args.threads,
    )
    # printed before it is saved: a full disk must not cost the figures
    if args.json:
        print(report.to_json(), end="")
    else:
        # a pipe has no width of its own: one line a model, so that grep and awk can read the table
        console = Console(highlight=False) if sys.stdout.isatty() else Console(width=160)
        report.print_table(console, metrics=COLUMNS)
    if args.output:
        folder = Path(args.output)
        plot_kl(results, folder / "kl.png")
        report.save(folder)
        if not args.json:
            print(f"report and plot: {folder}")
    return 0


def compare(
    models: Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    split: str | None = None,
    blocks: int = 40,
    block_length: int = 256,
    seed: int = 0,
    engine: str = ENGINES[0],
    threads: int | None = None,
    progress: bool = True,
) -> tuple[Report, dict[str, LanguageMetrics]]:
    """Evaluate models on the same blocks; the first, or `reference`, is what the others are held against.

    Returns the report and the full results by name. Raises UsageError for fewer than two models, texts shorter than
    two tokens a block, and tokenisers or vocabularies that differ; CheckFailed for a model that gives NaN.
    """
    names = [str(model) for model in models]
    if reference is not None:
        names = [str(reference), *(name for name in names if name != str(reference))]
    if len(names) < 2:
        raise UsageError("compare needs two models or more, e.g. edgewright compare smollm2-135m out/model.gguf")
    if blocks < 1 or block_length < 2:
        raise UsageError(f"--blocks {blocks} must be at least 1 and --block-length {block_length} at least 2")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} must be at least 1; leave it out to use all cores")

    from edgewright.evaluation.language import add_rows, evaluate_language
    from edgewright.evaluation.statistics import paired_difference
    from edgewright.io.text import load_texts, token_blocks

    split = split or ("evaluation" if text is None else "all")
    texts = load_texts(text, split)  # type: ignore[arg-type]
    for name in names:
        _check_name(name, engine)
    with ExitStack() as stack, _threads(threads):
        opened = [_open(name, engine, block_length, threads, stack) for name in names]
        _check_tokenizers(opened, [SAMPLE, "\n".join(texts)[:SAMPLE_CHARACTERS]])
        ids = token_blocks(texts, opened[0].tokenizer, block_length, blocks, seed)
        subjects = dict(zip(_subjects(names), opened, strict=True))
        results = evaluate_language(
            {subject: one.logits for subject, one in subjects.items()},
            ids,
            reference=opened[0].logits,
            progress=progress,
        )
    first = next(iter(subjects))
    report = Report(
        f"compared with {first}",
        {
            "models": {subject: name for subject, name in zip(subjects, names, strict=True)},
            "runs in": {subject: one.engine for subject, one in subjects.items()},
            "text": "pydoc_data.topics" if text is None else str(text),
            "split": split,
            "blocks": len(ids),
            "block_length": block_length,
            "seed": seed,
            "threads": threads,
        },
    )
    add_rows(report, results)
    for subject, found in results.items():
        difference = paired_difference(found.nll_blocks, results[first].nll_blocks)
        ratio = math.exp(difference.value)
        # delta method on a paired difference: far tighter than the two perplexities apart
        se = None if math.isnan(difference.se) else ratio * difference.se
        report.add("perplexity_ratio", ratio, se=se, n=found.tokens, subject=subject)
    report.notes.append(
        f"KL(reference || model) in nats a token and top-1 agreement are against {first}; ± is one standard error over "
        f"{len(ids)} blocks of {block_length} tokens, the first of each as context."
    )
    return report, results


@dataclass(frozen=True)
class _Opened:
    name: str
    logits: LogitsFunction
    tokenizer: Any  # called as a transformers tokenizer is by `token_blocks`
    engine: str


class _EngineTokenizer:
    """The tokenizer of an exported file, as its own runtime applies it."""

    sep_token_id = None

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        end = getattr(engine, "metadata", {}).get("tokenizer.ggml.eos_token_id")
        self.eos_token_id = end if isinstance(end, int) else None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self._engine.tokenize(text, special=False) for text in texts]}


def _check_output(folder: Path) -> None:
    """Tell an impossible output folder now rather than after the work."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        problem = "is not a folder" if not place.is_dir() else "cannot be written"
        raise OutputError(f"cannot write results into {folder}: {place} {problem}; choose another --output")


def _is_exported(name: str, engine: str) -> bool:
    """Whether a runtime opens it; a .gguf file goes into PyTorch where that was asked for."""
    suffix = Path(name).suffix.lower()
    return suffix in (".pte", ".onnx") or (suffix == ".gguf" and engine == "llama.cpp")


def _check_name(name: str, engine: str) -> None:
    """A wrong name is told before minutes go into opening the others."""
    from edgewright.io.models import HUB_ID, find_model

    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r} for .gguf files: allowed are {', '.join(ENGINES)}")
    if _is_exported(name, engine):
        if not Path(name).is_file():
            raise UsageError(f"there is no file {name}; name an exported file, a model folder or a bundled model")
    elif Path(name).exists() or not HUB_ID.fullmatch(name):  # a hub id would be downloaded here
        find_model(name)


def _open(name: str, engine: str, block_length: int, threads: int | None, stack: ExitStack) -> _Opened:
    from edgewright.evaluation.language import check_positions, engine_logits, model_logits

    if _is_exported(name, engine):
        context = max(block_length, SMALLEST_CONTEXT)
        runtime: Any = stack.enter_context(open_engine(name, threads=threads, context=context))
        trained = runtime_positions(runtime)
        if trained is not None and block_length > trained:
            raise UsageError(
                f"blocks of {block_length} tokens are longer than the {trained} positions that {name} was trained for; "
                f"block_length={trained} is the most"
            )
        kind = "llama.cpp" if name.lower().endswith(".gguf") else type(runtime).__name__
        return _Opened(name, engine_logits(runtime), _EngineTokenizer(runtime), kind)

    from edgewright.io.models import load

    model, tokenizer = load(name)
    if model.get_output_embeddings() is None:
        raise UsageError(f"{name} ({type(model).__name__}) predicts no tokens: compare needs causal language models")
    check_positions(model, block_length, name)
    return _Opened(name, model_logits(model), tokenizer, "pytorch")


def runtime_positions(runtime: Any) -> int | None:
    """The longest text that the model in a file was trained for, where the file says it (GGUF does)."""
    metadata = getattr(runtime, "metadata", {})
    value = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return value if type(value) is int and value > 0 else None


def _check_tokenizers(opened: Sequence[_Opened], samples: list[str]) -> None:
    """The same ids for the same text, or every figure would compare different things."""
    expected = opened[0].tokenizer(samples, add_special_tokens=False, verbose=False)["input_ids"]
    for other in opened[1:]:
        found = other.tokenizer(samples, add_special_tokens=False, verbose=False)["input_ids"]
        for left, right in zip(expected, found, strict=True):
            if list(left) != list(right):
                place = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), "the end")
                raise UsageError(
                    f"{opened[0].name} and {other.name} cut the same text into different tokens (from token {place} of "
                    "a sample on): only models with one tokeniser can be compared token by token"
                )


def _subjects(names: Sequence[str]) -> list[str]:
    """Short, different names for the table: the last part of a path where that is enough."""
    short = [Path(name).name or name for name in names]
    chosen: list[str] = []
    for name, last in zip(names, short, strict=True):
        base = last if short.count(last) == 1 else name
        number = sum(other == base or other.startswith(f"{base} (") for other in chosen)
        chosen.append(base if number == 0 else f"{base} ({number + 1})")
    return chosen


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """PyTorch's thread count for a while."""
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plot_kl(results: Mapping[str, LanguageMetrics], path: str | Path) -> None:
    """A PNG of the share of tokens whose KL exceeds x, one line a model: what the mean hides is in the tail."""
    import numpy as np

    with plot(path) as axes:
        for name, found in results.items():
            values = np.sort(found.kl_values)
            if values.size and values[-1] > 0:  # the reference against itself is no line
                above = np.arange(values.size, 0, -1) / values.size
                axes.plot(np.maximum(values, 1e-9), above, label=f"{name}  (mean {found.kl:.3g})")
        axes.set(
            xscale="log", yscale="log", xlabel="KL to the reference, nats", ylabel="share of tokens with at least this"
        )
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
