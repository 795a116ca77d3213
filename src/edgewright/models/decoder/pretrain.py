"""Language models trained from scratch: text or token shards in, a checkpoint that any tool loads out.

The recipe is MobileLLM's (arXiv 2402.14905): AdamW with betas 0.9 and 0.95, weight decay 0.1 on matrices, a warm-up and
a cosine to a tenth. One process, or several under torchrun: copies of the model (DDP), or its weights split (FSDP2).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgewright.checks import check_fields, number, one_of, optional, whole
from edgewright.errors import UsageError
from edgewright.io.atomic import atomic_directory
from edgewright.io.run_folder import claim_folder
from edgewright.io.shards import TokenShards, open_shards
from edgewright.measure.report import Report
from edgewright.models.decoder import kinds
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.footprint import footprint
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, new_decoder
from edgewright.models.decoder.native import NotRepresentable, to_native
from edgewright.models.decoder.next_token import NextToken
from edgewright.models.decoder.pretrain_data import load_tokenizer, prepare_data
from edgewright.models.decoder.pretrain_evaluation import Validation
from edgewright.models.decoder.tokenizer import end_token, tokenizer_fingerprint
from edgewright.training.config import TrainConfig
from edgewright.training.loop import TrainResult, fit
from edgewright.training.optimizer import default_optimizer
from edgewright.training.placement import place, process_accelerator
from edgewright.training.resume import steps_lost
from edgewright.training.schedules import check_schedule, schedule_name
from edgewright.training.sharded import shard_, whole_state
from edgewright.training.token_stream import TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL, EDGE = "model", "edge"
PRECISIONS = ("no", "bf16")
PARALLEL = ("ddp", "fsdp")
EVALUATIONS = 10  # in a run that does not say how often


@dataclass(frozen=True)
class PretrainSettings:
    """How a model is trained.

    Args:
        context: tokens that the model sees at once.
        batch_size: rows of an update, all processes together.
        micro_batch: rows that one process computes at a time; None: its whole share.
        steps: updates; give these or `tokens`.
        tokens: tokens to read, rounded up to steps.
        learning_rate: at the top of the schedule.
        schedule: see `training.schedules`.
        warmup: steps, or below 1 the share of the steps.
        weight_decay: of matrices.
        betas: decay rates of AdamW's moments.
        clip_norm: largest norm of all gradients together; None does not clip.
        precision: "no" or "bf16".
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        parallel: "ddp" or "fsdp", for more than one process.
        device: see TrainConfig.
        validation_share: of the documents.
        validation_rows: rows of an evaluation.
        evaluate_every: steps; 0: ten times in a run.
        checkpoint_every: steps that a kill costs at most.
        samples: texts that the model writes at each evaluation.
        sample_tokens: tokens of each.
        seed: of weights, order and samples.

    Raises:
        UsageError: a value that is out of range.
    """

    context: int = 256
    batch_size: int = 16
    micro_batch: int | None = None
    steps: int | None = None
    tokens: float | None = None
    learning_rate: float = 2e-3
    schedule: str = "cosine-10"
    warmup: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = 1.0
    precision: str = "no"
    gradient_checkpointing: bool = False
    parallel: str = "ddp"
    device: str | None = "auto"
    validation_share: float = 0.05
    validation_rows: int = 64
    evaluate_every: int = 0
    checkpoint_every: int = 50
    samples: int = 2
    sample_tokens: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if (self.steps is None) == (self.tokens is None):
            raise UsageError(f"steps={self.steps}, tokens={self.tokens}: give one of the two")
        rules = {
            "context": whole(1),
            "batch_size": whole(1),
            "precision": one_of(*PRECISIONS),
            "parallel": one_of(*PARALLEL),
            "warmup": number(0),
            "validation_rows": whole(1),
            "evaluate_every": whole(0),
            "checkpoint_every": whole(1),
            "samples": whole(0),
            "sample_tokens": whole(1),
            "tokens": optional(number(1)),
        }
        check_fields(self, rules)

    @property
    def updates(self) -> int:
        """Optimizer steps of the run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return math.ceil(self.tokens / (self.batch_size * self.context))

    def train_config(self, processes: int) -> TrainConfig:
        """The loop's settings. Raises UsageError when the rows of an update do not divide."""
        rows = self.micro_rows(processes)
        warmup = self.warmup if self.warmup >= 1 else self.warmup * self.updates
        return TrainConfig(
            steps=self.updates,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_steps=min(int(warmup), self.updates - 1),
            accumulation=self.batch_size // (rows * processes),
            clip_norm=self.clip_norm,
            weight_decay=self.weight_decay,
            betas=self.betas,
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
            precision=self.precision,
            device=self.device,
        )

    def micro_rows(self, processes: int) -> int:
        """Rows that one process computes at a time."""
        rows = self.batch_size // processes if self.micro_batch is None else self.micro_batch
        unit = max(1, rows) * processes
        if rows < 1 or self.batch_size % unit:
            raise UsageError(
                f"batch_size={self.batch_size} is no multiple of {processes} processes with micro_batch={rows}; "
                f"take batch_size={unit * max(1, round(self.batch_size / unit))}"
            )
        return rows


