"""Hugging Face folders: `save_quantized` keeps the codes, `save_dequantized` makes an ordinary checkpoint.

A quantised folder is read back by `edgewright.load` to the same bits; a dequantised one by any AutoModel, with the same
logits as the packed model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.io.atomic import atomic_directory
from edgewright.io.packed import PackedConv2d, PackedEmbedding, PackedLinear, PackedStack, PackedTensor
from edgewright.io.quantized_folder import FORMAT, QUANTIZATION_KEY, WEIGHTS, pack_grid, tied_parameters
from edgewright.io.tensors import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Packed = PackedLinear | PackedEmbedding | PackedStack


def save_quantized(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write a converted model with its codes in 1, 2, 4 or 8 bits; `edgewright.load(folder)` gives the same bits back.

    Args:
        model: with packed layers, as `convert_` leaves it.
        tokenizer: saved beside it.
        folder: made, or replaced where it holds such a model already.

    Returns:
        The folder.

    Raises:
        UsageError: a model without packed layers.
        Unsupported: layers that the folder cannot describe.
        OutputError: the folder cannot be written; nothing is left of it then.
    """
    packed = packed_modules(model)
    if not packed:
        raise UsageError("the model has no packed layer; call convert_(model) first, or model.save_pretrained(folder)")
    state: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    shared: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in packed.items():
        owner = owners.setdefault(module.codes.data_ptr(), name)
        if owner != name:
            shared[name] = owner
            continue
        value = module.packed
        kind = "embedding" if isinstance(module, PackedEmbedding) else "linear"
        modules[name] = {"kind": kind, "grid": value.grid, "shape": list(value.codes.shape)}
        if isinstance(module, PackedStack):
            modules[name] |= {"kind": "stack", "count": module.count, "group_axis": module.group_axis}
        state[f"{name}.codes"] = pack_grid(value.codes.detach().cpu(), value.grid)
        state[f"{name}.step"] = _smallest_exact(value)
    state |= _other_tensors(model, packed)
    _save(model, tokenizer, folder, state, {QUANTIZATION_KEY: {"format": FORMAT, "modules": modules, "shared": shared}})
    return Path(folder)


def save_dequantized(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write an ordinary checkpoint with the values of a converted model, in the dtype it computes with.

    Tables that the packed model shares stay shared. Raises as `save_quantized`.
    """
    packed = packed_modules(model)
    dtype = model_dtype(model)
    tied = tied_parameters(model)
    state: dict[str, Tensor] = {}
    for name, module in packed.items():
        source = tied.get(f"{name}.weight", "").removesuffix(".weight")
        if source in packed and _same_table(module, packed[source]):
            continue
        key = name if isinstance(module, PackedStack) else f"{name}.weight"
        state[key] = module.weight.detach().cpu().to(dtype).contiguous()
    state |= _other_tensors(model, packed)
    apart = [name for name, source in tied.items() if name in state and source in state]
    _save(model, tokenizer, folder, state, {"tie_word_embeddings": False} if apart else {})
    return Path(folder)


def packed_modules(model: nn.Module) -> dict[str, Packed]:
    """Name -> packed layer, embeddings first so that a head that shares a table comes after its owner.

    Raises Unsupported for packed convolutions and for layers still under quantisation.
    """
    found: dict[str, Packed] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedConv2d) or (
            isinstance(module, nn.Linear | nn.Embedding) and getattr(module, "quantizer", None) is not None
        ):
            raise Unsupported(
                f"layer {name} is a {type(module).__name__}; only converted linear and embedding layers are saved"
            )
        if isinstance(module, Packed):
            found[name] = module
    return dict(sorted(found.items(), key=lambda item: isinstance(item[1], PackedLinear)))


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the parameters that were not quantised: what the model computes with."""
    floats = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(floats, torch.float32)


def _same_table(first: Packed, second: Packed) -> bool:
    same: bool = first.codes.data_ptr() == second.codes.data_ptr() and torch.equal(first.step, second.step)
    return same


def _smallest_exact(packed: PackedTensor) -> Tensor:
    """The steps in bfloat16, else float16, where that is exact; else as they are."""
    step = packed.step.detach().cpu()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(step.to(dtype).float(), step):
            return step.to(dtype).contiguous()
    return step.contiguous()


def _other_tensors(model: nn.Module, packed: Mapping[str, Packed]) -> dict[str, Tensor]:
    """Everything but codes and steps, each storage once: of tied names, the one that the model class ties to."""
    tied = tied_parameters(model)
    skip = {f"{name}.{buffer}" for name in packed for buffer in ("codes", "step")}
    values = {name: value.detach() for name, value in model.state_dict().items() if name not in skip}
    result: dict[str, Tensor] = {}
    for name, value in values.items():
        source = values.get(tied.get(name, ""))
        if source is None or source.data_ptr() != value.data_ptr():
            result[name] = value.cpu().contiguous().clone()
    return result


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    state: dict[str, Tensor],
    extra: dict[str, Any],
) -> None:
    with atomic_directory(folder) as temporary:
        save_tensors(temporary / WEIGHTS, state, {"format": "pt"})
        settings = json.loads(model.config.to_json_string(use_diff=True))
        settings |= {"architectures": [type(model).__name__], "dtype": str(model_dtype(model)).removeprefix("torch.")}
        text = json.dumps(settings | extra, indent=2, ensure_ascii=False) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
