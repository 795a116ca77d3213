"""Hugging Face folders of quantised models: how codes and steps lie in safetensors, and `load_quantized`.

config.json is the model's own plus the key "edgewright_quantization":
    {"format": 1,
     "modules": {"model.layers.0.mlp.up_proj": {"kind": "linear", "grid": "int4", "shape": [out, in]}, ...},
     "shared": {"lm_head": "model.embed_tokens"}}
In model.safetensors a quantised module has "<name>.codes" (uint8; codes minus the lowest code, in 1, 2, 4 or 8 bits
each, row after row, lowest bits first) and "<name>.step" [out, groups]; the rest is stored as transformers names it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, in_one_line
from edgewright.io.bits import pack_codes, unpack_codes
from edgewright.io.config_bounds import check_numbers
from edgewright.io.expert_stacks import put_stack
from edgewright.io.foreign import load_tokenizer
from edgewright.io.json_file import read_json
from edgewright.io.own_forward import keeping_forward
from edgewright.io.packed import CODE_RANGES, PackedEmbedding, PackedLinear, PackedStack, PackedTensor
from edgewright.io.safetensors_header import SafetensorsEntry, check_safetensors
from edgewright.io.tensors import load_tensors
from edgewright.protocols import HasWeightStacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTIZATION_KEY = "edgewright_quantization"
FORMAT = 1
WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 64 << 20
KINDS = {"linear": nn.Linear, "embedding": nn.Embedding}
STEP_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# Bits that a code takes in the file: the next power of two that holds the grid.
CODE_BITS = {"binary": 1, "ternary": 2, "seq2": 2, "int2": 2, "int3": 4, "int4": 4, "int8": 8}


def pack_grid(codes: Tensor, grid: str) -> Tensor:
    """uint8 [ceil(out * in * bits / 8)] of int8 codes [out, in]."""
    numbers = codes.reshape(-1).to(torch.int16).sub_(CODE_RANGES[grid][0])
    if grid == "binary":
        numbers = numbers.div_(2, rounding_mode="floor")
    return pack_codes(numbers, CODE_BITS[grid])


def unpack_grid(packed: Tensor, grid: str, shape: tuple[int, int]) -> Tensor:
    """int8 codes [out, in] from `pack_grid`. Raises FormatError for numbers that no code of the grid has."""
    low, high, _ = CODE_RANGES[grid]
    numbers = unpack_codes(packed, CODE_BITS[grid], shape[0] * shape[1]).to(torch.int16)
    codes = (numbers.mul_(2) if grid == "binary" else numbers).add_(low).to(torch.int8).reshape(shape)
    if int(codes.max()) > high:
        raise FormatError(f"a {grid} matrix holds the code {int(codes.max())}; the largest is {high}")
    return codes


def load_quantized(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `edgewright.export.save_quantized` wrote, with the same codes and steps, and its tokenizer.

    dtype: of everything that is not quantised, and of the activations. Raises FormatError for a description that
    contradicts the weights or the model, UsageError for a folder that cannot be read.
    """
    folder = Path(folder)
    modules, shared, settings = read_description(folder)
    entries = check_safetensors(folder / WEIGHTS)
    check_numbers(folder / "config.json", settings, entries)
    model = _skeleton(folder, settings, dtype)
    _check_description(folder, model, modules, shared, entries)
    stored = load_tensors(folder / WEIGHTS)
    for name, fields in modules.items():
        step = stored.pop(f"{name}.step").float()
        if not torch.isfinite(step).all():
            raise FormatError(f"{folder}: the steps of {name} hold NaN or infinity")
        packed = PackedTensor(
            unpack_grid(stored.pop(f"{name}.codes"), fields["grid"], tuple(fields["shape"])), step, fields["grid"]
        )
        _put(model, name, packed, dtype, fields)
    for name, source in shared.items():
        owner: Any = model.get_submodule(source)
        _put(model, name, owner.packed, dtype)
    _fill(folder, model, stored, dtype)
    tokenizer = load_tokenizer(folder)
    nn.Module.to(model, device)
    return model.eval(), tokenizer


