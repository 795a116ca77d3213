"""Distilling a causal language model: a loss function for `edgewright.fit` that runs teacher and student.

    loss_function = LanguageDistillation(teacher)
    fit(student, loss_function, batches, config)

LLM-QAT (arXiv 2305.17888): the teacher is the same model in full precision, its logits are the only target.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgewright.checks import check, number
from edgewright.distillation.logits import DEFAULT_CHUNK, chunked_distillation_loss, target_loss
from edgewright.distillation.targets import DenseTarget, Target, TopKTarget
from edgewright.errors import UsageError

# Families whose logits are exactly head(last hidden state). Others may scale or cap them, so they take the full logits.
PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


class LanguageDistillation:
    """Loss function (model, batch) -> (loss, {"kl": KL to the teacher}); soft cross-entropy per token.

    LLM-QAT (arXiv 2305.17888, section 2.2). batch: token ids [B, T], or a dict with "tokens" [B, T], optionally "mask"
    [B, T] (true where a token counts) and, from a `TeacherCache`, "values", "indices" and "tail": then no teacher is
    needed.

    Args:
        teacher: in evaluation mode, with the student's vocabulary and storage of its own; None: batches of a cache.
        temperature: divides both logits, above 0.
        chunk: tokens whose logits exist at a time.

    Raises:
        UsageError: another temperature. In a call: neither teacher nor cache, or a teacher that does not fit.
    """

    def __init__(
        self, teacher: nn.Module | None = None, *, temperature: float = 1.0, chunk: int = DEFAULT_CHUNK
    ) -> None:
        check("temperature", temperature, number(above=0), "1.0 is the published setting")
        self.teacher, self.temperature, self.chunk = teacher, temperature, chunk
        self._checked: weakref.ref[nn.Module] | None = None

    def __call__(self, model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        parts = {"tokens": batch} if isinstance(batch, Tensor) else dict(batch)
        if "tokens" not in parts:
            raise UsageError(f"a batch needs 'tokens'; it has {', '.join(parts) or 'nothing'}")
        tokens, mask = parts["tokens"], parts.get("mask")
        self._check(model)
        target = self._cached(parts) if "values" in parts else None
        split = split_head(model)
        if split is None:  # unknown structure, or wrapped for distributed training, whose forward must run whole
            logits = model(input_ids=tokens, use_cache=False).logits
            loss, kl = target_loss(logits, target or self._live(tokens), mask=mask, chunk=self.chunk)
            return loss, {"kl": float(kl)}
        base, head = split
        hidden = _hidden(base, tokens)
        loss, kl = chunked_distillation_loss(hidden, head, target or self._live(tokens), mask=mask, chunk=self.chunk)
        return loss, {"kl": float(kl)}

    def _live(self, tokens: Tensor) -> Target:
        """The teacher's answer to these tokens: hidden states where its head can be run chunk by chunk."""
        teacher = self._teacher()
        with torch.no_grad():
            split = split_head(teacher)
            if split is None:
                return DenseTarget(teacher(input_ids=tokens, use_cache=False).logits, self.temperature)
            base, head = split
            return DenseTarget(_hidden(base, tokens), self.temperature, head)

    def _cached(self, parts: Mapping[str, Tensor]) -> Target:
        if self.temperature != 1.0:
            raise UsageError(f"cached teachers hold probabilities at temperature 1, not {self.temperature}")
        return TopKTarget(parts["values"], parts["indices"], parts["tail"])

    def _teacher(self) -> nn.Module:
        if self.teacher is None:
            raise UsageError("no teacher: give LanguageDistillation one, or batches of a TeacherCache")
        check_evaluating(self.teacher)
        return self.teacher

    def _check(self, model: nn.Module) -> None:
        if self.teacher is None or (self._checked is not None and self._checked() is model):
            return
        check_teacher(self.teacher, model)
        self._checked = weakref.ref(model)


def check_evaluating(teacher: nn.Module) -> None:
    """Raise UsageError for a teacher in training mode.

    Args:
        teacher: that is about to answer.
    """
    if teacher.training:
        raise UsageError("the teacher is in training mode, its answers would be noisy; call teacher.eval()")


def check_teacher(teacher: nn.Module, student: nn.Module) -> None:
    """Whether a teacher can teach a student.

    Args:
        teacher, student: language models.

    Raises:
        UsageError: they share parameters' storage or differ in vocabulary.
    """
    vocabularies = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (teacher, student)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise UsageError(
            f"the teacher's vocabulary has {vocabularies[0]} tokens and the student's {vocabularies[1]}; "
            "logits can only be distilled between models of one tokenizer"
        )
    owned = {tensor.untyped_storage().data_ptr(): name for name, tensor in teacher.named_parameters()}
    for name, tensor in student.named_parameters():
        if tensor.untyped_storage().data_ptr() in owned and tensor.numel():
            raise UsageError(
                f"teacher and student share the storage of {name}: the teacher would be trained too; "
                "make the student with copy.deepcopy(teacher)"
            )


def split_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The two parts of a language model.

    Args:
        model: of transformers.

    Returns:
        (base model, head) such that head(base(ids).last_hidden_state) are the logits; None where that is not known.
    """
    if getattr(getattr(model, "config", None), "model_type", None) not in PLAIN_HEADS:
        return None
    base, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    return (base, head) if isinstance(base, nn.Module) and isinstance(head, nn.Module) else None


def _hidden(base: nn.Module, tokens: Tensor) -> Tensor:
    return base(input_ids=tokens, use_cache=False).last_hidden_state
