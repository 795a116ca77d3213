"""BiT: a transformer encoder whose weights, activations and attention probabilities are all of one bit.

    binarize_encoder_(model, BitConfig(activation_bits=2))     # W1A2: train it, then
    binarize_encoder_(model, BitConfig(activation_bits=1))     # W1A1 from the same weights, scales started anew
    pack_binary_(model)                           # words of 64 signs, see linear.py

Source: BiT, arXiv 2205.13016. Two sets: {-1, +1} for tensors of both signs (inputs of q, k, v, o and of the first
feed-forward layer; q, k, v themselves), {0, 1} for those never negative (attention probabilities; the input of the
second feed-forward layer, after GELU gave way to ReLU). Position and type embeddings, norms, biases and task heads stay
in float.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from edgewright.checks import check, check_fields, one_of
from edgewright.errors import Unsupported, UsageError
from edgewright.quantization.api import quantize_, quantized_modules
from edgewright.quantization.attention import ATTENTION_NAME, AttentionQuantizers, quantize_attention_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.quantization.elastic import ElasticConfig, ElasticQuantizer
from edgewright.quantization.layers import QuantEmbedding, QuantLinear

FLOAT = 32


@dataclass(frozen=True)
class EncoderFamily:
    """Where the parts of an encoder are. Patterns are of dotted names; the first set that matches decides.

    activation: (end of the name of the module that holds the feed-forward activation, its attribute).
    """

    signed: tuple[str, ...]
    unsigned: tuple[str, ...]
    words: str
    attention: str
    activation: tuple[str, str]
    activation_setting: str


BERT = EncoderFamily(
    signed=(
        "*encoder.layer.*.attention.self.query",
        "*encoder.layer.*.attention.self.key",
        "*encoder.layer.*.attention.self.value",
        "*encoder.layer.*.attention.output.dense",
        "*encoder.layer.*.intermediate.dense",
        "*pooler.dense",
    ),
    unsigned=("*encoder.layer.*.output.dense",),
    words="*embeddings.word_embeddings",
    attention="*encoder.layer.*.attention.self",
    activation=(".intermediate", "intermediate_act_fn"),
    activation_setting="hidden_act",
)
DISTILBERT = EncoderFamily(
    signed=(
        *(f"*transformer.layer.*.attention.{name}_lin" for name in ("q", "k", "v", "out")),
        "*transformer.layer.*.ffn.lin1",
    ),
    unsigned=("*transformer.layer.*.ffn.lin2",),
    words="*embeddings.word_embeddings",
    attention="*transformer.layer.*.attention",
    activation=(".ffn", "activation"),
    activation_setting="activation",
)
FAMILIES = {"bert": BERT, "roberta": BERT, "distilbert": DISTILBERT}


@dataclass(frozen=True)
class BitConfig:
    """What of an encoder becomes how many bits; 32 leaves a part alone, and 32 / 32 the whole model.

    Args:
        weight_bits: 1 or 32.
        activation_bits: 1, or 2 to 8 for the students on the way there, or 32.
        embeddings: word embeddings become binary too, one scale a token.
        pooler: the pooler's linear layer becomes binary too.
        two_sets: False is the sign everywhere, with GELU kept, as binary BERTs before BiT had it.
        shift: learned thresholds (beta of arXiv 2205.13016, section 3.3).
        learn_scale: False freezes the activations' scales (alpha) at their start.
        official_qkv_shift: no thresholds on q, k, v, as in the official code, which computes them and then overwrites
            the result.
        sets: (name pattern, "signed" | "unsigned" | "float") to decide otherwise for the inputs of some layers.
        check: refuse negative inputs of the {0, 1} set by the layer's name.

    Raises:
        UsageError: a field breaks its rule.
    """

    weight_bits: int = 1
    activation_bits: int = 1
    embeddings: bool = True
    pooler: bool = True
    two_sets: bool = True
    shift: bool = True
    learn_scale: bool = True
    official_qkv_shift: bool = False
    sets: tuple[tuple[str, str], ...] = ()
    check: bool = False

    def __post_init__(self) -> None:
        check_fields(self, {"weight_bits": one_of(1, FLOAT), "activation_bits": one_of(*range(1, 9), FLOAT)})
        for pattern, kind in self.sets:
            check(f"BitConfig sets {pattern!r}", kind, one_of("signed", "unsigned", "float"))

    def elastic(self, signed: bool, shift: bool = True) -> ElasticConfig:
        """The quantiser of one activation.

        Args:
            signed: of {-1, 1}, or else of {0, 1} where there are two sets.
            shift: it may have thresholds.
        """
        levels: Any = "binary" if self.activation_bits == 1 else self.activation_bits
        unsigned = self.two_sets and not signed
        return ElasticConfig(levels, not unsigned, shift and self.shift, self.check, self.learn_scale)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as `save_binary` writes them."""
        return asdict(self)


