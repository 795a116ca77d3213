"""Distilling an encoder-decoder into a quantised copy: labels, logits, hidden states and all attention maps at once.

    total = task * CE(labels) + logits * CE_soft + features * (MSE(encoder attention) + MSE(decoder self-attention)
            + MSE(cross-attention) + MSE(encoder states) + MSE(encoder's last state) + MSE(decoder states))

TBT, arXiv 2306.01841, section 3.3; every MSE is summed over layers. Decoder-only models have no encoder and no cross-
attention, and those terms vanish.
deviation: padding is masked, and means are over samples where the official code sums them over the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, check_fields, number, one_of
from edgewright.distillation.features import attention_loss, hidden_loss
from edgewright.distillation.language import check_evaluating, check_teacher
from edgewright.distillation.logits import distillation_loss
from edgewright.errors import UsageError

IGNORED = -100  # label of a position that does not count
PUBLISHED_TEACHER_LAYERS = 6
PUBLISHED_MAPS: dict[int, tuple[int, ...]] = {
    1: (5,),
    2: (0, 5),
    3: (0, 2, 5),
    4: (0, 2, 3, 5),
    5: (0, 1, 3, 4, 5),
    6: (0, 1, 2, 3, 4, 5),
}
LayerMap = Literal["even", "published"] | tuple[int, ...]


@dataclass(frozen=True)
class SequenceLossConfig:
    """Weights of the three parts, and which attention maps take part.

    Args:
        task: weight of the task's own loss, at least 0; the official default is 1, as of the other two.
        logits: weight of the teacher's logits.
        features: weight of hidden states and attention; not all three are 0.
        attention: any of "encoder", "decoder" (self) and "cross".
        encoder_map: "even" spreads the student's layers over the teacher's, "published" is the table for a
            teacher of six, a tuple names a teacher layer for each.
        decoder_map: the same for the decoder.

    Raises:
        UsageError: a weight below 0, none above 0, or another attention.
    """

    task: float = 1.0
    logits: float = 1.0
    features: float = 1.0
    attention: tuple[str, ...] = ("encoder", "decoder", "cross")
    encoder_map: LayerMap = "even"
    decoder_map: LayerMap = "even"

    def __post_init__(self) -> None:
        check_fields(self, dict.fromkeys(("task", "logits", "features"), number(0)))
        if self.task + self.logits + self.features == 0:
            raise UsageError("SequenceLossConfig task, logits and features are 0; one or more must be above 0")
        for part in self.attention:
            check("SequenceLossConfig attention", part, one_of("encoder", "decoder", "cross"))

    @classmethod
    def weighted(cls, **settings: Any) -> SequenceLossConfig:
        """The official preset with weights 1, 0.8 and 3.

        Args:
            settings: the other fields.
        """
        return cls(task=1.0, logits=0.8, features=3.0, **settings)

    @classmethod
    def labels_only(cls) -> SequenceLossConfig:
        """No teacher: the ablation."""
        return cls(logits=0.0, features=0.0)


def layer_map(kind: LayerMap, student_layers: int) -> tuple[int, ...] | None:
    """The map that the feature losses take; None means even. Raises UsageError for a depth the table lacks."""
    if kind == "even":
        return None
    if kind != "published":
        return tuple(kind)
    check("layers of the student", student_layers, one_of(*PUBLISHED_MAPS), "layer_map='even' serves every depth")
    return PUBLISHED_MAPS[student_layers]


class SequenceToSequenceDistillation:
    """Loss function (model, batch) -> (loss, {"task", "logits", "features"}) for `edgewright.fit`.

    TBT (arXiv 2306.01841), section 3.3. batch: "input_ids" [B, S], "labels" [B, T] with -100 where nothing counts, and
    optionally "attention_mask" [B, S] and whatever else the model's forward takes. Labels of an encoder-decoder align
    with its logits; those of a decoder-only model are its input ids (-100 where masked) and are shifted here.

    Attention maps exist only in eager attention: where a model runs another kind that term is left out, with one
    warning and a line in `notes`.

    Args:
        teacher: in evaluation mode, with the student's vocabulary; None: labels alone.
        config: None: weights of 1.

    Raises:
        UsageError: no teacher for a loss that needs one. In a call: a teacher in training mode, of another vocabulary
            or with the student's storage; a map to a layer that the teacher lacks; a batch of which no label counts.
    """

    def __init__(self, teacher: nn.Module | None, config: SequenceLossConfig | None = None) -> None:
        self.teacher, self.config = teacher, config or SequenceLossConfig()
        self.notes: list[str] = []
        self._checked = False
        if self.teacher is None and self.config.logits + self.config.features > 0:
            raise UsageError("no teacher: give one, or SequenceLossConfig.labels_only()")

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if "input_ids" not in batch or "labels" not in batch:
            raise UsageError(f"a batch needs 'input_ids' and 'labels'; it has {', '.join(batch) or 'nothing'}")
        config = self.config
        encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        inputs = self._inputs(model, batch, encoder_decoder)
        student = model(**inputs)
        labels, logits = batch["labels"], student.logits
        if not encoder_decoder:
            labels, logits = labels[:, 1:], logits[:, :-1]
        counted = labels != IGNORED
        if not bool(counted.any()):
            raise UsageError(f"every label is {IGNORED}; at least one position must count")
        parts = {"task": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)}
        loss = config.task * parts["task"]
        if self.teacher is not None and config.logits + config.features > 0:
            target = self._answer(model, inputs)
            reference = target.logits if encoder_decoder else target.logits[:, :-1]
            if config.logits:
                parts["logits"] = distillation_loss(logits, reference, mask=counted)
                loss = loss + config.logits * parts["logits"]
            if config.features:
                tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0
                parts["features"] = self._features(student, target, tokens, counted, encoder_decoder)
                loss = loss + config.features * parts["features"]
        return loss, {name: value.detach() for name, value in parts.items()}

    def _inputs(self, model: nn.Module, batch: Mapping[str, Tensor], encoder_decoder: bool) -> dict[str, Any]:
        """What both models are called with: the decoder's input comes from the labels, features where wanted."""
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
        if encoder_decoder and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = _shift_right(batch["labels"], model.config)
        features = bool(self.config.features) and self.teacher is not None
        maps = features and bool(self.config.attention) and self._maps_exist(model)
        return {**inputs, "use_cache": False, "output_hidden_states": features, "output_attentions": maps}

    @torch.no_grad()
    def _answer(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        assert self.teacher is not None
        check_evaluating(self.teacher)
        if not self._checked:
            check_teacher(self.teacher, model)
            self._checked = True
        return self.teacher(**inputs)

    def _maps_exist(self, student: nn.Module) -> bool:
        """Whether both models compute attention maps; if not, say so once."""
        for who, model in (("student", student), ("teacher", self.teacher)):
            kind = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
            if kind in ("sdpa", "flex_attention") or "flash" in str(kind):
                note = f"the {who} runs {kind} attention, which gives no maps: attention is not distilled; "
                note += f"call {who}.set_attn_implementation('eager') to have it"
                if note not in self.notes:
                    self.notes.append(note)
                    warnings.warn(note, stacklevel=4)
                return False
        return True

    def _features(self, student: Any, teacher: Any, source: Tensor, target: Tensor, encoder_decoder: bool) -> Tensor:
        """Source [B, S], target [B, T]: true where a token of the encoder's, the decoder's sequence counts."""
        chosen = self.config.attention
        if not encoder_decoder:
            rule = layer_map(self.config.decoder_map, len(student.hidden_states) - 1)
            states = student.hidden_states, teacher.hidden_states
            total = hidden_loss(*states, mask=source, layer_map=rule)
            if "decoder" in chosen and student.attentions:
                total = total + attention_loss(student.attentions, teacher.attentions, mask=source, layer_map=rule)
            return total
        encoder = layer_map(self.config.encoder_map, len(student.encoder_hidden_states) - 1)
        decoder = layer_map(self.config.decoder_map, len(student.decoder_hidden_states) - 1)
        last = [student.encoder_last_hidden_state], [teacher.encoder_last_hidden_state]
        total = hidden_loss(
            student.encoder_hidden_states, teacher.encoder_hidden_states, mask=source, layer_map=encoder
        )
        total = total + hidden_loss(*last, mask=source, layer_map=())
        total = total + hidden_loss(
            student.decoder_hidden_states, teacher.decoder_hidden_states, mask=target, layer_map=decoder
        )
        maps = (
            ("encoder", "encoder_attentions", source, encoder),
            ("decoder", "decoder_attentions", target, decoder),
            ("cross", "cross_attentions", target, decoder),
        )
        for name, field, mask, rule in maps:
            attention: Sequence[Tensor] | None = getattr(student, field)
            if name in chosen and attention:
                total = total + attention_loss(attention, getattr(teacher, field), mask=mask, layer_map=rule)
        return total


def _shift_right(labels: Tensor, config: Any) -> Tensor:
    """Decoder input: the start token, then the labels but the last; what does not count becomes padding."""
    start = config.decoder_start_token_id
    if start is None:
        raise UsageError(
            "the model's config has no decoder_start_token_id; set it, or put decoder_input_ids in batches"
        )
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)
