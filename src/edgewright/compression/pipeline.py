"""`compress`: calibrate, train, export, verify, evaluate and time; one table at the end.

Every stage leaves a file in the output folder and is skipped when that file is there already, so an interrupted run
goes on where it stopped: reference.gguf, rtn.gguf, mse.gguf, gptq.gguf, data/, training/, huggingface/, qat.gguf,
report.json.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from rich.console import Console
from torch import Tensor, nn

from edgewright.compression import methods
from edgewright.compression.picture import save_pareto
from edgewright.compression.plan import (
    CALIBRATION,
    EVALUATION,
    REFERENCES,
    ROUNDING,
    TIMING,
    TRAINING,
    WRITING,
    StagePlan,
    estimated_seconds,
    planned_stages,
)
from edgewright.compression.settings import DEFAULT_STEPS, CompressSettings, check_claim, claim
from edgewright.distillation.self_generation import START, self_generate
from edgewright.distillation.sequences import pack_sequences
from edgewright.errors import EdgewrightError, FormatError
from edgewright.evaluation.language import (
    add_rows,
    engine_logits,
    evaluate_language,
    model_logits,
    trained_positions,
)
from edgewright.export.gguf.exporter import check_exportable, export_gguf, llama_cpp_quantize
from edgewright.export.huggingface import save_quantized
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_json, read_object
from edgewright.io.models import load
from edgewright.io.run_folder import working_in
from edgewright.io.text import split_blocks
from edgewright.measure.progress import ProgressBar
from edgewright.measure.report import Report
from edgewright.measure.size import bits_per_weight
from edgewright.quantization.config import KVConfig
from edgewright.quantization.coverage import coverage, summary
from edgewright.quantization.kv_cache import attach_kv_quantization
from edgewright.runtime.benchmark import benchmark_files
from edgewright.runtime.engine import open_engine

COVERAGE = "coverage.json"  # what share of the weights is quantised; the report of a resumed run repeats it
QUESTION = "What is the capital of France?"
Say = Callable[[str], None]


class Compression:
    """One run: the settings, the output folder, and the model with its tokenizer."""

    def __init__(self, settings: CompressSettings, output: Path, say: Say, progress: bool) -> None:
        self.settings, self.output, self.say, self.progress = settings, output, say, progress
        self.model: Any
        self.model, self.tokenizer = load(settings.model)
        self.kv = None if settings.kv is None else KVConfig.llama_cpp(settings.kv)
        check_exportable(self.model, self.tokenizer)  # before the work, not after
        self.length = length = min(settings.block_length, trained_positions(self.model) or settings.block_length)
        if length < settings.block_length:
            say(f"{settings.model} was trained for {length} positions: blocks have {length} tokens, not "
                f"{settings.block_length}")  # fmt: skip
        self.text, self.evaluation = split_blocks(
            settings.data, self.tokenizer, length, evaluation=settings.evaluation_blocks, seed=settings.seed
        )

    @property
    def generated(self) -> int:
        """Tokens of a text that the model writes itself."""
        return min(GENERATED_LENGTH, self.length)

    def file(self, name: str) -> Path:
        return self.output / f"{name}.gguf"

    def to_do(self, method: str) -> bool:
        """Whether a method is wanted and its file not there yet."""
        return method in self.settings.wanted and not self.file(method).exists()

    def export(self, name: str, model: Any, layout: str | None = None) -> None:
        """Write and verify one file; its layout table is shown for the method that was asked for."""
        settings = self.settings
        if name == settings.method:  # before the file itself, whose presence says that all of it is there
            line = summary(coverage(model))
            self.say(line)
            write_text(self.output / COVERAGE, json.dumps({"summary": line}) + "\n")
            save_quantized(model, self.tokenizer, self.output / "huggingface")
        result = export_gguf(
            model,
            self.tokenizer,
            self.file(name),
            layout=layout or settings.layout,
            strict=not settings.lenient,
            kv=settings.kv,
            progress=self.progress,
            original=model_logits(self.model),
        )
        distance = result.checks["original"]
        self.say(
            f"{name}: verified; against the original model KL {distance['kl']:.3g}, the same token at "
            f"{distance['top1_agreement']:.0%} of {result.checks['positions']} places"
        )
        if name == settings.method and self.progress:
            result.print(Console(stderr=True))

    def references(self) -> None:
        """The float16 file, and llama.cpp's own 4-bit (or 8-bit) file as the peer."""
        if not self.file("reference").exists():
            # not strict: what float16 cannot hold is written in float32, which is no worse a reference
            export_gguf(self.model, self.tokenizer, self.file("reference"), strict=False, verify=False, embedding="F16")
        peer = self.peer
        if self.settings.baselines and not self.file(peer).exists():
            llama_cpp_quantize(self.model, self.tokenizer, self.file(peer), type=peer.removeprefix("llama.cpp-"))

    @property
    def peer(self) -> str:
        return "llama.cpp-Q8_0" if self.settings.bits == 8 else "llama.cpp-Q4_0"

    def second_order(self) -> nn.Module | None:
        """The calibrated student, still under quantisation; None when no later stage needs it."""
        train, show = self.to_do("qat"), self.to_do("gptq")
        if not (train or show):
            return None
        blocks = self.calibration_blocks()
        with ProgressBar("calibrating blocks", None, shown=self.progress) as bar:
            student = methods.calibrated(
                self.model, self.settings.bits, blocks, lambda done, total: bar.update(done, total=total)
            )
        if show:
            self.export("gptq", methods.packed(copy.deepcopy(student)))
        return student if train else None

    def calibration_blocks(self) -> Tensor:
        """The user's text; or half documentation and half what the model writes itself, plain and in answers.

        Documentation alone is not enough: codes fitted to it alone lost the model's manners in a chat (docs/log.md).
        """
        settings = self.settings
        if settings.data is not None:
            return self.text[: settings.calibration_blocks]
        own = self.own_text(settings.budget.steps or DEFAULT_STEPS)
        half = settings.calibration_blocks // 2
        return torch.cat([self.text[: settings.calibration_blocks - half], own[:half]])

    def own_text(self, steps: int) -> Tensor:
        """Shuffled blocks for so many steps, written by the model: half plain text, half answers in its chat format."""
        settings = self.settings
        sequences = -(-steps * settings.batch_size * self.length // self.generated)
        template = chat_template(self.tokenizer)
        kinds: list[tuple[str, str | None, int]] = [("plain", None, sequences)]
        if template is not None:
            kinds = [("plain", None, sequences - sequences // 2), ("chat", template, max(1, sequences // 2))]
        parts = []
        for name, prompt, count in kinds:
            folder = self.output / "data" / f"{name}-{count}"
            if not folder.exists():
                self.say(f"the model writes {count} texts of up to {self.generated} tokens ({name})")
            written = self_generate(
                self.model,
                self.tokenizer,
                n_sequences=count,
                max_length=self.generated,
                seed=settings.seed,
                prompt_template=prompt,
                output=folder,
                progress=self.progress,
            )
            parts.append(written)
        width = max(part.tokens.shape[1] for part in parts)
        tokens = torch.cat([functional.pad(part.tokens, (0, width - part.tokens.shape[1])) for part in parts])
        lengths = torch.cat([part.lengths for part in parts])
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(settings.seed))
        return pack_sequences(tokens[order], lengths[order], self.length, self.tokenizer.eos_token_id)

    def steps(self, student: nn.Module) -> int:
        budget = self.settings.budget
        if budget.steps is not None:
            return budget.steps
        assert budget.minutes is not None
        kept = self.output / "steps.json"
        if not kept.exists():  # a resumed run keeps the number that the first one found
            batch = self.text[: self.settings.batch_size]
            seconds = methods.seconds_per_step(student, self.model, batch)
            write_text(kept, json.dumps({"steps": max(1, round(60 * budget.minutes / seconds)), "seconds": seconds}))
        steps = read_object(kept).get("steps")
        if type(steps) is not int or steps < 0:
            raise FormatError(f"{kept} does not say how many steps there are; remove it")
        return steps

    def training(self, student: nn.Module) -> None:
        if self.kv is not None:
            attach_kv_quantization(student, self.kv)
        steps = self.steps(student)
        blocks = self.text if self.settings.data is not None else self.own_text(steps)
        methods.train(
            student,
            self.model,
            blocks,
            steps=steps,
            learning_rate=self.settings.rate,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            output=self.output / "training",
            progress=self.progress,
            settings={"model": self.settings.model, "bits": self.settings.bits, "kv": self.settings.kv},
        )
        final = methods.packed(student)
        if self.settings.bits <= 2 and self.settings.layout == "auto":
            self.export("qat-small", final, "small")
        self.export("qat", final)

    @property
    def files(self) -> dict[str, Path]:
        """The files that are judged, by name."""
        names = ["reference", *([self.peer] if self.settings.baselines else []), *self.settings.wanted]
        return {name: self.file(name) for name in names}

    def evaluate(self) -> Report:
        """Quality of every file in its runtime, and its size."""
        settings, files = self.settings, self.files
        report = Report(f"{settings.model} at {settings.bits:g} bits", settings.to_dict())
        cache = {None: "f16", 8: "q8_0", 4: "q4_0"}[settings.kv]
        engines = {
            name: open_engine(
                path, context=self.length, cache_type_k=_cache(name, cache), cache_type_v=_cache(name, cache)
            )
            for name, path in files.items()
        }
        try:
            results = evaluate_language(
                {name: engine_logits(engine) for name, engine in engines.items()},
                self.evaluation,
                reference=model_logits(self.model),
                progress=self.progress,
            )
        finally:
            for engine in engines.values():
                engine.close()
        add_rows(report, results)
        for name, path in self.with_small().items():
            report.add("file_size", path.stat().st_size / 1e6, subject=name, unit="MB")
            report.add("bits_per_weight", bits_per_weight(path), subject=name)
        report.notes += self.notes()
        return report

    def with_small(self) -> dict[str, Path]:
        """`files`, and the small layout of the trained one where there is one."""
        small = self.file("qat-small")
        return {**self.files, **({"qat-small": small} if small.exists() else {})}

    def time_files(self, report: Report) -> None:
        """Speed and memory, alternating between the files."""
        files = list(self.with_small().values())
        for row in benchmark_files(files, prompt_tokens=128, decode_tokens=32, progress=self.progress).rows:
            if row.metric in ("decode", "prefill", "time_to_first_token", "roofline", "peak_memory"):
                report.add(row.metric, row.value, subject=row.subject.removesuffix(".gguf"), se=row.se, n=row.n,
                           unit=row.unit)  # fmt: skip

    def save(self, report: Report) -> None:
        """The report comes last: its presence says that the run is finished."""
        # Latent weights and optimizer state are ten times the file; nothing needs them once it is verified.
        shutil.rmtree(self.output / "training" / "checkpoints", ignore_errors=True)
        save_pareto(report, self.output / "pareto.png")
        report.save(self.output)

    def plan(self, files_only: bool) -> StagePlan:
        """The stages of this call; those that an earlier one has finished take no time."""
        steps = self.settings.budget.steps or DEFAULT_STEPS
        seconds = estimated_seconds(self.settings, self.model, self.evaluation, steps)
        references = [self.file("reference"), *([self.file(self.peer)] if self.settings.baselines else [])]
        to_do = {name for name in self.settings.wanted if self.to_do(name)}
        to_do |= {"reference"} if not all(path.exists() for path in references) else set()
        return StagePlan(planned_stages(self.settings, seconds, to_do, files_only), self.say, self.progress)

    def notes(self) -> list[str]:
        """What was measured, and a look at the file: an answer in its chat format, a plain continuation without one."""
        notes = ["quality: each file run in llama.cpp against the float32 model in PyTorch, on text that no method saw"]
        if self.length < self.settings.block_length:
            notes.append(f"blocks of {self.length} tokens, the positions that the model was trained for")
        method = self.settings.method
        try:
            with open_engine(self.file(method)) as engine:
                if self.tokenizer.chat_template:
                    prompt, answer_word = engine.chat_prompt([{"role": "user", "content": QUESTION}]), "answers"
                else:
                    prompt, answer_word = QUESTION, "goes on"
                notes.append(f"{QUESTION} {method} {answer_word}: {engine.generate(prompt, 48).text.strip()}")
        except EdgewrightError as error:  # the figures are there: a template that refuses costs one sentence only
            notes.append(f"{method} was not asked {QUESTION!r}: {error}")
        if (self.output / COVERAGE).exists():
            notes.append(read_json(self.output / COVERAGE)["summary"])
        return notes


GENERATED_LENGTH = 128


def chat_template(tokenizer: Any) -> str | None:
    """A question about the start token in the model's chat format, up to where the answer begins; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": f"Tell me about {START}."}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return text if text.count(START) == 1 else None


def compress(
    settings: CompressSettings,
    output: str | Path,
    *,
    say: Say = print,
    progress: bool = True,
    files_only: bool = False,
) -> Report | None:
    """Run (or go on with) one compression.

    Args:
        settings: everything that decides the bits of the result.
        output: the folder; finished stages in it are not done again.
        say: receives sentences for people.
        progress: show progress bars.
        files_only: stop when the files are written and verified.

    Returns:
        The report that is also saved in the folder; None with `files_only`.

    Raises:
        UsageError: the folder holds another run, or another process works in it.
        EdgewrightError: whatever a stage raises; finished stages stay usable.
    """
    with working_in(output):
        return _compress(settings, Path(output), say, progress, files_only)


def _compress(settings: CompressSettings, output: Path, say: Say, progress: bool, files_only: bool) -> Report | None:
    check_claim(output, settings)
    finished = output / "report.json"
    if finished.exists():
        say(f"{output} holds this run already, finished")
        return Report.from_file(finished)
    run = Compression(settings, output, say, progress)
    claim(output, settings)  # now that model and text are known to do: a mended command finds the folder free
    plan = run.plan(files_only)
    if not files_only:
        with plan.stage(REFERENCES):
            run.references()
    for method, scale in (("rtn", "absmax"), ("mse", "mse")):
        if method in settings.wanted:
            with plan.stage(ROUNDING[method]):
                if run.to_do(method):
                    run.export(method, methods.round_to_nearest(run.model, settings.bits, scale))
    if run.to_do("gptq") or run.to_do("qat"):
        if settings.data is None:
            with plan.stage(WRITING):
                run.own_text(settings.budget.steps or DEFAULT_STEPS)
        with plan.stage(CALIBRATION):
            student = run.second_order()
        if student is not None:
            with plan.stage(TRAINING):
                run.training(student)
            del student
            gc.collect()
    if files_only:
        return None
    with plan.stage(EVALUATION):
        report = run.evaluate()
    if settings.benchmark:
        with plan.stage(TIMING):
            run.time_files(report)
    run.save(report)
    return report


def _cache(name: str, cache: str) -> str:
    """The reference file keeps its float16 cache: it shows what the runtime alone changes."""
    return "f16" if name == "reference" else cache
