"""`edgewright.load`: one call for a Hugging Face folder, a GGUF file, a bundled name or a hub id.

Only safetensors and GGUF are read, and only after their headers were checked; no pickle, no code from the model.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgewright.errors import FormatError, MissingPackage, Unsupported, UsageError
from edgewright.io.bundled import BUNDLED, bundled_path
from edgewright.io.config_bounds import check_claim, check_numbers
from edgewright.io.foreign import check_json_files, load_tokenizer, reading
from edgewright.io.safetensors_header import SafetensorsEntry, check_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What is fetched for a hub id: configuration, tokenizer and safetensors, never pickles or code.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Installed packages, this one first, name the module that makes transformers know a model_type.
PLUGINS = "edgewright_models"
QUANTIZATION_KEY = "edgewright_quantization"


def load(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers model in evaluation mode and its tokenizer.

    model: a folder with config.json and safetensors, a .gguf file, a bundled name (see `io.bundled`), or a hub id
    "org/name", the only case in which anything is downloaded. Folders of causal language models give their causal
    class, others (sentence encoders) the bare model.

    Raises UsageError for a model that cannot be found, FormatError for a broken file or weights that are not finite,
    Unsupported for an architecture not known here, MissingPackage for a bundled model that is not installed.
    """
    if model == "efficientnet-lite0":
        raise UsageError(
            "efficientnet-lite0 is an image classifier without a tokenizer; load it with "
            "edgewright.vision.efficientnet_lite.load_efficientnet_lite0()"
        )
    path = find_model(model)
    if path.is_dir():
        loaded, tokenizer = _load_folder(path, dtype, device)
    else:
        from edgewright.io.gguf_model import load_gguf

        loaded, tokenizer = load_gguf(path, dtype, device)
    check_finite(loaded, str(path))
    return loaded, tokenizer


def find_model(model: str | Path) -> Path:
    """The folder or .gguf file that `model` names; a hub id is downloaded into the hub's cache first."""
    if isinstance(model, str) and model in BUNDLED:
        return bundled_path(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise UsageError(f"{path} is not a .gguf file; pass a .gguf file or the folder that holds config.json")
    if isinstance(model, str) and HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return _download(model)
    if isinstance(model, Path) or any(mark in model for mark in ("/", "\\", ".gguf")):
        raise UsageError(f"no such model file or folder: {model}")
    return bundled_path(model)  # raises, listing the known names


def check_finite(model: nn.Module, source: str = "the model") -> None:
    """Raise FormatError naming the first parameter or buffer that holds NaN or Inf."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
            continue
        # The extremes of a tensor with NaN are NaN, so two numbers tell all without a mask of the tensor's size.
        low, high = torch.aminmax(tensor.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise FormatError(f"{source} has NaN or infinite values in the tensor {name!r}")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the client raises its own, requests' and the operating system's errors
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{name} is no local folder or .gguf file, and as a hub id it could not be fetched: {reason}"
        ) from error


def _load_folder(
    folder: Path, dtype: torch.dtype, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModel, AutoModelForCausalLM

    config = _read_config(folder)
    entries = _check_weights(folder)
    check_json_files(folder)
    check_numbers(folder / "config.json", config, entries)
    _check_head(folder, config)
    for plugin in entry_points(group=PLUGINS, name=config["model_type"]):
        plugin.load()
    if QUANTIZATION_KEY in config:
        from edgewright.io.quantized_folder import load_quantized

        return load_quantized(folder, dtype, device)
    factory: Any = AutoModelForCausalLM if _is_causal(config) else AutoModel
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _quiet(), reading(folder), _one_sentence(folder):
        check_claim(folder, factory, entries)
        model, report = factory.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **local
        )
        tokenizer = load_tokenizer(folder)
    # transformers fills both kinds of gap with random numbers and goes on.
    missing = sorted(report["missing_keys"])
    if missing == ["lm_head.weight"]:
        # Some published files (MobileLLM's own among them) say that the head is no table of its own by leaving it out.
        warnings.warn(f"{folder} has no lm_head.weight: its head is taken to be the embedding table", stacklevel=3)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        missing = []
    if missing:
        raise FormatError(f"{folder} lacks {len(missing)} weights of its model, the first is {missing[0]!r}")
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise FormatError(
            f"{folder} has {name!r} of shape {tuple(stored)}, but its config.json asks for {tuple(wanted)}"
        )
    return model.to(device).eval(), tokenizer


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no config.json; pass a folder that save_pretrained wrote, or a .gguf file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON in UTF-8: {error}") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise FormatError(f"{path} does not name a model_type")
    return config


def _check_weights(folder: Path) -> dict[str, SafetensorsEntry]:
    """Check every safetensors header and the index, and refuse folders whose weights are pickles. All tensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
        if pickles:
            raise UsageError(
                f"{folder} holds its weights only as {pickles[0]}, a pickle, which can run any code when it is opened "
                "and is not read here; where you trust it, convert it once with transformers: "
                "AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise UsageError(f"{folder} has no .safetensors file; pass a folder that save_pretrained wrote")
    entries = {name: entry for file in files for name, entry in check_safetensors(file).items()}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = {file.name for file in files}
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise FormatError(f"{index} is not an index of safetensors files") from error
        if lost := sorted(str(name) for name in wanted - names):
            raise FormatError(f"{index} names {lost[0][:80]!r}, which is not a safetensors file in this folder")
    return entries


def _check_head(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a head of its own beside a configuration that ties it to the table: one of the two would be dropped."""
    from safetensors import safe_open

    if config.get("tie_word_embeddings") is not True:
        return
    names = ("lm_head.weight", "model.embed_tokens.weight")
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found |= {name: handle.get_tensor(name) for name in names if name in handle.keys()}  # noqa: SIM118
    if len(found) == 2 and not torch.equal(*found.values()):
        raise FormatError(
            f"{folder} says tie_word_embeddings, but {names[0]!r} and {names[1]!r} differ; set it to false, or remove "
            "the head"
        )


def _is_causal(config: dict[str, Any]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0]).endswith(("ForCausalLM", "LMHeadModel"))
    return config["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no load report on the screen: what matters in it is raised. The settings are put back."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _one_sentence(folder: Path) -> Iterator[None]:
    """transformers' many-line complaints as one typed sentence."""
    try:
        yield
    except FormatError:
        raise
    except ImportError as error:
        raise MissingPackage(f"loading {folder} needs a package: {_first_line(error)}") from error
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        raise Unsupported(f"transformers cannot load {folder}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:240] if lines else type(error).__name__