@dataclass(frozen=True)
class PretrainResult:
    """What a run gave. model: None in all processes but the first. lost: steps done again after a kill."""

    model: EdgeDecoderForCausalLM | None
    tokenizer: PreTrainedTokenizerBase
    report: Report
    train: TrainResult
    lost: int
    output: Path


def pretrain(
    config: EdgeDecoderConfig,
    data: Iterable[str] | TokenShards | str | Path,
    settings: PretrainSettings,
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[str] = (),
    resume: str = "auto",
    progress: bool = True,
    say: Callable[[str], None] = lambda sentence: None,
) -> PretrainResult:
    """Train a decoder from scratch; the same call again goes on where a run was stopped.

    Args:
        config: shape of the decoder.
        data: documents (anything that can be iterated twice), or token shards, ready or as their folder.
        settings: how it is trained.
        output: gets tokenizer/, shards/, checkpoints/, metrics.csv, loss.png, samples.jsonl, edge/ (our class), model/
            (the nearest class of transformers, where there is one), the same at its top so that edgewright.load(output)
            works, and the report.
        tokenizer: None trains one of config.vocab_size tokens, or takes the one beside the shards.
        prompts: what the samples go on from.
        resume: "auto", "never" (start again) or "must".
        progress: show a progress bar.
        say: receives sentences for people.

    Returns:
        Model, tokenizer, report and training.

    Raises:
        UsageError: sizes that do not fit one another, and whatever `fit` and `write_shards` raise.
    """
    output = Path(output)
    if settings.context > config.max_position_embeddings:
        raise UsageError(
            f"context={settings.context} is longer than max_position_embeddings={config.max_position_embeddings} of "
            "the model; lower the one or raise the other"
        )
    accelerator = process_accelerator()
    main, train_config = accelerator.is_main_process, settings.train_config(accelerator.num_processes)
    claim_folder(output, "pretrain", write=main)
    speak = say if main else _silent
    tokenizer, shards = _data(data, config, settings, output, tokenizer, accelerator, resume == "never", speak)
    shards.check_model(config.vocab_size, tokenizer_fingerprint(tokenizer))

    fields = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end_token(tokenizer)}
    config = EdgeDecoderConfig(**{**config.to_dict(), **fields})
    decoder = new_decoder(config, settings.seed)
    if settings.gradient_checkpointing:
        for block in decoder.model.layers:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    objective = NextToken(decoder)
    if settings.parallel == "fsdp":
        place(objective, settings.device, accelerator)
        shard_(objective, decoder.model.layers)
    stream = TokenStream(
        shards, "training", settings.context + 1, settings.micro_rows(accelerator.num_processes), settings.seed
    )
    step, lost = (None, 0) if resume == "never" else steps_lost(output)
    if step is not None or lost:
        speak(
            f"going on from step {step or 0} of {settings.updates}; {lost} steps beyond it were lost and are done again"
        )
    else:
        passes = settings.updates * settings.batch_size / stream.rows
        speak(
            f"{decoder.num_parameters():,} weights, {shards.total('training'):,} tokens, {settings.updates} steps of "
            f"{settings.batch_size} x {settings.context}: {passes:.2f} passes"
        )
    validation = Validation(
        shards,
        tokenizer,
        stream,
        settings.batch_size,
        settings.validation_rows,
        accelerator,
        output,
        prompts,
        settings.samples,
        settings.sample_tokens,
        kept=step or 0,
    )
    loss, optimizer = _objective_and_optimizer(objective, config, train_config)
    result = fit(
        objective,
        loss,
        stream,
        train_config,
        optimizer=optimizer,
        output=output,
        resume=resume,
        evaluate=validation,
        evaluate_every=settings.evaluate_every or max(1, settings.updates // EVALUATIONS),
        progress=progress,
        label="pretraining",
        settings={"config": config.to_diff_dict(), "parallel": settings.parallel},
        accelerator=accelerator,
    )
    state = whole_state(objective, keep=main)
    report, trained = Report("pre-training"), None
    if main:  # the only one that knows the rows of an earlier call
        report, trained = _report(config, settings, shards, result, lost, len(validation.rows)), decoder
        if settings.parallel == "fsdp":
            trained = new_decoder(config, settings.seed)
            trained.load_state_dict({name.removeprefix("decoder."): tensor for name, tensor in state.items()})
        for block in decoder.model.layers:
            block.gradient_checkpointing = False
        _save(trained.eval(), tokenizer, output, report)
        report.save(output)
    accelerator.wait_for_everyone()
    return PretrainResult(trained, tokenizer, report, result, lost, output)


def _objective_and_optimizer(objective: NextToken, config: EdgeDecoderConfig, train: TrainConfig) -> tuple[Any, Any]:
    """The loss function of `fit` and its optimizer."""
    optimizer = default_optimizer(objective, train.learning_rate, train.weight_decay, train.betas)
    return kinds.objective(config, _loss, objective, optimizer), optimizer


def _loss(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens)


def _data(
    data: Any,
    config: EdgeDecoderConfig,
    settings: PretrainSettings,
    output: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    accelerator: Any,
    fresh: bool,
    say: Callable[[str], None],
) -> tuple[PreTrainedTokenizerBase, TokenShards]:
    if not isinstance(data, str | Path | TokenShards):
        return prepare_data(
            data, config.vocab_size, settings.validation_share, output, tokenizer, accelerator, fresh, say=say
        )
    shards = data if isinstance(data, TokenShards) else open_shards(data)
    if tokenizer is None:
        beside = shards.folder.parent / "tokenizer"
        if not beside.is_dir():
            raise UsageError(f"the shards in {shards.folder} have no tokenizer beside them ({beside}); pass it")
        tokenizer = load_tokenizer(beside)
    return tokenizer, shards


def _save(
    decoder: EdgeDecoderForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    report: Report,
) -> None:
    """edge/, model/ and, at the top, the files of model/ once more (hard links where the disk has them)."""
    decoder = decoder.cpu()
    decoder.generation_config.eos_token_id = decoder.config.eos_token_id
    model: Any = decoder
    try:
        model = to_native(decoder)
        report.notes.append(f"model/ is {type(model).__name__}, with the logits of edge/")
    except NotRepresentable as error:
        report.notes.append(f"model/ is our own class: {error}")
    for name, part in ((EDGE, decoder), (MODEL, model)):
        with atomic_directory(output / name, ours=True) as folder, _quiet():
            part.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    (output / "config.json").unlink(missing_ok=True)  # last to come: without it the folder is no model
    for file in sorted((output / MODEL).iterdir(), key=lambda file: file.name == "config.json"):
        target = output / file.name
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for files that take no time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _report(
    config: EdgeDecoderConfig,
    settings: PretrainSettings,
    shards: TokenShards,
    result: TrainResult,
    lost: int,
    rows: int,
) -> Report:
    report = Report(
        f"pre-training of {footprint(config).stored:,} weights",
        {**asdict(settings), "schedule": schedule_name(settings.schedule), "config": config.to_diff_dict()},
    )
    tokens = settings.updates * settings.batch_size * settings.context
    done = (settings.updates - (result.resumed_from or 0)) * settings.batch_size * settings.context
    last = {name: result.metrics.get(f"eval_{name}", math.nan) for name in ("loss", "loss_se", "bits_per_byte")}
    report.add("weights", footprint(config).stored)
    report.add("training_tokens", tokens, unit="tokens")
    report.add("passes", tokens / shards.total("training"))
    report.add("training_loss", result.loss, unit="nats/token")
    report.add("validation_loss", last["loss"], se=last["loss_se"], n=rows, unit="nats/token")
    report.add("bits_per_byte", last["bits_per_byte"], n=rows, unit="bits")
    report.add("seconds", result.seconds, unit="s")
    if done:
        report.add("speed", done / result.seconds, unit="tokens/s")
    report.add("steps_lost", lost)
    return report


def _silent(sentence: str) -> None:
    return None
