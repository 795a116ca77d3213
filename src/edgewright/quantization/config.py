"""What to quantise and how, as frozen data: the same object serves training, calibration and conversion."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

import torch
from torch import nn

from edgewright.checks import Allowed, check, check_fields, one_of, whole
from edgewright.errors import UsageError
from edgewright.quantization.activations import ActivationConfig as ActivationConfig
from edgewright.quantization.grids import GRIDS, Grid, grid_for_bits
from edgewright.quantization.scales import DYNAMIC_RULES, SCALE_RULES
from edgewright.quantization.shards import GRANULARITY

LLAMA_CPP_CODECS = {"q8_0": 8, "q4_0": 4}
KV_GRANULARITY = Allowed(
    "'token', 'head' or a number of entries from 1 up, such as 32",
    lambda value: value in ("token", "head") or (isinstance(value, int) and value >= 1),
)
SCALE_DTYPES: dict[str, torch.dtype | None] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}


@dataclass(frozen=True)
class WeightConfig:
    """Quantisation of one weight matrix.

    Args:
        grid: "binary", "ternary", "seq2", "int2", "int3", "int4" or "int8".
        granularity: one scale per "tensor", per "row" (output channel) or per group of that many consecutive inputs.
        scale: "learned" (trained), "absmax", "full_range", "absmean" or "entropy" (recomputed from the weight at each
            forward; without training this is round-to-nearest) or "mse" (searched once, then fixed).
        initial: where a learned scale starts: "paper" (ParetoQ, arXiv 2502.02631), or one of the rules above.
        scale_dtype: scales are rounded to this type in every forward, "bfloat16", "float16" or "float32". bfloat16 is
            exact in GGUF and in XNNPACK alike.
        official_ternary_grad: the official code's gradient outside the clip range, +-1 instead of +-2/3.
        center: take the sign or the code from the weight minus the mean of its whole matrix, while the scale comes from
            the weight itself (BiT, arXiv 2205.13016); only for scales recomputed at each forward.

    Raises:
        UsageError: an unknown name, a group below 1, center with a stored scale.
    """

    grid: str = "int4"
    granularity: Literal["row", "tensor"] | int = "row"
    scale: str = "learned"
    initial: str = "paper"
    scale_dtype: str = "bfloat16"
    official_ternary_grad: bool = False
    center: bool = False

    def __post_init__(self) -> None:
        rules = {
            "grid": one_of(*GRIDS),
            "granularity": GRANULARITY,
            "scale": one_of(*SCALE_RULES, "learned"),
            "initial": one_of(*SCALE_RULES, "paper"),
            "scale_dtype": one_of(*SCALE_DTYPES),
        }
        check_fields(self, rules)
        if self.center and self.scale not in DYNAMIC_RULES:
            raise UsageError(f"center=True needs a scale recomputed at each forward: {', '.join(DYNAMIC_RULES)}")

    @classmethod
    def for_bits(cls, bits: float, **settings: Any) -> WeightConfig:
        """The grid that ParetoQ (arXiv 2502.02631) found best.

        Args:
            bits: 1, 1.58, 2, 3, 4 or 8.
            settings: the other fields.

        Raises:
            UsageError: another width.
        """
        return cls(grid=grid_for_bits(bits).name, **settings)

    def groups(self, columns: int, layer: str) -> int:
        """Number of scales per row.

        Args:
            columns: weights of a row.
            layer: its name, for the error.

        Raises:
            UsageError: the group does not divide a row.
        """
        if isinstance(self.granularity, str):
            return 1
        if columns % self.granularity:
            raise UsageError(
                f"layer {layer}: its rows of {columns} weights do not divide into groups of {self.granularity}; "
                f"use a divisor such as {largest_divisor(columns, self.granularity)}, or granularity='row'"
            )
        return columns // self.granularity

    @property
    def grid_object(self) -> Grid:
        return GRIDS[self.grid]


class InputConfig(Protocol):
    """How the input of a layer is quantised: frozen data that can build the module which does it."""

    def build(self, layer: str, features: int) -> nn.Module:
        """A module from [..., features] to the same shape, for the layer of that name."""


@dataclass(frozen=True)
class KVConfig:
    """Quantisation of the key-value cache.

    Args:
        bits: 2 to 16; 16 switches it off.
        granularity: one scale per "token" (over all heads), per "head", or per group of that many entries of a head.
        when: before ("pre_rope", LLM-QAT, arXiv 2305.17888) or after ("post_rope", llama.cpp) the rotary embedding.
        codec: "symmetric" (min-max), or "q8_0" / "q4_0": llama.cpp's cache bit for bit (blocks of 32, post_rope).
        scale_dtype: type that the scales of the symmetric codec are rounded to, so that training sees what a cache
            stores: "float16", "bfloat16" or "float32".
        rotate: quantise keys and values after a Hadamard rotation inside each head, as llama.cpp does by default since
            April 2026 when its cache is quantised; heads not of a multiple of 64 stay unrotated, there and here.
        official_clip_grad: 2.0 zeroes the gradient where |x| >= 2, as the official code does; None: the plain identity.

    Raises:
        UsageError: a setting out of its range, or one that the codec does not have.
    """

    bits: int = 8
    granularity: Literal["token", "head"] | int = "token"
    when: Literal["pre_rope", "post_rope"] = "pre_rope"
    codec: Literal["symmetric", "q8_0", "q4_0"] = "symmetric"
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    rotate: bool = False
    official_clip_grad: float | None = None

    def __post_init__(self) -> None:
        rules = {
            "bits": whole(2, 16),
            "granularity": KV_GRANULARITY,
            "when": one_of("pre_rope", "post_rope"),
            "codec": one_of("symmetric", *LLAMA_CPP_CODECS),
            "scale_dtype": one_of(*SCALE_DTYPES),
        }
        check_fields(self, rules)
        bits = LLAMA_CPP_CODECS.get(self.codec)
        if bits and (self.bits, self.granularity, self.when) != (bits, 32, "post_rope"):
            raise UsageError(
                f"KV codec {self.codec} is llama.cpp's cache, {bits} bits in blocks of 32 after the rotary embedding, "
                f"not bits={self.bits}, granularity={self.granularity!r}, when={self.when!r}; use "
                f"KVConfig.llama_cpp({bits})"
            )

    @classmethod
    def llama_cpp(cls, bits: int, rotate: bool = True) -> KVConfig:
        """llama.cpp's own quantised cache: 8 bits (q8_0) or 4 bits (q4_0), blocks of 32, after the rotary embedding.

        Args:
            bits: 4 or 8.
            rotate: False is llama.cpp before April 2026, or with LLAMA_ATTN_ROT_DISABLE=1 in its environment.

        Raises:
            UsageError: other bits.
        """
        check("bits", bits, one_of(*LLAMA_CPP_CODECS.values()), "its quantised caches have 4 or 8 bits")
        codec: Literal["q8_0", "q4_0"] = "q8_0" if bits == 8 else "q4_0"
        return cls(bits=bits, granularity=32, when="post_rope", codec=codec, rotate=rotate)


@dataclass(frozen=True)
class Rule:
    """How some modules are quantised.

    Args:
        pattern: shell wildcards that match their dotted names.
        weight: None leaves the weights.
        activation: None leaves the inputs.
    """

    pattern: str
    weight: WeightConfig | None = None
    activation: InputConfig | None = None


@dataclass(frozen=True)
class QuantConfig:
    """What is quantised: rules by module name, the first match wins.

    Args:
        rules: in order.
        skip: patterns of names that stay as they are.
        kv: quantised cache; None: none.
        tied: what to do when a selected embedding shares its weight with another module: "refuse", quantise both as one
            table ("together"), or "untie" them first.

    Raises:
        UsageError: another `tied`.
    """

    rules: tuple[Rule, ...]
    skip: tuple[str, ...] = ("*embed*", "*lm_head")
    kv: KVConfig | None = None
    tied: Literal["refuse", "together", "untie"] = "refuse"

    def __post_init__(self) -> None:
        check_fields(self, {"tied": one_of("refuse", "together", "untie")})

    @classmethod
    def weights(cls, grid: str, granularity: Literal["row", "tensor"] | int = "row", **settings: Any) -> QuantConfig:
        """All linear layers on one grid; embedding and head stay as they are.

        Args:
            grid: its name.
            granularity: as of WeightConfig.
            settings: further fields of WeightConfig.

        Raises:
            UsageError: a setting that WeightConfig refuses.
        """
        return cls(rules=(Rule("*", WeightConfig(grid, granularity, **settings)),))

    def rule_for(self, name: str) -> Rule | None:
        """The rule that decides about a module.

        Args:
            name: dotted.

        Returns:
            None when it is skipped or no rule matches.
        """
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        return next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def largest_divisor(columns: int, limit: int) -> int:
    """Largest group size up to a limit that divides a row.

    Args:
        columns: weights of the row.
        limit: at least 1.
    """
    return next(size for size in range(min(limit, columns), 0, -1) if columns % size == 0)
