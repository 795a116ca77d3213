"""What to quantise and how, as frozen data: the same object serves training, calibration and conversion."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

import torch
from torch import nn

from edgewright.errors import UsageError
from edgewright.quantization.activations import ActivationConfig as ActivationConfig
from edgewright.quantization.grids import Grid, grid_for_bits, grid_named
from edgewright.quantization.scales import DYNAMIC_RULES, SCALE_RULES

SCALE_DTYPES: dict[str, torch.dtype | None] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}


@dataclass(frozen=True)
class WeightConfig:
    """Quantisation of one weight matrix.

    grid: "binary" | "ternary" | "seq2" | "int2" | "int3" | "int4" | "int8".
    granularity: one step per "tensor", per "row" (output channel) or per group of that many consecutive inputs.
    scale: "learned" (trained), "absmax", "full_range", "absmean" or "entropy" (recomputed from the weight at each
        forward; without training this is round-to-nearest) or "mse" (searched once, then fixed).
    initial: where a learned scale starts: "paper", or one of the rules above.
    center: take the sign or the code from the weight minus the mean of its whole matrix, while the step comes from the
        weight itself (BiT, arXiv 2205.13016); only for scales recomputed at each forward.
    scale_dtype: steps are rounded to this type in every forward. bfloat16 is exact in GGUF and in XNNPACK alike.
    """

    grid: str = "int4"
    granularity: Literal["row", "tensor"] | int = "row"
    scale: str = "learned"
    initial: str = "paper"
    scale_dtype: str = "bfloat16"
    official_ternary_grad: bool = False
    center: bool = False

    def __post_init__(self) -> None:
        grid_named(self.grid)
        if self.scale not in (*SCALE_RULES, "learned"):
            raise UsageError(f"unknown scale rule {self.scale!r}; the rules are {', '.join(SCALE_RULES)}, learned")
        if self.initial not in (*SCALE_RULES, "paper"):
            raise UsageError(f"unknown initial scale {self.initial!r}; choose paper, {', '.join(SCALE_RULES)}")
        if self.center and self.scale not in DYNAMIC_RULES:
            raise UsageError(f"center=True needs a scale recomputed at each forward: {', '.join(DYNAMIC_RULES)}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise UsageError(f"unknown scale_dtype {self.scale_dtype!r}; choose one of {', '.join(SCALE_DTYPES)}")
        if isinstance(self.granularity, str):
            if self.granularity not in ("row", "tensor"):
                raise UsageError(f"granularity={self.granularity!r}; choose 'row', 'tensor' or a group size such as 32")
        elif self.granularity < 1:
            raise UsageError(f"granularity={self.granularity}; a group holds at least one weight, for example 32")

    @classmethod
    def for_bits(cls, bits: float, **settings: Any) -> WeightConfig:
        """The grid that ParetoQ found best at 1, 1.58, 2, 3, 4 or 8 bits."""
        return cls(grid=grid_for_bits(bits).name, **settings)

    def groups(self, columns: int, layer: str) -> int:
        """Number of steps per row. Raises UsageError naming the layer when the group does not divide its rows."""
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
        return grid_named(self.grid)


class InputConfig(Protocol):
    """How the input of a layer is quantised: frozen data that can build the module which does it."""

    def build(self, layer: str, features: int) -> nn.Module:
        """A module from [..., features] to the same shape, for the layer of that name."""


@dataclass(frozen=True)
class KVConfig:
    """Quantisation of the key-value cache.

    granularity: one scale per "token" (over all heads), per "head", or per group of that many entries of a head.
    when: before ("pre_rope", LLM-QAT) or after ("post_rope", llama.cpp) the rotary embedding of the keys.
    codec: "symmetric" (min-max), or "q8_0" / "q4_0": llama.cpp's cache bit for bit (blocks of 32, post_rope).
    scale_dtype: type that the scales of the symmetric codec are rounded to, so that training sees what a cache stores.
    rotate: quantise keys and values after a Hadamard rotation inside each head, as llama.cpp does by default since
        April 2026 when its cache is quantised; heads not of a multiple of 64 stay unrotated, there and here.
    official_clip_grad: 2.0 zeroes the gradient where |x| >= 2, as the official code does; None is the plain identity.
    """

    bits: int = 8
    granularity: Literal["token", "head"] | int = "token"
    when: Literal["pre_rope", "post_rope"] = "pre_rope"
    codec: Literal["symmetric", "q8_0", "q4_0"] = "symmetric"
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    rotate: bool = False
    official_clip_grad: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise UsageError(f"KV bits={self.bits}; choose an integer from 2 to 16 (16 switches it off)")
        if self.codec not in ("symmetric", "q8_0", "q4_0"):
            raise UsageError(f"KV codec={self.codec!r}; choose symmetric, q8_0 or q4_0")
        if self.when not in ("pre_rope", "post_rope"):
            raise UsageError(f"KV when={self.when!r}; choose pre_rope or post_rope")
        if self.scale_dtype not in SCALE_DTYPES:
            raise UsageError(f"KV scale_dtype={self.scale_dtype!r}; choose one of {', '.join(SCALE_DTYPES)}")
        if self.granularity not in ("token", "head") and not (
            isinstance(self.granularity, int) and self.granularity >= 1
        ):
            raise UsageError(f"KV granularity={self.granularity!r}; choose 'token', 'head' or a group size such as 32")
        if self.codec != "symmetric":
            if self.bits != {"q8_0": 8, "q4_0": 4}[self.codec]:
                raise UsageError(f"KV codec {self.codec} has {self.codec[1]} bits, not {self.bits}")
            if self.when != "post_rope":
                raise UsageError(f"KV codec {self.codec} is llama.cpp's cache, which stores keys post_rope")
            if self.granularity != 32:
                raise UsageError(
                    f"KV codec {self.codec} has blocks of 32, not granularity={self.granularity!r}; "
                    f"use KVConfig.llama_cpp({self.bits})"
                )

    @classmethod
    def llama_cpp(cls, bits: int, rotate: bool = True) -> KVConfig:
        """llama.cpp's own quantised cache: 8 bits (q8_0) or 4 bits (q4_0), blocks of 32, after the rotary embedding.

        rotate=False is llama.cpp before April 2026, or with LLAMA_ATTN_ROT_DISABLE=1 in its environment.
        """
        if bits not in (4, 8):
            raise UsageError(f"llama.cpp's quantised caches have 4 or 8 bits, not {bits}")
        codec: Literal["q8_0", "q4_0"] = "q8_0" if bits == 8 else "q4_0"
        return cls(bits=bits, granularity=32, when="post_rope", codec=codec, rotate=rotate)


@dataclass(frozen=True)
class Rule:
    """Modules whose dotted name matches `pattern` (shell wildcards) get this treatment."""

    pattern: str
    weight: WeightConfig | None = None
    activation: InputConfig | None = None


@dataclass(frozen=True)
class QuantConfig:
    """Rules by module name, the first match wins.

    skip: names that stay as they are. kv: quantised cache, or None. tied: what to do when a selected embedding shares
    its weight with another module: "refuse", quantise both as one table ("together"), or "untie" them first.
    """

    rules: tuple[Rule, ...]
    skip: tuple[str, ...] = ("*embed*", "*lm_head")
    kv: KVConfig | None = None
    tied: Literal["refuse", "together", "untie"] = "refuse"

    def __post_init__(self) -> None:
        if self.tied not in ("refuse", "together", "untie"):
            raise UsageError(f"tied={self.tied!r}; choose 'refuse', 'together' or 'untie'")

    @classmethod
    def weights(cls, grid: str, granularity: Literal["row", "tensor"] | int = "row", **settings: Any) -> QuantConfig:
        """All linear layers on one grid; embedding and head stay as they are."""
        return cls(rules=(Rule("*", WeightConfig(grid, granularity, **settings)),))

    def rule_for(self, name: str) -> Rule | None:
        """The rule that decides about a module, or None when it is skipped or no rule matches."""
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        return next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def largest_divisor(columns: int, limit: int) -> int:
    """Largest group size up to `limit` that divides `columns`."""
    return next(size for size in range(min(limit, columns), 0, -1) if columns % size == 0)
