"""Checkpoint folders: tensors in safetensors, everything else in JSON, each folder complete or absent. No pickle.

`<output>/checkpoints/step-00000012.0/` holds `model.safetensors` (by parameter name), `state.safetensors` and
`state.json`; `sharded/` where the weights are split over processes; `own/` where processes have something that the
others do not. The number after the dot counts the micro steps of a step that was interrupted within accumulation.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgewright.errors import FormatError, OutputError, UsageError
from edgewright.io.atomic import atomic_directory, sync_file
from edgewright.io.json_file import read_json
from edgewright.io.safetensors_header import check_safetensors
from edgewright.io.tensors import save_tensors
from edgewright.training.checkpoint.tree import decode_state, describe, encode_state
from edgewright.training.distributed import is_split
from edgewright.training.sharded import FOLDER as PARTS, begin_folder, finish_folder
from edgewright.training.sharded_parts import part_names, write_parts

FORMAT = 1
FOLDER = "checkpoints"
NAME = re.compile(r"step-(\d{8,})\.(\d+)")
MODEL, TENSORS, STATE = "model.safetensors", "state.safetensors", "state.json"
OWN = "own"  # folder of what each process has for itself
LARGEST_STATE = 256 << 20  # bytes of a state in JSON
PART = "model."  # before the names of the model's tensors among the parts


def checkpoint_path(output: Path, step: int, micro: int) -> Path:
    return output / FOLDER / f"step-{step:08d}.{micro}"


def latest_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint of a run that got furthest, or None."""
    return max(_checkpoints(Path(output)), key=_order, default=None)


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return _order(path)[0]


def write_checkpoint(
    path: Path, model: Mapping[str, Tensor], state: Any, accelerator: Any = None, own: Any = None
) -> None:
    """Write one checkpoint folder, flushed to disk before it gets its name.

    Tensors that are split over processes go into a folder of parts, and so does what each has of its `own` (a tree like
    `state`, or None on all of them): then every process calls, with its `accelerator`.
    `state` is a tree of dicts, lists, tuples, tensors, arrays, numbers, strings and None. Raises UsageError for
    anything else (naming its place) and OutputError when the disk refuses; neither leaves a folder behind.
    """
    tensors: dict[str, Tensor] = {}
    tree = encode_state(state, tensors, "state")
    parts = {PART + name: tensor for name, tensor in model.items() if is_split(tensor)}
    parts |= {name: tensor for name, tensor in tensors.items() if is_split(tensor)}
    model = {name: tensor for name, tensor in model.items() if PART + name not in parts}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in parts}
    if not parts and own is None:
        with atomic_directory(path, ours=True) as folder:
            _write_files(folder, model, tensors, tree)
        return
    if accelerator.is_main_process:
        begin_folder(path)
    accelerator.wait_for_everyone()
    temporary = path.parent / f".{path.name}.part"
    if parts:
        write_parts(temporary / PARTS, parts)
    if own is not None:
        _write_own(temporary / OWN, accelerator.process_index, own)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_files(temporary, model, tensors, tree)
        finish_folder(temporary, path)


def _write_files(folder: Path, model: Mapping[str, Tensor], tensors: Mapping[str, Tensor], tree: Any) -> None:
    save_tensors(folder / MODEL, model)
    save_tensors(folder / TENSORS, tensors)
    (folder / STATE).write_text(json.dumps({"format": FORMAT, "state": tree}, indent=1), encoding="utf-8")
    for name in (MODEL, TENSORS, STATE):
        sync_file(folder / name)


def _write_own(folder: Path, process: int, own: Any) -> None:
    tensors: dict[str, Tensor] = {}
    tree = encode_state(own, tensors, "own")
    try:
        folder.mkdir(exist_ok=True)
        save_tensors(_own(folder, process, TENSORS), tensors)
        _own(folder, process, STATE).write_text(json.dumps(tree), encoding="utf-8")
        for name in (TENSORS, STATE):
            sync_file(_own(folder, process, name))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error


def read_own(path: Path, process: int) -> dict[str, Any]:
    """What a process wrote for itself, by name. Raises FormatError when it is damaged or absent."""
    try:
        tensors = {name: tensor.clone() for name, tensor in _tensors(_own(path / OWN, process, TENSORS))}
        found = decode_state(read_json(_own(path / OWN, process, STATE), LARGEST_STATE), tensors)
        if not isinstance(found, dict):
            raise TypeError(f"process {process} wrote {type(found).__name__}")
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise error if _is_ours(path, error) else damaged(path, error) from error


def _is_ours(path: Path, error: Exception) -> bool:
    """Whether an error says already that this checkpoint is damaged, or of another format."""
    return isinstance(error, FormatError) and f"{path} " in str(error)


def _own(folder: Path, process: int, name: str) -> Path:
    return folder / f"{process:05d}-{name}"


def read_state(path: Path) -> Any:
    """The `state` of a checkpoint, tensors in memory of their own. Raises FormatError when the folder is damaged."""
    try:
        document = read_json(path / STATE, LARGEST_STATE)
        if document["format"] != FORMAT:
            raise FormatError(f"{path} has checkpoint format {document['format']}; this version reads {FORMAT}")
        tensors = {name: tensor.clone() for name, tensor in _tensors(path / TENSORS)}
        return decode_state(document["state"], tensors)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise error if _is_ours(path, error) else damaged(path, error) from error


def model_names(path: Path) -> set[str]:
    """Names of the model tensors in a checkpoint."""
    split = {name.removeprefix(PART) for name in part_names(path / PARTS) if name.startswith(PART)}
    try:
        with safe_open(path / MODEL, framework="pt") as opened:
            return set(opened.keys()) | split
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def read_model(path: Path, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The saved tensors by name, in memory of their own; `targets` says which there may be.

    Raises UsageError naming the first whose name, shape or dtype does not fit, FormatError when the file is damaged.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in _tensors(path / MODEL):
        target = targets.get(name)
        now = "absent" if target is None else describe(target)
        if now != describe(tensor):
            raise UsageError(f"cannot resume from {path}: model tensor {name!r} was {describe(tensor)}, now {now}")
        found[name] = tensor.clone()
    return found


def remove_checkpoints(output: str | Path, keep: Path | None = None) -> None:
    """Remove the checkpoints of a run but `keep`, with what a killed process left half-written. Best effort."""
    for path in _checkpoints(Path(output)):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
    folder = Path(output) / FOLDER
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    try:
        folder.rmdir()  # only when empty
    except OSError:
        pass


def _checkpoints(output: Path) -> list[Path]:
    folder = output / FOLDER
    return [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []


def _order(path: Path) -> tuple[int, int]:
    step, micro = path.name.removeprefix("step-").split(".")
    return int(step), int(micro)


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        check_safetensors(file)
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError, UsageError, FormatError) as error:
        raise damaged(file.parent, error) from error


def damaged(path: Path, error: Exception) -> FormatError:
    """The sentence for a checkpoint that cannot be read."""
    reason = str(error) if isinstance(error, OSError | FormatError) else f"{type(error).__name__}: {error}"
    return FormatError(
        f"checkpoint {path} is damaged ({' '.join(reason.split())[:300]}): remove that folder, or pass resume='never'"
    )