def read_description(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, Any]]:
    """(modules, shared, config settings without the description) of a quantised folder, shape of the JSON checked."""
    path = folder / "config.json"
    settings = read_json(path, MAX_CONFIG_BYTES)
    description = settings.pop(QUANTIZATION_KEY, None) if isinstance(settings, dict) else None
    if not isinstance(description, dict):
        raise FormatError(f"{path} has no {QUANTIZATION_KEY!r}; load it with edgewright.load(folder)")
    if description.get("format") != FORMAT:
        raise FormatError(
            f"{path}: {QUANTIZATION_KEY} has format {description.get('format')!r}; this version reads {FORMAT}"
        )
    modules, shared = description.get("modules"), description.get("shared", {})
    if not isinstance(modules, dict) or not isinstance(shared, dict):
        raise FormatError(f"{path}: {QUANTIZATION_KEY} needs tables 'modules' and 'shared'")
    for name, fields in modules.items():
        shape = fields.get("shape") if isinstance(fields, dict) else None
        sizes = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)
        kind, grid = (fields.get("kind"), fields.get("grid")) if sizes else (None, None)
        if kind == "stack" and (fields.get("group_axis") not in ("in", "out") or type(fields.get("count")) is not int):
            raise FormatError(f"{path}: the stack {name[:80]!r} needs a count of matrices and a group_axis (in, out)")
        if kind not in (*KINDS, "stack") or grid not in tuple(CODE_RANGES):
            raise FormatError(
                f"{path}: module {name[:80]!r} needs kind (linear, embedding, stack), a known grid, a shape [out, in]"
            )
    if not all(isinstance(source, str) for source in shared.values()):
        raise FormatError(f"{path}: 'shared' maps names of modules to names of modules")
    return modules, shared, settings


