"""ExecuTorch as a program: arrays in, arrays out, on the CPU.

A file from outside is looked at first (`io.pte`: magic, header, segments), then loaded and run once in a child process
(`child_check`): what a damaged file does to a runtime in C++ happens there. Only then is it opened here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgewright.errors import EdgewrightError, FormatError, Unsupported, UsageError, in_one_line
from edgewright.io.pte import read_layout
from edgewright.runtime.child_check import first_run_in_child
from edgewright.runtime.executorch_library import load, set_threads, silent
from edgewright.runtime.program_inputs import TensorSpec, checked_inputs, stand_in_inputs
from edgewright.runtime.pte_metadata import METHOD, StoredWeights, language_settings, unpack, weights_in

if TYPE_CHECKING:
    import numpy as np

FORWARD = "forward"
# ExecuTorch's names of the types that NumPy has too.
DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "Long": "int64", "Int": "int32", "Short": "int16",
    "Char": "int8", "Byte": "uint8", "Bool": "bool",
}  # fmt: skip
SCALAR_TYPES = ("Byte", "Char", "Short", "Int", "Long", "Half", "Float", "Double", None, None, None, "Bool")
MAX_BYTES = 1 << 32  # of one input or output; a header that asks for more is not believed


class ExecuTorchProgram:
    """The method `forward` of a .pte file. `inputs` and `outputs` as in `Program`; a context manager.

    Sizes of outputs are upper bounds where the batch is free. Raises FormatError (truncated, foreign or hostile file),
    Unsupported (a language model: `open_engine` runs it; inputs that are no tensors), MissingPackage.
    """

    def __init__(self, path: str | Path, threads: int | None = None, *, check: bool = True) -> None:
        self.path = Path(path)
        self._module: Any = None
        read_layout(self.path)
        if check:
            first_run_in_child("edgewright.runtime.executorch_program", "first_run", self.path)
        set_threads(threads, self)
        module, self.metadata = open_file(self.path)
        if self.metadata.get("kind") == "language":
            raise Unsupported(f"{self.path} is a language model; open it with open_engine(path), or edgewright chat")
        self.inputs, self.outputs = _specs(module, self.metadata, self.path)
        meta = module.method_meta(FORWARD)
        self._largest = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(len(self.inputs))]
        self._module = module

    def run(self, arrays: Sequence[np.ndarray] | Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs in order. Raises UsageError for inputs that do not fit, EdgewrightError where a run stops."""
        import torch

        if self._module is None:
            raise UsageError(f"the program of {self.path} is closed; open it again with open_program(path)")
        checked = checked_inputs(self.inputs, _as_arrays(arrays), self.path)
        for spec, array, largest in zip(self.inputs, checked, self._largest, strict=True):
            if any(size > most for size, most in zip(array.shape, largest, strict=True)):
                raise UsageError(
                    f"{self.path.name} has room for {spec.name} of {largest} at most, got {array.shape}; use parts"
                )
        try:
            results = self._module.forward([torch.from_numpy(array) for array in checked])
        except RuntimeError as error:
            raise EdgewrightError(f"ExecuTorch stopped in {self.path.name}: {in_one_line(error)}") from error
        return [result.numpy() if hasattr(result, "numpy") else _scalar(result) for result in results]

    def close(self) -> None:
        """Free the program; harmless when called again."""
        self._module = None

    def __enter__(self) -> ExecuTorchProgram:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_file(path: Path) -> tuple[Any, dict[str, Any]]:
    """(loaded module, metadata, empty for a file of somebody else). Raises FormatError."""
    try:
        module = load(path)
        names = module.method_names()
        if FORWARD not in names:
            raise FormatError(f"{path} has no method 'forward', only {', '.join(sorted(names)[:8]) or 'none'}")
        if METHOD not in names:
            return module, {}
        with silent():
            (packed,) = module.run_method(METHOD, ())
    except (EdgewrightError, RuntimeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} cannot be opened: {in_one_line(error)}") from error
    if not hasattr(packed, "numpy") or str(packed.dtype) != "torch.uint8":
        raise FormatError(f"{path}: the description inside the file is damaged")
    return module, unpack(packed.numpy().tobytes(), path)


def weights_of(path: str | Path) -> StoredWeights | None:
    """Number and bytes of the weights in a file of ours, None in any other. Raises FormatError."""
    _, metadata = open_file(Path(path))
    return weights_in(metadata, path)


def first_run(path: str) -> str:
    """Load a file and run it once with made-up inputs; returns what it holds. Called in a child process."""
    import torch

    file = Path(path)
    read_layout(file)
    module, metadata = open_file(file)
    inputs: list[Any]
    if metadata.get("kind") == "language":
        language_settings(metadata, file)
        inputs = [
            torch.zeros(1, 1, dtype=torch.long),
            torch.zeros(1, dtype=torch.long),
            torch.zeros(1, dtype=torch.long),
        ]
    else:
        specs, _ = _specs(module, metadata, file)
        inputs = [torch.from_numpy(array) for array in stand_in_inputs(specs)]
    module.forward(inputs)
    return str(metadata.get("kind", "program"))


def _specs(module: Any, metadata: dict[str, Any], path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    meta = module.method_meta(FORWARD)
    try:
        inputs = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
        outputs = [meta.output_tensor_meta(i) for i in range(meta.num_outputs())]
    except (RuntimeError, IndexError) as error:
        raise Unsupported(f"{path}: an input or output is no tensor, which a program cannot have") from error
    if any(info.nbytes() > MAX_BYTES for info in (*inputs, *outputs)):
        raise FormatError(f"{path} asks for a tensor of more than {MAX_BYTES >> 30} GiB")
    given = metadata.get("inputs")
    names, shapes = [f"input_{i}" for i in range(len(inputs))], [tuple(info.sizes()) for info in inputs]
    if given is not None:
        names, shapes = _described(given, shapes, path)
    ins = [TensorSpec(n, s, _dtype(i, path)) for n, s, i in zip(names, shapes, inputs, strict=True)]
    outs = [TensorSpec(f"output_{i}", tuple(o.sizes()), _dtype(o, path)) for i, o in enumerate(outputs)]
    return tuple(ins), tuple(outs)


def _described(given: Any, shapes: list[Any], path: Path) -> tuple[list[str], list[Any]]:
    """Names and shapes as the metadata tell them, where they agree with the program."""
    try:
        names = [str(one["name"]) for one in given]
        free = [tuple(None if size is None else int(size) for size in one["shape"]) for one in given]
        fit = len(free) == len(shapes) and all(
            len(a) == len(b) and all(x is None or x == y for x, y in zip(a, b, strict=True))
            for a, b in zip(free, shapes, strict=True)
        )
    except (TypeError, KeyError, ValueError):
        fit = False
    if not fit:
        raise FormatError(f"{path}: the description of its inputs does not fit the program")
    return names, free


def _dtype(info: Any, path: Path) -> str:
    number = info.dtype()
    name = SCALAR_TYPES[number] if 0 <= number < len(SCALAR_TYPES) else None
    if name is None:
        raise Unsupported(f"{path}: a tensor has ExecuTorch's type {number}, which NumPy does not have")
    return DTYPES[name]


def _as_arrays(arrays: Any) -> Any:
    """Tensors as arrays; everything else as it is."""
    if isinstance(arrays, Mapping):
        return {name: _as_arrays([value])[0] for name, value in arrays.items()}
    return [value.detach().cpu().numpy() if hasattr(value, "detach") else value for value in arrays]


def _scalar(value: Any) -> np.ndarray:
    import numpy as np

    return np.asarray(value)
