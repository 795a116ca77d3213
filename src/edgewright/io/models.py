"""`edgewright.load`: one call for a Hugging Face folder, a GGUF file, a bundled name or a hub id.

Files are read only after their headers were checked, and no code from the model runs: safetensors and GGUF, and where
there is nothing else the tensors of a pytorch_model.bin, by torch's weights-only reader.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgewright.errors import EdgewrightError, FormatError, MissingPackage, Unsupported, UsageError, in_one_line
from edgewright.io.bundled import BUNDLED, bundled_path
from edgewright.io.config_bounds import check_claim, check_numbers
from edgewright.io.foreign import check_json_files, load_tokenizer, reading
from edgewright.io.model_folder import check_head, check_unquantized, check_weights, has_safetensors, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What is fetched for a hub id: configuration, tokenizer and safetensors, never pickles or code.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
# Installed packages, this one first, name the module that makes transformers know a model_type.
PLUGINS = "edgewright_models"
QUANTIZATION_KEY = "edgewright_quantization"


def load(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers model in evaluation mode and its tokenizer.

    Args:
        model: a folder with config.json and safetensors, a .gguf file, a bundled name (see `io.bundled`), or a hub id
            "org/name", the only case in which anything is downloaded. A folder gives the class that its config.json
            names in "architectures", with its head: LlamaForCausalLM, BertForSequenceClassification, BertModel, ...
            Weights that this class has no place for are named in a warning.
        dtype: of the weights in memory.
        device: where they go.

    Returns:
        (model, tokenizer).

    Raises:
        UsageError: the model cannot be found.
        FormatError: a broken file, or weights that are not finite.
        Unsupported: an architecture not known here.
        MissingPackage: a bundled model that is not installed.
    """
    if model == "efficientnet-lite0":
        raise UsageError(
            "efficientnet-lite0 is an image classifier without a tokenizer; load it with "
            "edgewright.models.efficientnet_lite.load_efficientnet_lite0()"
        )
    path = find_model(model)
    if path.is_dir():
        loaded, tokenizer = _load_folder(path, dtype, device)
    else:
        from edgewright.io.gguf.model import load_gguf

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
        raise UsageError(
            f"{name} is no local folder or .gguf file, and as a hub id it could not be fetched: {in_one_line(error)}"
        ) from error


def _load_folder(
    folder: Path, dtype: torch.dtype, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = read_config(folder)
    check_unquantized(folder, config)
    entries = check_weights(folder)
    check_json_files(folder)
    check_numbers(folder / "config.json", config, entries)
    check_head(folder, config)
    plugins = entry_points(group=PLUGINS, name=config["model_type"])
    for plugin in plugins:
        plugin.load()
    if QUANTIZATION_KEY in config:
        from edgewright.io.quantized_folder import load_quantized

        return load_quantized(folder, dtype, device)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _quiet(), reading(folder), _one_sentence(folder):
        factory = _model_class(folder, config, known=bool(plugins))
        check_claim(folder, factory, entries)
        # Files of torch.save go to torch's weights-only reader, which makes tensors and runs nothing.
        model, report = factory.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=has_safetensors(folder),
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **local,
        )
        tokenizer = load_tokenizer(folder)
    _check_report(folder, config, model, report)
    return model.to(device).eval(), tokenizer


def _model_class(folder: Path, config: dict[str, Any], known: bool) -> Any:
    """The class of transformers that config.json names; known: an installed package has registered the model_type."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        return AutoModelForCausalLM if config["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel
    name = str(names[0])
    named = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        if getattr(named.config_class, "model_type", None) not in (config["model_type"], None):
            raise FormatError(f"{folder} names the class {name[:80]}, which is none of {config['model_type'][:80]!r}")
        return named
    # early files call their class otherwise (LLaMAForCausalLM); that all weights fit is checked after loading
    renamed = name.endswith(("ForCausalLM", "LMHeadModel")) and "auto_map" not in config
    if known or (renamed and config["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return AutoModelForCausalLM
    raise Unsupported(
        f"{folder} names the class {name[:80]!r} for model_type {config['model_type'][:80]!r}, which transformers "
        f"{transformers.__version__} does not have; code from a model folder is never run, but a newer transformers "
        "may know it: pip install -U transformers"
    )


def _check_report(folder: Path, config: dict[str, Any], model: Any, report: dict[str, Any]) -> None:
    """What transformers fills with random numbers, or leaves out, and goes on: an error, or a warning by name."""
    guessed = not config.get("architectures")
    hint = (
        '; name its class in config.json, as in "architectures": ["BertForSequenceClassification"]' if guessed else ""
    )
    missing = sorted(report["missing_keys"])
    if missing == ["lm_head.weight"]:
        # Some published files (MobileLLM's own among them) say that the head is no table of its own by leaving it out.
        warnings.warn(f"{folder} has no lm_head.weight: its head is taken to be the embedding table", stacklevel=4)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        missing = []
    # A pooler is trained for sentence pairs only; models whose heads do not use it are published without.
    unused = [name for name in missing if name.split(".")[-3:-1] == ["pooler", "dense"]]
    if unused and len(unused) == len(missing):
        warnings.warn(f"{folder} has no pooler: {type(model).__name__} is given a new one, do not use it", stacklevel=4)
        missing = []
    if missing:
        raise FormatError(f"{folder} lacks {len(missing)} weights of its model, the first is {missing[0]!r}{hint}")
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise FormatError(
            f"{folder} has {name!r} of shape {tuple(stored)}, but its config.json asks for {tuple(wanted)}"
        )
    if unexpected := sorted(str(name) for name in report["unexpected_keys"]):
        what = f"{folder} has {len(unexpected)} weights that {type(model).__name__} has no place for"
        if guessed:  # the weights say that it is another class
            raise FormatError(f"{what}, the first is {unexpected[0][:80]!r}{hint}")
        warnings.warn(f"{what}; left out: {', '.join(name[:80] for name in unexpected[:8])}", stacklevel=4)


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
    """Transformers' many-line complaints as one typed sentence."""
    try:
        yield
    except EdgewrightError:
        raise
    except ImportError as error:
        raise MissingPackage(f"loading {folder} needs a package: {in_one_line(error)}") from error
    except Exception as error:  # whatever a broken file makes transformers, tokenizers or torch raise
        raise Unsupported(f"transformers cannot load {folder}: {in_one_line(error)}") from error
