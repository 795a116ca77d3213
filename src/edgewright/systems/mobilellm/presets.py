"""Published shapes of the MobileLLM family as configurations, by name.

MobileLLM (arXiv 2402.14905), R1 (2509.24945), Pro (2511.06719) and Flash (2603.15954).
Only shapes: the published weights have a licence of their own.
"""

from __future__ import annotations

from typing import Any

from edgewright.errors import UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig

# name -> layers, hidden, query heads, key heads, feed-forward
SHAPES = {
    "125M": (30, 576, 9, 3, 1536),
    "350M": (32, 960, 15, 5, 2560),
    "600M": (40, 1152, 18, 6, 3072),
    "1B": (54, 1280, 20, 5, 3584),
    "1.5B": (54, 1600, 25, 5, 4352),
    "r1-140M": (15, 576, 9, 3, 2048),
    "r1-360M": (15, 1024, 16, 4, 4096),
    "r1-950M": (22, 1536, 24, 6, 6144),
    "pro-1B": (30, 1280, 20, 4, 6144),
    "flash-350M": (12, 1024, 32, 8, 4096),
    "flash-650M": (13, 1280, 32, 8, 6144),
    "flash-1.4B": (16, 2048, 32, 8, 8192),
}
VOCABULARY = {"r1": 128_256, "pro": 202_048, "flash": 202_048}  # 32,000 elsewhere
FULL_IN_FLASH = {"350M": (0, 1, 3, 6, 7, 9, 11), "650M": (0, 2, 3, 5, 7, 8, 9, 10), "1.4B": tuple(range(16))}
HEAD = 64
PRO_WINDOW = 512
PRO_GLOBAL = (*range(0, 30, 4), 29)  # one layer in four and the last; deviation: the paper does not list them


def mobilellm_config(name: str, layer_sharing: bool = False, **changes: Any) -> EdgeDecoderConfig:
    """The configuration of a published model of the MobileLLM family.

    Args:
        name: "125M" to "1.5B", "r1-140M", "pro-1B", "flash-350M" and so on, a key of SHAPES.
        layer_sharing: every stored block runs twice in a row, MobileLLM-LS (arXiv 2402.14905, section 2.3).
        changes: fields of EdgeDecoderConfig to set otherwise, such as vocab_size.

    Returns:
        The configuration, for `new_decoder`.

    Raises:
        UsageError: an unknown name.
    """
    family, _, size = name.rpartition("-")
    if name not in SHAPES:
        raise UsageError(f"no shape is called {name!r}; there are {', '.join(SHAPES)}, moe-S, moe-M, moe-L")
    layers, hidden, heads, groups, feed_forward = SHAPES[name]
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY.get(family, 32000),
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": HEAD,
    }
    if family == "r1":
        settings |= {"qk_norm": "l2", "rope_interleaved": True, "max_position_embeddings": 4096}
        settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
    if family == "pro":
        mixers = ["full_attention" if i in PRO_GLOBAL else "sliding_attention" for i in range(layers)]
        settings |= {"mixers": mixers, "sliding_window": PRO_WINDOW, "max_position_embeddings": 131_072}
        settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
    if family == "flash":
        mixers = ["full_attention" if i in FULL_IN_FLASH[size] else "skip_attention" for i in range(layers)]
        settings |= {"mixers": mixers, "max_position_embeddings": 8192}
        settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
    settings |= changes
    if layer_sharing:
        stored = settings["num_hidden_layers"]
        settings["share_map"] = [block for block in range(stored) for _ in range(2)]
        settings["num_hidden_layers"] = 2 * stored
        if isinstance(once := settings.get("mixers"), list):
            settings["mixers"] = [mixer for mixer in once for _ in range(2)]
    return EdgeDecoderConfig(**settings)