def _skeleton(folder: Path, settings: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights."""
    import transformers
    from transformers import AutoConfig

    names = settings.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    factory = getattr(transformers, name, None)
    if not (isinstance(factory, type) and issubclass(factory, transformers.PreTrainedModel)):
        raise FormatError(f"{folder} names the model class {name[:60]!r}, which transformers does not have")
    settings = {key: value for key, value in settings.items() if key not in ("auto_map", "dtype", "torch_dtype")}
    try:
        config = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            model: PreTrainedModel = factory(config)
    except Exception as error:  # a configuration from outside makes model classes raise whatever they like
        reason = in_one_line(error)
        raise FormatError(f"{folder}: its config.json does not describe a {name}: {reason}") from error
    model.config.dtype = dtype
    return model


def _check_description(
    folder: Path,
    model: nn.Module,
    modules: dict[str, dict[str, Any]],
    shared: dict[str, str],
    entries: dict[str, SafetensorsEntry],
) -> None:
    """Every described module is in the model with that shape, and its codes and steps are in the file."""
    known: dict[str, Any] = dict(model.named_modules())
    for name, fields in modules.items():
        rows, columns = fields["shape"]
        if fields["kind"] == "stack":
            fits = _has_stack(known.get(name.rpartition(".")[0]), name.rpartition(".")[2], fields)
        else:
            fits = isinstance(known.get(name), KINDS[fields["kind"]]) and known[name].weight.shape == (rows, columns)
        if not fits:
            raise FormatError(
                f"{folder}: the model has no {fields['kind']} layer {name[:80]!r} of shape {[rows, columns]}"
            )
        codes, step = entries.get(f"{name}.codes"), entries.get(f"{name}.step")
        if codes is None or step is None:
            raise FormatError(f"{folder}: the codes or steps of {name} are missing in {WEIGHTS}")
        count = math.ceil(rows * columns * CODE_BITS[fields["grid"]] / 8)
        if codes.dtype != "U8" or codes.shape != (count,):
            raise FormatError(f"{folder}: the codes of {name} are {codes.dtype} {list(codes.shape)}, not U8 [{count}]")
        fits = len(step.shape) == 2 and step.shape[0] == rows and step.shape[1] > 0 and columns % step.shape[1] == 0
        if step.dtype not in STEP_DTYPES or not fits:
            raise FormatError(
                f"{folder}: the steps of {name} are {step.dtype} {list(step.shape)}, not [{rows}, groups]"
            )
    for name, source in shared.items():
        if source not in modules or name in modules or not isinstance(known.get(name), tuple(KINDS.values())):
            raise FormatError(f"{folder}: {name[:80]!r} cannot share the table of {source[:80]!r}")
        if list(known[name].weight.shape) != modules[source]["shape"]:
            raise FormatError(f"{folder}: {name} has another shape than {source}, whose table it should share")


def _has_stack(owner: nn.Module | None, name: str, fields: dict[str, Any]) -> bool:
    """Whether the owner has a parameter of that name and of the described stack's shape."""
    stack = None if owner is None else owner._parameters.get(name)
    count, (rows, columns) = fields["count"], fields["shape"]
    if stack is None or stack.ndim != 3 or count < 1 or rows % count:
        return False
    lines = (rows // count, columns)
    return tuple(stack.shape) == (count, *(lines if fields["group_axis"] == "in" else lines[::-1]))


def _put(
    model: nn.Module, name: str, packed: PackedTensor, dtype: torch.dtype, fields: dict[str, Any] | None = None
) -> None:
    """Replace a layer of the skeleton by its packed form; a bias is filled in later with the other floats."""
    if fields is not None and fields["kind"] == "stack":
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        stack = PackedStack(packed, fields["count"], fields["group_axis"])
        if not isinstance(owner, HasWeightStacks):
            put_stack(owner, child, stack)
        else:
            delattr(owner, child)
            setattr(owner, child, stack)
        return
    old = model.get_submodule(name)
    new: nn.Module
    if isinstance(old, nn.Embedding):
        new = PackedEmbedding(packed, old.padding_idx, dtype)
    else:
        new = PackedLinear(packed, old.bias)  # type: ignore[arg-type]
    model.set_submodule(name, keeping_forward(old, new))


def _fill(folder: Path, model: PreTrainedModel, stored: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Put the stored floats into the model and compute what transformers computes instead of storing."""
    stored = {name: value.to(dtype) if value.is_floating_point() else value for name, value in stored.items()}
    aliases = {
        name: source
        for name, source in tied_parameters(model).items()
        if name not in stored
        and source in stored
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), PackedLinear)
    }
    stored |= {name: stored[source] for name, source in aliases.items()}
    quantized = {
        f"{name}.{buffer}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedLinear | PackedEmbedding | PackedStack)
        for buffer in ("codes", "step")
    }
    try:
        missing, unexpected = model.load_state_dict(stored, strict=False, assign=True)
    except RuntimeError as error:
        raise FormatError(f"{folder}: {in_one_line(error)}") from error
    if lost := sorted(set(missing) - quantized):
        raise FormatError(f"{folder} lacks {len(lost)} weights of its model, the first is {lost[0]!r}")
    if unexpected:
        raise FormatError(f"{folder} has the tensor {sorted(unexpected)[0][:80]!r}, which its model has no place for")
    if aliases:
        model.tie_weights()
    recompute_buffers(model, folder)


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Parameter -> the parameter whose tensor it shares, as the model class declares it."""
    declared = getattr(model, "_tied_weights_keys", None)
    tie = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return dict(declared) if isinstance(declared, dict) and tie else {}


def recompute_buffers(model: Any, source: Path) -> None:
    """Compute on the CPU what a model built without memory has no values for: buffers that are not stored."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            _recompute(source, model, name, module)


def _initialised(model: PreTrainedModel, module: nn.Module, key: str) -> bool:
    """Whether the model's own rule for new weights computes this buffer, such as Gemma's scale of the token table."""
    meta = module._buffers[key]
    assert meta is not None
    fresh = torch.full_like(meta, math.nan, device="cpu") if meta.is_floating_point() else None
    if fresh is None:
        return False
    module._buffers[key] = fresh
    tensors: list[Any] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    for tensor in tensors:
        tensor._is_hf_initialized = tensor is not fresh
    model._init_weights(module)
    return bool(torch.isfinite(fresh).all())


def _recompute(folder: Path, model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Rebuild a module whose buffers are derived from the configuration (rotary frequencies, position ids)."""
    if hasattr(module, "inv_freq"):
        model.set_submodule(name, type(module)(config=model.config))  # type: ignore[call-arg]
        return
    for key, buffer in list(module.named_buffers(recurse=False)):
        if key in ("position_ids", "token_type_ids"):
            length = buffer.shape[-1]
            fresh = torch.arange(length) if key == "position_ids" else torch.zeros(length, dtype=buffer.dtype)
            module.register_buffer(key, fresh.expand(buffer.shape).clone(), persistent=False)
        elif buffer.is_meta and not _initialised(model, module, key):
            raise FormatError(f"{folder}: the buffer {name}.{key} of its model is not stored and cannot be computed")