def binarize_encoder_(model: nn.Module, config: BitConfig | None = None) -> nn.Module:
    """Turn a BERT-like encoder of transformers into a BiT student, in place.

    A model that is one already is taken apart first: it keeps its float weights and its thresholds and gets new scales.
    Scales of activations start from the first batch: let 16 sentences or more through before training.

    Args:
        model: BERT, RoBERTa or DistilBERT.
        config: what becomes how many bits, by default 1 / 1. With 32 / 32 the model is left exactly as it was.

    Returns:
        The model.

    Raises:
        Unsupported: a decoder, or a family that is not known.
        UsageError: the embedding is tied to the output layer, or a pattern of `sets` matches nothing.
    """
    config = config or BitConfig()
    family = family_of(model)
    thresholds = _take_apart(model)
    linears = dict(_inputs(model, family, config))
    rules = _rules(model, family, config, linears)
    if rules:
        quantize_(model, QuantConfig(rules=rules, skip=()))
    if config.activation_bits < FLOAT:
        if config.two_sets:
            _rectify(model, family)
        _quantize_attention(model, family, config)
    device = next(model.parameters()).device
    for name, module in model.named_modules():
        if isinstance(module, ElasticQuantizer):
            module.to(device)
            if module.shift is not None and name in thresholds:
                module.shift.data.copy_(thresholds[name])
    return model


def family_of(model: nn.Module) -> EncoderFamily:
    """How the model's class names its parts; raises Unsupported for decoders and for families that are not known."""
    settings: Any = getattr(model, "config", None)
    kind = getattr(settings, "model_type", type(model).__name__)
    if kind not in FAMILIES or getattr(settings, "is_decoder", False):
        decoder = getattr(settings, "is_decoder", False) or "CausalLM" in type(model).__name__
        advice = (
            "decoders take quantize_(model, QuantConfig.weights('binary')), or the system ternary-binary-nlg"
            if decoder
            else f"it knows the encoders {', '.join(FAMILIES)}"
        )
        raise Unsupported(f"binarize_encoder_ cannot binarise {type(model).__name__} ({kind}): {advice}")
    return FAMILIES[kind]


def parameter_groups(
    model: nn.Module, learning_rate: float, *, scale_rate: float = 1e-4, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Optimizer groups of the paper: matrices with decay, scales with their own rate, the rest without decay.

    Args:
        model: of `binarize_encoder_`.
        learning_rate: of weights, biases and thresholds.
        scale_rate: of the activations' scales; 1e-4 in the official code.
        weight_decay: of matrices.

    Returns:
        Groups as torch.optim takes them, without empty ones.
    """
    scales = {id(m.alpha): m.alpha for m in model.modules() if isinstance(m, ElasticQuantizer)}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in scales]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "lr": learning_rate, "weight_decay": 0.0},
        {"params": [p for p in scales.values() if p.requires_grad], "lr": scale_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def elastic_quantizers(model: nn.Module) -> list[tuple[str, ElasticQuantizer]]:
    """(name, quantiser) of every activation of the model, in model order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ElasticQuantizer)]


