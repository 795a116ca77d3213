"""Ternary and binary encoder-decoders: which layer gets which quantiser (TBT, arXiv 2306.01841, section 3).

    quantize_encoder_decoder_(model, weight="ternary", activation="ternary")  # BART, mBART, T5, or decoder-only
    fit(model, SequenceToSequenceDistillation(teacher), ...)
    convert_(model)                                         # packed integer weights; generate() works as before

Weights: embedding table and every linear layer by row, with statistics of the row as its scale (rule "entropy").
Activations: the input of every linear layer, and queries, keys, values and probabilities inside attention. The
probabilities and the input of the second feed-forward layer are on the unsigned set, all others on the signed one.
Layer norms, softmax, residuals, position tables, logit biases and the head's input stay in full precision.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from edgewright.checks import check, one_of, whole
from edgewright.errors import UsageError
from edgewright.quantization.api import quantize_, quantized_modules
from edgewright.quantization.attention import AttentionQuantizers, attention_modules, quantize_attention_
from edgewright.quantization.clipped_activation import PUBLISHED_CLIP, ClippedActivationConfig
from edgewright.quantization.config import InputConfig, QuantConfig, Rule, WeightConfig
from edgewright.quantization.elastic import ElasticConfig

UNTOUCHED = (None, 16, 32)  # widths that leave a tensor as it is
SECOND_FEED_FORWARD = ("fc2", "wo")  # BART and its kin, T5; only without a gate, whose output has both signs
Head = Literal["shared", "int8", "fp"]


@dataclass(frozen=True)
class ActivationSet:
    """The pair of quantisers for tensors of both signs and of one.

    Args:
        levels: "binary" and "ternary" are elastic (one learned scale each), a width of 3 to 8 bits is dynamic min-max.
        granularity: whether dynamic ranges and the floor of the ternary unsigned set are taken per "token", or per
            "tensor" as published. deviation: "token" is the default, so that a sentence's result depends neither on its
            batch nor on whether a cache is used.
        clip: where dynamic activations are cut; None: nowhere.
        unsigned: False puts every tensor on the signed set, the baseline which shows why two sets are needed.

    Raises:
        UsageError: other levels.
    """

    levels: Literal["binary", "ternary"] | int = 8
    granularity: Literal["token", "tensor"] = "token"
    clip: float | None = PUBLISHED_CLIP
    unsigned: bool = True

    def __post_init__(self) -> None:
        if self.levels not in ("binary", "ternary"):
            hint = "or say 'binary' or 'ternary' (what papers write as 2 bits)"
            check("activation levels", self.levels, whole(3, 8), hint)

    def signed_config(self) -> InputConfig:
        """For tensors of both signs."""
        if isinstance(self.levels, int):
            return ClippedActivationConfig(self.levels, self.clip, self.granularity)
        return ElasticConfig(self.levels, shift=False)

    def unsigned_config(self, probabilities: bool = False) -> InputConfig:
        """For tensors of one sign.

        Args:
            probabilities: they are those of attention, whose floor is zero.
        """
        if not self.unsigned:
            return self.signed_config()
        if isinstance(self.levels, int):
            return ClippedActivationConfig(self.levels, self.clip, self.granularity, symmetric=False)
        floor: Any = "zero" if probabilities and self.granularity == "token" else self.granularity
        return ElasticConfig(self.levels, signed=False, shift=False, floor=floor)


def quantize_encoder_decoder_(
    model: Any,
    weight: Literal["ternary", "binary"] | WeightConfig | int | None = "ternary",
    activation: ActivationSet | Literal["ternary", "binary"] | int | None = None,
    head: Head = "shared",
    embedding: Literal["low", "int8", "fp"] = "low",
) -> PreTrainedModel:
    """Put a transformers model under TBT's quantisation, in place; returns it.

    Nothing is changed where all is left alone.

    Args:
        model: an encoder-decoder (BART, mBART, Marian, T5) or a decoder-only model.
        weight: "ternary" or "binary" with statistics as scales, or a WeightConfig of your own (other rules); None, 16
            or 32 leave weights alone.
        activation: "ternary", "binary", a width of 3 to 8 bits or an ActivationSet; None, 16 or 32 leave activations
            alone. A width is cut at 2.5 in encoder-decoders and not at all in decoder-only models.
        head: "shared" uses the quantised table for logits too (its own table on the same grid where the model has none
            to share), "int8" gives it a table of 8 bits, "fp" multiplies by the latent table in full precision, as the
            official class does: that is then shipped as well.
        embedding: "low" as the other weights, "int8" or "fp".

    Returns:
        The model.

    Raises:
        UsageError: an ambiguous width, a model under quantisation, a model without input embeddings.
    """
    grid = _weight_config(weight)
    acts = _activation_set(activation, bool(getattr(model.config, "is_encoder_decoder", False)))
    check("head", head, one_of("shared", "int8", "fp"))
    check("embedding", embedding, one_of("low", "int8", "fp"))
    if grid is None and acts is None:
        return model
    if quantized_modules(model) or any(hasattr(m, "attention_quantizers") for _, m in attention_modules(model)):
        raise UsageError("the model is under quantisation already; start from a float model")
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    if table is None:
        raise UsageError(f"{type(model).__name__} has no input embeddings; give a model with a text decoder")
    latent, eight = table.weight, _eight_bits(table.weight)
    tied = output is not None and output.weight is latent
    table_grid = {"low": grid, "int8": eight, "fp": None}[embedding] if grid else None
    head_grid = {"shared": table_grid if tied else grid, "int8": eight, "fp": None}[head] if grid else None
    own_head = tied and grid is not None and head != "shared"
    if own_head:  # break the tie first: quantize_ would treat both as one table
        output.weight = nn.Parameter(latent.detach().clone(), requires_grad=latent.requires_grad)

    rules = []
    for name, module in model.named_modules():
        if module is output:
            rules.append(Rule(name, head_grid))
        elif isinstance(module, nn.Embedding):
            rules.append(Rule(name, table_grid if module.weight is latent else None))
        elif isinstance(module, nn.Linear):
            rules.append(Rule(name, grid, _input_config(acts, model, name)))
    _flag_zero_rows(model, rules)
    quantize_(model, QuantConfig(tuple(rules), skip=(), tied="together"))
    if own_head and head == "fp":
        model.get_output_embeddings().weight = latent
    elif own_head:
        model.config.tie_word_embeddings = False
    if acts is not None:
        quantize_attention_(model, lambda name, module: _attention_quantizers(acts, name))
    return model


def _weight_config(weight: WeightConfig | str | int | None) -> WeightConfig | None:
    if isinstance(weight, WeightConfig):
        return weight
    if weight in UNTOUCHED and not isinstance(weight, bool):
        return None
    check("weight", weight, one_of("ternary", "binary", None), "'ternary' is what papers write as 2 bits")
    return WeightConfig(str(weight), "row", scale="entropy")


def _activation_set(activation: ActivationSet | str | int | None, encoder_decoder: bool) -> ActivationSet | None:
    if isinstance(activation, ActivationSet):
        return activation
    if activation in UNTOUCHED and not isinstance(activation, bool):
        return None
    levels: Any = activation
    return ActivationSet(levels, clip=PUBLISHED_CLIP if encoder_decoder else None)


def _eight_bits(table: Tensor) -> WeightConfig:
    """Groups of 32 where they fit, which GGUF's Q8_0 holds as they are."""
    return WeightConfig("int8", 32 if table.shape[1] % 32 == 0 else "row", scale="absmax", scale_dtype="float16")


