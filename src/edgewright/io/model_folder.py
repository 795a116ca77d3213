"""What a folder holds, found out before transformers sees it: a model, an adapter, weights of another quantiser.

Only JSON and headers are read here. Each refusal says what the folder is and what to pass instead.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from edgewright.errors import FormatError, UsageError
from edgewright.io.json_file import read_object
from edgewright.io.safetensors_header import SafetensorsEntry, check_safetensors

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# The names under which transformers finds weights that torch.save wrote.
TORCH_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
LARGEST_PICKLE = 64 << 20  # bytes of the part of such a file that is not tensor data
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises UsageError for a folder without one (an adapter is named as such), FormatError for one that is no model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        _refuse_adapter(folder)
        raise UsageError(f"{folder} has no config.json; pass a folder that save_pretrained wrote, or a .gguf file")
    config = read_object(path)
    if not isinstance(config.get("model_type"), str):
        raise FormatError(f"{path} does not name a model_type")
    return config


def check_unquantized(folder: Path, config: dict[str, Any]) -> None:
    """Raise UsageError for weights that another tool has quantised: their codes would be taken for weights."""
    settings = config.get("quantization_config")
    for name in ("quantize_config.json", "quant_config.json"):  # AutoGPTQ's and AutoAWQ's own files
        if settings is None and (folder / name).is_file():
            settings = read_object(folder / name)
    if settings is None:
        return
    settings = settings if isinstance(settings, dict) else {}
    method = str(settings.get("quant_method") or "another tool")[:40]
    bits = settings.get("bits")
    width = f" to {bits} bits" if isinstance(bits, int) else ""
    raise UsageError(
        f"{folder} holds weights that are quantised already (by {method}{width}); pass the original model in float32, "
        "float16 or bfloat16 that it was made from"
    )


def check_weights(folder: Path) -> dict[str, SafetensorsEntry]:
    """Check the header of every weight file and the index; the tensors, of files of torch.save one for all of them.

    Safetensors are taken where there are any. Otherwise a file of torch.save is taken if it is one that torch's
    weights-only reader maps into memory: it holds tensors, and no code of it runs. Raises UsageError for other pickles
    and for a folder without weights, FormatError for broken files.
    """
    files = sorted(folder.glob("*.safetensors"))
    if files:
        entries = {name: entry for file in files for name, entry in check_safetensors(file).items()}
        _check_index(folder / SAFETENSORS_INDEX, {file.name for file in files})
        return entries
    _refuse_adapter(folder)
    files = [file for pattern in TORCH_WEIGHTS for file in sorted(folder.glob(pattern))]
    if not files:
        others = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
        if others:
            raise UsageError(_pickle(folder, others[0]))
        raise UsageError(f"{folder} has no .safetensors file; pass a folder that save_pretrained wrote")
    for file in files:
        _check_torch_file(folder, file)
    _check_index(folder / TORCH_INDEX, {file.name for file in files})
    size = sum(file.stat().st_size for file in files)
    return {"all": SafetensorsEntry("F16", (size // 2,), 0, size)}  # not more numbers than this


def has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def check_head(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a head of its own beside a configuration that ties it to the table: one of the two would be dropped."""
    from safetensors import safe_open

    if config.get("tie_word_embeddings") is not True:
        return
    names = ("lm_head.weight", "model.embed_tokens.weight")
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            stored |= {name: handle.get_tensor(name) for name in names if name in handle.keys()}  # noqa: SIM118
    if len(stored) == 2 and not torch.equal(*stored.values()):
        raise FormatError(
            f"{folder} says tie_word_embeddings, but {names[0]!r} and {names[1]!r} differ; set it to false, or remove "
            "the head"
        )


def _check_index(path: Path, names: set[str]) -> None:
    if not path.is_file():
        return
    try:
        listed = {str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} is not an index of weight files") from error
    if lost := sorted(listed - names):
        raise FormatError(
            f"{path} names {lost[0][:80]!r}, which is not a {path.name.split('.')[1]} file in this folder"
        )


def _check_torch_file(folder: Path, file: Path) -> None:
    """Only the uncompressed zip of torch >= 1.6 is taken: it is mapped, not unpacked, so it cannot grow in memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UsageError(_pickle(folder, file.name)) from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise FormatError(f"{file} is compressed inside, which torch.save never does; it is not read")
        if entry.filename.endswith(".pkl") and entry.file_size > LARGEST_PICKLE:
            raise FormatError(
                f"{file} has {entry.file_size} bytes beside its tensors; at most {LARGEST_PICKLE} allowed"
            )


def _pickle(folder: Path, name: str) -> str:
    return (
        f"{folder} holds its weights only as {name}, a pickle, which can run any code when it is opened and is not "
        f"read here; where you trust it, let transformers write it again: {again('AutoModelForCausalLM', folder)}"
    )


def again(model_class: str, folder: Path, package: str = "transformers", change: str = "") -> str:
    """A command line that writes a folder, tokenizer included, as a new one that is read here."""
    path = str(folder)
    return (
        f'python -c "from {package} import {model_class} as M; from transformers import AutoTokenizer as T; '
        f"M.from_pretrained({path!r}){change}.save_pretrained('converted'); "
        f"T.from_pretrained({path!r}).save_pretrained('converted')\""
    )


def _refuse_adapter(folder: Path) -> None:
    """An adapter alone is no model; where the base model's weights lie beside it, it is not asked for."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = str(read_object(path).get("base_model_name_or_path") or "its base model")[:120]
    raise UsageError(
        f"{folder} holds an adapter (PEFT) of {base}, not a model; merge the two first, with peft installed: "
        f"{again('AutoPeftModelForCausalLM', folder, 'peft', '.merge_and_unload()')}"
    )