def _inputs(model: nn.Module, family: EncoderFamily, config: BitConfig) -> Iterator[tuple[str, str]]:
    """(name, set of its input) of every linear layer that becomes binary."""
    known = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern, _ in config.sets:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UsageError(f"sets: {pattern!r} matches no linear layer; there are names such as {known[0]}")
    for name in known:
        if not config.pooler and name.endswith("pooler.dense"):
            continue
        asked = next((kind for pattern, kind in config.sets if fnmatchcase(name, pattern)), None)
        if any(fnmatchcase(name, pattern) for pattern in family.signed):
            yield name, asked or "signed"
        elif any(fnmatchcase(name, pattern) for pattern in family.unsigned):
            yield name, asked or "unsigned"


def _rules(model: nn.Module, family: EncoderFamily, config: BitConfig, linears: dict[str, str]) -> tuple[Rule, ...]:
    """One rule a layer, by its full name."""
    # Scales stay float32: one a tensor or a token row costs next to nothing, and no GGUF type holds them anyway.
    shared: dict[str, Any] = {"scale": "absmean", "center": True, "scale_dtype": "float32"}
    weight = WeightConfig("binary", "tensor", **shared) if config.weight_bits == 1 else None
    rules = []
    for name, kind in linears.items():
        wanted = config.activation_bits < FLOAT and kind != "float"
        activation = config.elastic(kind == "signed") if wanted else None
        if weight or activation:
            rules.append(Rule(name, weight, activation))
    if weight and config.embeddings:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and fnmatchcase(name, family.words):
                if head is not None and head.weight is module.weight:
                    raise UsageError(f"{name} is tied to the output layer; take the model without that head")
                rules.append(Rule(name, WeightConfig("binary", "row", **shared)))
    return tuple(rules)


def _rectify(model: Any, family: EncoderFamily) -> None:
    """Replace the feed-forward activation, so that what follows is never negative."""
    end, attribute = family.activation
    for name, module in model.named_modules():
        if name.endswith(end) and hasattr(module, attribute):
            setattr(module, attribute, nn.ReLU())
    setattr(model.config, family.activation_setting, "relu")


def _quantize_attention(model: Any, family: EncoderFamily, config: BitConfig) -> None:
    before = getattr(model.config, "_attn_implementation", None)
    if before not in (None, "eager", ATTENTION_NAME):
        warnings.warn(f"attention {before!r} has no place for 1-bit probabilities: switched to eager", stacklevel=3)

    def build(name: str, module: nn.Module) -> AttentionQuantizers | None:
        if not fnmatchcase(name, family.attention):
            return None
        width = next(m.out_features for m in module.children() if isinstance(m, nn.Linear))  # of q, k and v alike
        parts: dict[str, nn.Module] = {}
        for part in ("query", "key", "value"):
            quantizer = config.elastic(True, not config.official_qkv_shift).build(f"{name}.{part}", width)
            parts[part] = _Heads(quantizer)
        parts["probabilities"] = config.elastic(False, shift=False).build(f"{name}.probabilities", 0)
        return AttentionQuantizers(**parts)

    quantize_attention_(model, build)


class _Heads(nn.Module):
    """A quantiser of [B, T, heads * D] applied to [B, heads, T, D]: thresholds belong to features, not to heads."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.shape[1]
        return self.quantizer(x.transpose(1, 2).flatten(2)).unflatten(-1, (heads, -1)).transpose(1, 2)


def _take_apart(model: Any) -> dict[str, torch.Tensor]:
    """Give a BiT student its ordinary layers with their float weights back; returns its thresholds by name."""
    thresholds = {name: q.shift.detach().clone() for name, q in elastic_quantizers(model) if q.shift is not None}
    for name, module in quantized_modules(model):
        plain: nn.Module
        with torch.device("meta"):
            if isinstance(module, QuantLinear):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
                plain.bias = module.bias
            elif isinstance(module, QuantEmbedding):
                plain = nn.Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx)
            else:
                raise Unsupported(f"{name} is a {type(module).__name__}, which no encoder has")
        plain.weight = module.weight
        model.set_submodule(name, plain.train(module.training))
    attended = False
    for module in model.modules():
        if isinstance(getattr(module, "attention_quantizers", None), AttentionQuantizers):
            del module.attention_quantizers
            attended = True
    if attended:
        model.set_attn_implementation("eager")
    return thresholds
