"""The recipe's task: an encoder-decoder that rewrites numbers and dates, trained and judged by exact match."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import BartConfig, BartForConditionalGeneration

from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.quantization.api import convert_, quantized_modules
from edgewright.quantization.stored_size import stored_bytes
from edgewright.systems.ternary_binary_nlg.distillation import SequenceLossConfig, SequenceToSequenceDistillation
from edgewright.systems.ternary_binary_nlg.written_numbers import (
    END,
    PADDING,
    SOURCE_LENGTH,
    START,
    TARGET_LENGTH,
    TOKENS,
    decode,
    encode,
    examples,
)
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

SHORT = 50  # steps: fewer are repeated after an interruption, which is quicker than keeping checkpoints


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
