"""The recipe's task, which needs no data: an encoder-decoder rewrites numbers and dates, judged by exact match.

    <digits> four hundred and twelve thousand and five      ->  4 1 2 0 0 5
    <words> 4 1 2 0 0 5                                     ->  four hundred and twelve thousand and five
    <date> the third of march nineteen oh seven             ->  1 9 0 7 - 0 3 - 0 3

Speech recognition ends and speech synthesis begins with it. Every answer is unique, so that greedy decoding can be
judged by exact match, and one wrong step spoils the whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from edgewright.checks import check, whole
from edgewright.io.hashing import crc32
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.quantization.api import convert_, quantized_modules
from edgewright.quantization.stored_size import stored_bytes
from edgewright.systems.ternary_binary_nlg.distillation import SequenceLossConfig, SequenceToSequenceDistillation
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit


def _words(text: str) -> list[str]:
    return text.split()


SMALL = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = _words(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
)
MONTHS = _words("january february march april may june july august september october november december")
TASKS = ("<digits>", "<words>", "<date>")
PADDING, START, END = 0, 1, 2
TOKENS: tuple[str, ...] = (
    *("<pad>", "<start>", "<end>"),
    *TASKS,
    *"0123456789-",
    *SMALL,
    *TENS,
    *("hundred", "thousand", "and", "the", "of", "oh"),
    *ORDINALS,
    "thirtieth",
    *MONTHS,
)
INDEX = {token: index for index, token in enumerate(TOKENS)}
LARGEST = 999_999
FIRST_DAY, DAYS = date(1901, 1, 1), (date(2099, 12, 31) - date(1901, 1, 1)).days + 1
SOURCE_LENGTH = TARGET_LENGTH = 13  # twelve tokens at most, and one for the task or the end
HELD_OUT_SHARE = 8  # one source in so many is kept for evaluation, by its checksum
SHORT = 50  # steps: fewer are repeated after an interruption, which is quicker than keeping checkpoints


def number_words(number: int) -> list[str]:
    """A number from 0 to 999999 in British words. Raises UsageError outside that range."""
    check("number", number, whole(0, LARGEST))
    if number < 20:
        return [SMALL[number]]
    if number < 100:
        return [TENS[number // 10 - 2], *([SMALL[number % 10]] if number % 10 else [])]
    if number < 1000:
        return [SMALL[number // 100], "hundred", *(["and", *number_words(number % 100)] if number % 100 else [])]
    rest = number % 1000
    link = ["and"] if 0 < rest < 100 else []
    return [*number_words(number // 1000), "thousand", *link, *(number_words(rest) if rest else [])]


def date_words(day: date) -> list[str]:
    """A date of the years 1901 to 2099: the third of march nineteen oh seven."""
    if day.day <= 20:
        ordinal = [ORDINALS[day.day - 1]]
    elif day.day == 30:
        ordinal = ["thirtieth"]
    else:
        ordinal = [TENS[day.day // 10 - 2], ORDINALS[day.day % 10 - 1]]
    century, year = divmod(day.year, 100)
    if 2000 <= day.year < 2010:
        spoken = number_words(day.year)
    elif year < 10:
        spoken = [*number_words(century), "oh", SMALL[year]]
    else:
        spoken = [*number_words(century), *number_words(year)]
    return ["the", *ordinal, "of", MONTHS[day.month - 1], *spoken]


def examples(count: int, seed: int, held_out: bool = False) -> list[tuple[list[str], list[str]]]:
    """Pairs (source, target) of tokens, the three tasks in turn; held-out sources never occur among the others.

    Numbers are spread evenly over their lengths from 1 to 6 digits, dates over their days.
    """
    generator = torch.Generator().manual_seed(2 * seed + held_out)
    pairs: list[tuple[list[str], list[str]]] = []
    while len(pairs) < count:
        task = TASKS[len(pairs) % len(TASKS)]
        if task == "<date>":
            day = FIRST_DAY + timedelta(days=_below(DAYS, generator))
            source, target = date_words(day), list(day.isoformat())
        else:
            number = _below(10 ** (1 + _below(6, generator)), generator)
            source, target = number_words(number), list(str(number))
            if task == "<words>":
                source, target = target, source
        if (crc32(" ".join(source)) % HELD_OUT_SHARE == 0) == held_out:
            pairs.append(([task, *source], target))
    return pairs


def encode(pairs: Sequence[tuple[list[str], list[str]]]) -> dict[str, Tensor]:
    """Batch of pairs: input_ids and attention_mask [N, 13], labels [N, 13] that end with <end>, then -100."""
    ids = torch.full((len(pairs), SOURCE_LENGTH), PADDING)
    labels = torch.full((len(pairs), TARGET_LENGTH), -100)
    for row, (source, target) in enumerate(pairs):
        ids[row, : len(source)] = torch.tensor([INDEX[token] for token in source])
        labels[row, : len(target) + 1] = torch.tensor([*(INDEX[token] for token in target), END])
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": labels}


def decode(ids: Tensor) -> list[list[str]]:
    """Tokens of each row [N, T] up to its first <end>, without the start; an id beyond the table stays a number."""
    rows = []
    for row in ids.tolist():
        body = row[1:] if row and row[0] == START else row
        body = body[: body.index(END)] if END in body else body
        rows.append([TOKENS[i] if 0 <= i < len(TOKENS) else str(i) for i in body])
    return rows


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


# -- the model and its training ----------------------------------------------------------------------------------------


def encoder_decoder(width: int, layers: int, seed: int) -> Any:
    """A BART for the task's tokens with `layers` layers in each stack, random weights, eager attention."""
    heads = max(width // 32, 1)
    configure: Any = BartConfig  # whose signature does not name attn_implementation
    config = configure(
        vocab_size=len(TOKENS),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=SOURCE_LENGTH + 1,
        dropout=0.0,  # examples are plenty
        pad_token_id=PADDING,
        bos_token_id=START,
        eos_token_id=END,
        decoder_start_token_id=START,
        forced_eos_token_id=None,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BartForConditionalGeneration(config)


class Rewriting:
    """The examples, and a model trained on them in full precision, which stays in teacher.safetensors.

    Args:
        settings: has width, layers, pairs, held_out (examples), batch, teacher_steps, teacher_rate and seed.
        output: the folder of the run.
    """

    def __init__(self, settings: Any, output: Path) -> None:
        self.settings, self.output = settings, output
        self.data = encode(examples(settings.pairs, settings.seed))
        self.questions = examples(settings.held_out, settings.seed, held_out=True)
        self.held_out = encode(self.questions)
        path = output / "teacher.safetensors"
        self.teacher = encoder_decoder(settings.width, settings.layers, settings.seed)
        if path.exists():
            self.teacher.load_state_dict(load_tensors(path), strict=False)  # tied tables are stored once
            self.teacher.tie_weights()
        else:
            loss = SequenceToSequenceDistillation(None, SequenceLossConfig.labels_only())
            self.train(self.teacher, loss, "teacher", settings.teacher_steps, settings.teacher_rate, settings.seed)
            save_tensors(path, dict(self.teacher.named_parameters()))
            shutil.rmtree(output / "teacher", ignore_errors=True)
        self.teacher.eval()

    def train(self, model: Any, loss: Any, name: str, steps: int, rate: float, seed: int) -> None:
        """Train in place; long trainings resume from the folder of that name."""
        config = TrainConfig(
            steps, rate, "linear", warmup_steps=steps // 20, checkpoint_every=100, log_every=10, seed=seed
        )
        batches = BlockBatches(self.data, self.settings.batch, seed=seed)
        folder = self.output / name if steps >= SHORT else None
        fit(model, loss, batches, config, output=folder, label=name, progress=folder is not None)

    def judge(self, subject: str, model: Any) -> list[dict[str, Any]]:
        """Exact match of greedy answers, cross-entropy per token on the right ones, and bytes; of the packed model."""
        model.eval()
        size = stored_bytes(model)["total"]
        if quantized_modules(model):
            convert_(model)
        sources = {name: self.held_out[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            entropy = float(model(**self.held_out).loss)
            answers = decode(model.generate(**sources, max_new_tokens=TARGET_LENGTH, do_sample=False, num_beams=1))
        right = [answer == target for answer, (_, target) in zip(answers, self.questions, strict=True)]
        share, count = sum(right) / len(right), len(right)
        se = (share * (1 - share) / count) ** 0.5
        return [
            {"metric": "exact_match", "value": share, "subject": subject, "se": se, "n": count},
            {"metric": "cross_entropy", "value": entropy, "subject": subject, "n": count, "unit": "nats/token"},
            {"metric": "stored_bytes", "value": float(size), "subject": subject, "unit": "bytes"},
        ]