def _input_config(acts: ActivationSet | None, model: nn.Module, name: str) -> InputConfig | None:
    """The set for the input of a linear layer: unsigned behind an activation function that stands alone."""
    if acts is None:
        return None
    parent, _, child = name.rpartition(".")
    gated = hasattr(model.get_submodule(parent), "wi_1")
    return acts.unsigned_config() if child in SECOND_FEED_FORWARD and not gated else acts.signed_config()


def _attention_quantizers(acts: ActivationSet, name: str) -> AttentionQuantizers:
    signed, width = acts.signed_config(), 0  # neither set has values that depend on the number of features
    return AttentionQuantizers(
        query=signed.build(f"{name}.query", width),
        key=signed.build(f"{name}.key", width),
        value=signed.build(f"{name}.value", width),
        probabilities=acts.unsigned_config(probabilities=True).build(f"{name}.probabilities", width),
    )


def _flag_zero_rows(model: Any, rules: list[Rule]) -> None:
    """Warn about rows of zeros on the binary grid, which has no zero; the row of the padding token is no loss."""
    table = model.get_input_embeddings()
    for rule in rules:
        if rule.weight is None or rule.weight.grid != "binary":
            continue
        weight = model.get_submodule(rule.pattern).weight
        zero = (weight.detach() == 0).all(1)
        if weight is table.weight and table.padding_idx is not None:
            zero[table.padding_idx] = False
        if bool(zero.any()):
            count = int(zero.sum())
            warnings.warn(f"{rule.pattern}: {count} rows are zero and become 1e-5 on the binary grid", stacklevel=3)
