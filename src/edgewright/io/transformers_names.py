"""The names in transformers that changed between 5.0 and the newest version, each looked up once, in one place.

5.24 renamed the cache of a forward from `past_key_values` to `cache`, in arguments and outputs; 5.2 split the decorator
of a model's forward in two and renamed `input_embeds` of the mask makers. Old names still work for a while, but warn.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

from edgewright.errors import Unsupported, UsageError

CACHE_NAMES = ("cache", "past_key_values")  # newest first


def named_cache(function: Callable[..., Any]) -> str | None:
    """The name under which `function` takes a cache, None where it takes none."""
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


@functools.cache
def cache_name() -> str:
    """What this version's `generate` calls the cache that it hands to a model and reads from the model's output."""
    from transformers import GenerationMixin

    return named_cache(GenerationMixin.prepare_inputs_for_generation) or CACHE_NAMES[0]


def version() -> str:
    """Of transformers."""
    return importlib.metadata.version("transformers")


def has_model_type(kind: str) -> bool:
    """Whether this version of transformers has models of that model_type; registered ones count."""
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def config_of(kind: str, **settings: Any) -> Any:
    """A configuration of that model_type. Raises Unsupported where this version of transformers has none."""
    from transformers import AutoConfig

    if not has_model_type(kind):
        raise Unsupported(f"{kind} models need a newer transformers than {version()}; pip install -U transformers")
    return AutoConfig.for_model(kind, **settings)


def with_cache(cache: Any) -> dict[str, Any]:
    """`model(tokens, **with_cache(cache))`: the keyword argument that takes a cache in this version."""
    return {cache_name(): cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where there is none."""
    return getattr(output, cache_name(), None)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache of a forward that takes both names. Raises UsageError when both were given."""
    if cache is not None and past_key_values is not None:
        raise UsageError("cache and past_key_values are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


def mask(
    make: Callable[..., Any],
    *,
    config: Any,
    embeddings: Any,
    attention_mask: Any,
    cache: Any,
    positions: Any,
    **more: Any,
) -> Any:
    """Call a mask maker of `transformers.masking_utils`.

    Args:
        make: `create_causal_mask` or `create_sliding_window_causal_mask`.
        config: of the model.
        embeddings: [B, T, hidden].
        attention_mask: [B, S] of real tokens, or None.
        cache: of the model, or None.
        positions: int64 [B or 1, T], the place of each token behind what the cache holds.
        more: other arguments, such as `and_mask_function`.
    """
    import torch

    takes = inspect.signature(make).parameters
    arguments = {"config": config, "attention_mask": attention_mask, "position_ids": positions, **more}
    arguments["inputs_embeds" if "inputs_embeds" in takes else "input_embeds"] = embeddings
    arguments[named_cache(make) or cache_name()] = cache
    if "cache_position" in takes:
        seen = cache.get_seq_length() if cache is not None else 0
        arguments["cache_position"] = torch.arange(embeddings.shape[1], device=embeddings.device) + seen
    return make(**arguments)


def records_outputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a base model's forward: `use_cache` from the configuration, hidden states and attention maps."""
    try:
        from transformers.utils.generic import merge_with_config_defaults
        from transformers.utils.output_capturing import capture_outputs
    except ImportError:  # before 5.2
        from transformers.utils.generic import check_model_inputs

        return check_model_inputs(forward)  # type: ignore[no-any-return]
    return merge_with_config_defaults(capture_outputs(forward))  # type: ignore[no-any-return]


def attention_function(name: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function of that name; `eager` for the name "eager"."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]
    return eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]


def cache_room(cache: Any) -> int:
    """Most tokens that a cache can hold, -1 without a limit."""
    longest = getattr(cache, "get_max_length", None) or cache.get_max_cache_shape
    try:
        return int(longest())
    except AttributeError:  # a cache of states alone, in some versions
        return -1


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass instead of keeping them, in a model of transformers."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
