"""What an edge decoder is made of: for every executed layer a mixer, a feed-forward, and the stored block it runs.

MobileLLM (arXiv 2402.14905) and its kin differ in these choices alone. The configuration is a transformers
`PreTrainedConfig`, so that models made from it save, load and generate like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from edgewright.checks import check, one_of, whole
from edgewright.errors import UsageError
from edgewright.io.typed import check_fields

MIXERS = ("full_attention", "sliding_attention", "skip_attention", "longhorn")
FEED_FORWARDS = ("mlp", "moe", "stem", "none")
QK_NORMS = ("none", "l2", "rms")
# The names under which transformers' caches know our mixers: "moe" is its word for a layer that keeps nothing.
CACHE_TYPES = {"skip_attention": "moe", "longhorn": "linear_attention"}
ATTENTION = ("full_attention", "sliding_attention")


class EdgeDecoderConfig(PreTrainedConfig):
    """Shape of an `EdgeDecoderForCausalLM`. A per-layer list has one entry for every executed layer.

    Attributes:
        vocab_size: rows of the token table.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward layers, one number or a list.
        num_hidden_layers: executed layers, which is also the number of cache slots.
        num_attention_heads: one number or a list.
        num_key_value_heads: one number or a list; None: as many as heads.
        head_dim: None: hidden_size / heads.
        mixers: of MIXERS (also taken as `layer_types`), one name for all layers or a list.
        ffn_types: of FEED_FORWARDS, one name for all layers or a list.
        share_map: executed layer -> stored block, the identity by default; [0, 0, 1, 1] runs each of two stored blocks
            twice in a row (MobileLLM, arXiv 2402.14905, section 3.4).
        qk_norm: "none", "l2" (weightless, as in Llama 4) or "rms" (weighted, before the rotation, as in Qwen3).
        qkv_bias: biases of the three input projections.
        rope_parameters: as in transformers.
        rope_interleaved: rows of q and k in pairs (Llama 4 checkpoints) instead of halves.
        sliding_window: tokens that a sliding_attention layer sees.
        moe: fields of MoEConfig, where there are such layers.
        stem: fields of StemConfig, where there are such layers.
        longhorn: fields of LonghornConfig, where there are such layers.
        hidden_act: activation of the feed-forward layers, as transformers names it.
        max_position_embeddings: positions that the model is trained on.
        initializer_range: standard deviation of initial weights.
        rms_norm_eps: of the norms.
        use_cache: whether generation keeps keys and values.
        tie_word_embeddings: one table for tokens and head.
        pad_token_id: None where there is none.
        bos_token_id: None where there is none.
        eos_token_id: one or several that end a text.

    Raises:
        UsageError: naming the field, for anything that cannot be built.
    """

    model_type = "edgewright_decoder"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 576
    intermediate_size: int | list[int] = 1536
    num_hidden_layers: int | None = None
    num_attention_heads: int | list[int] = 9
    num_key_value_heads: int | list[int] | None = None
    head_dim: int | None = None
    mixers: str | list[str] | None = None
    ffn_types: str | list[str] = "mlp"
    share_map: list[int] | None = None
    qk_norm: str = "none"
    qkv_bias: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_interleaved: bool = False
    sliding_window: int | None = None
    moe: dict[str, Any] | None = None
    stem: dict[str, Any] | None = None
    longhorn: dict[str, Any] | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    if not hasattr(PreTrainedConfig, "__post_init__"):  # before 5.4 a configuration was no dataclass

        def __init__(self, **kwargs: Any) -> None:
            own = {name: kwargs.pop(name, getattr(type(self), name)) for name in EdgeDecoderConfig.__annotations__}
            vars(self).update({name: value for name, value in own.items() if name != "rope_parameters"})
            self.rope_parameters = own["rope_parameters"]
            self.__post_init__(**kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        if (given := kwargs.pop("layer_types", None)) is not None and self.mixers is None:
            self.mixers = given
        check_fields(EdgeDecoderConfig, self)
        self._fill_in()
        self._check()
        if hasattr(PreTrainedConfig, "__post_init__"):
            super().__post_init__(**kwargs)
        else:
            given = ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
            super().__init__(**{name: getattr(self, name) for name in given} | kwargs)

    def _fill_in(self) -> None:
        """Make every per-layer choice a list of one entry for each executed layer."""
        if self.num_hidden_layers is None:
            lists = (self.share_map, self.mixers, self.ffn_types)
            self.num_hidden_layers = next((len(x) for x in lists if isinstance(x, list | tuple)), 30)
        count = self.num_hidden_layers
        check("num_hidden_layers", count, whole(1))
        self.share_map = list(range(count)) if self.share_map is None else list(self.share_map)
        self.mixers = _per_layer("mixers", self.mixers or "full_attention", count)
        self.ffn_types = _per_layer("ffn_types", self.ffn_types, count)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
            value = getattr(self, name)
            if not isinstance(value, int):  # one number stays one, which is what others read it as
                setattr(self, name, _per_layer(name, value, count))
        if self.head_dim is None:
            heads = self.of_layer("num_attention_heads", 0)
            if heads < 1 or self.hidden_size % heads:
                raise UsageError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; set head_dim"
                )
            self.head_dim = self.hidden_size // heads

    def _check(self) -> None:
        assert isinstance(self.mixers, list) and isinstance(self.ffn_types, list) and self.share_map is not None
        for name in ("vocab_size", "hidden_size", "head_dim", "max_position_embeddings"):
            check(name, getattr(self, name), whole(1))
        for mixer in self.mixers:
            check("mixers", mixer, one_of(*MIXERS))
        for kind in self.ffn_types:
            check("ffn_types", kind, one_of(*FEED_FORWARDS))
        check("qk_norm", self.qk_norm, one_of(*QK_NORMS))
        if self.head_dim % 2:  # type: ignore[operator]
            raise UsageError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs of numbers")
        if "sliding_attention" in self.mixers:
            if self.sliding_window is None:
                raise UsageError("sliding_window is not set, but mixers has 'sliding_attention'")
            check("sliding_window", self.sliding_window, whole(1))
        for layer in range(len(self.mixers)):
            if self.ffn_types[layer] == "mlp":
                check("intermediate_size", self.of_layer("intermediate_size", layer), whole(1))
            if self.mixers[layer] in ATTENTION:
                heads, groups = (self.of_layer(n, layer) for n in ("num_attention_heads", "num_key_value_heads"))
                if groups < 1 or heads < 1 or heads % groups:
                    raise UsageError(
                        f"layer {layer}: num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}"
                    )
        for kind in ("moe", "stem"):
            if kind in self.ffn_types and getattr(self, kind) is None:
                raise UsageError(f"{kind} is not set, but ffn_types has {kind!r}")
        if self.ffn_types[0] == "stem" and not (self.stem or {}).get("allow_first"):
            raise UsageError("ffn_types[0] is 'stem'; layer 0 stays dense, or set stem={'allow_first': True}")
        self._check_share_map()

    def _check_share_map(self) -> None:
        assert self.share_map is not None
        if len(self.share_map) != self.num_hidden_layers:
            raise UsageError(
                f"share_map has {len(self.share_map)} entries for num_hidden_layers={self.num_hidden_layers}"
            )
        stored = self.num_stored_layers
        if set(self.share_map) != set(range(min(stored, len(self.share_map) + 1))):
            raise UsageError(f"share_map={self.share_map} must name every stored block from 0 to {stored - 1}")
        for layer, block in enumerate(self.share_map):
            first = self.share_map.index(block)
            if self.layer_shape(layer) != self.layer_shape(first):
                raise UsageError(f"share_map runs block {block} as layers {first} and {layer}, which differ in shape")

    @property
    def num_stored_layers(self) -> int:
        """Blocks that have weights of their own."""
        assert self.share_map is not None
        return max(self.share_map) + 1

    @property
    def layer_types(self) -> list[str]:
        """The mixers in transformers' own words, from which its caches and masks are made."""
        assert isinstance(self.mixers, list)
        return [CACHE_TYPES.get(mixer, mixer) for mixer in self.mixers]

    def of_layer(self, name: str, layer: int) -> int:
        """The entry of an executed layer in a field that is one number or a list.

        Args:
            name: of the field.
            layer: of the executed layer, from 0.

        Returns:
            The number.
        """
        value = getattr(self, name)
        return value if isinstance(value, int) else value[layer]

    def layer_shape(self, layer: int) -> tuple[Any, ...]:
        """What a stored block must have in common with each layer that runs it."""
        assert isinstance(self.mixers, list) and isinstance(self.ffn_types, list)
        sizes = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
        mixer = "attention" if self.mixers[layer] in ATTENTION else self.mixers[layer]  # the window is no weight
        return (mixer, self.ffn_types[layer], *(self.of_layer(name, layer) for name in sizes))


def _per_layer(name: str, value: Any, count: int) -> list[Any]:
    if isinstance(value, str | int):
        return [value] * count
    if not isinstance(value, Sequence) or len(value) != count:
        length = len(value) if isinstance(value, Sequence) else repr(value)
        raise UsageError(f"{name} has {length} entries for num_hidden_layers={count}; give one value or one a layer")
    return list(value)
