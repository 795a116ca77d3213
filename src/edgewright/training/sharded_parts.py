"""Files of the parts of tensors that are split over processes: torch.distributed.checkpoint writes and reads them.

They are safetensors (never pickles), each with its place in the whole tensor, so that any number of processes, or one,
can read them. deviation: DCP's `load` sends objects between the processes and trusts what the files say; here each
process reads for itself, after headers and coverage were checked.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from edgewright.errors import FormatError, OutputError, UsageError
from edgewright.io.cover import cover_problem
from edgewright.io.safetensors_header import check_safetensors
from edgewright.training.sharded import begin_folder, finish_folder

SUFFIX = ".safetensors"


def write_parts(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Write the parts of split tensors into `folder`; every process calls with the same names. Raises OutputError."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(dict(tensors), storage_writer=writer, process_group=group)
    except (OSError, CheckpointException) as error:
        raise OutputError(f"cannot write {folder}: {str(error).strip().splitlines()[-1]}") from error


def write_parts_folder(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """As `write_parts`, the folder whole or not at all; one of parts alone is replaced. Every process calls.

    Raises UsageError where the folder holds anything else, OutputError.
    """
    first = dist.get_rank(group) == 0
    if folder.is_dir() and any(file.suffix != SUFFIX or not file.is_file() for file in folder.iterdir()):
        raise UsageError(f"{folder} holds other files than the parts of a checkpoint; choose another folder")
    if first:
        begin_folder(folder)
    dist.barrier(group)
    temporary = folder.parent / f".{folder.name}.part"
    write_parts(temporary, tensors, group)
    dist.barrier(group)
    if first:
        old = folder.parent / f".{folder.name}.old"
        if folder.exists():
            os.replace(folder, old)
        finish_folder(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier(group)


def read_parts(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets`, split or whole, from the parts that any number of processes wrote.

    Raises FormatError; then nothing was filled.
    """
    values = new_parts(folder, targets)
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)


def new_parts(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the shapes, types and splits of `like`, in memory of their own, from a folder of parts.

    Raises FormatError.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    if not like:
        return {}
    _check(folder)
    try:
        reader = HuggingFaceStorageReader(str(folder))
        metadata = reader.read_metadata()
        for name, tensor in like.items():
            _compare(folder, name, metadata.state_dict_metadata.get(name), tensor)
        values = {name: torch.empty_like(tensor.detach()) for name, tensor in like.items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(values), metadata, True)
        reader.set_up_storage_reader(metadata, True)
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    except FormatError:
        raise
    except (OSError, CheckpointException, RuntimeError, KeyError, ValueError, TypeError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FormatError(f"the parts in {folder} are damaged ({lines[-1]}): remove that checkpoint") from error
    return values


def part_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder of parts, which may be absent. Raises FormatError."""
    names: set[str] = set()
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            names |= check_safetensors(file).keys()
        except (FormatError, UsageError) as error:
            raise FormatError(f"the part {file} is damaged ({error}): remove that checkpoint") from error
    return names


def _check(folder: Path) -> None:
    """Raise FormatError unless every file is a safetensors file that says where its tensors belong."""
    from safetensors import SafetensorError, safe_open
    from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

    if not part_names(folder):
        hint = "; its .metadata is a pickle, which is not read: save again" if (folder / ".metadata").exists() else ""
        raise FormatError(f"{folder} holds no parts of tensors (*{SUFFIX}){hint}")
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            with safe_open(file, "pt") as opened:
                places = json.loads((opened.metadata() or {}).get(CUSTOM_METADATA_KEY, "null"))
            for name, entry in check_safetensors(file).items():
                offsets = places[name][SAVED_OFFSETS_KEY]
                if len(offsets) != len(entry.shape) or not all(type(o) is int and 0 <= o < 2**62 for o in offsets):
                    raise FormatError(f"the place of {name[:80]!r} is {str(offsets)[:80]}")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"the part {file} is damaged ({error!r:.200}): remove that checkpoint") from error


def _compare(folder: Path, name: str, described: Any, tensor: Tensor) -> None:
    """Raise FormatError unless the parts of a tensor are all of it, once, in the type and shape that is wanted."""
    if described is None:
        raise FormatError(f"the parts in {folder} lack the tensor {name[:80]!r}: remove that checkpoint")
    kind = described.properties.dtype
    if tuple(described.size) != tuple(tensor.shape) or kind != tensor.dtype:
        raise FormatError(
            f"the parts in {folder} have {name[:80]!r} as {kind}{list(described.size)}, here it is "
            f"{tensor.dtype}{list(tensor.shape)}"
        )
    parts = list(dict.fromkeys((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in described.chunks))
    if problem := cover_problem(parts, tuple(tensor.shape)):
        raise FormatError(f"the parts in {folder} do not make up {name[:80]!r} ({problem}): remove that checkpoint")
