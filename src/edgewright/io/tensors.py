"""Tensors to and from one safetensors file: written whole or not at all, read after the header was checked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from edgewright.errors import FormatError, OutputError, in_one_line
from edgewright.io.atomic import atomic_file
from edgewright.io.safetensors_header import check_safetensors
from edgewright.io.temporaries import PART, prefix


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under their names; those on a device, or that share memory with another, are copied first.

    Args:
        path: the file; one that is there is replaced once the new one is complete.
        tensors: of any shape and type that safetensors has.
        metadata: texts for the header.

    Raises:
        OutputError: the folder cannot be written or the disk is full, where safetensors raises errors of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    # safetensors writes a temporary file of its own beside the target, which a kill leaves: in a folder that is swept.
    with (
        atomic_file(path) as temporary,
        tempfile.TemporaryDirectory(prefix=prefix(path.name), suffix=PART, dir=path.parent) as folder,
    ):
        try:
            save_file(_separate(tensors), Path(folder) / path.name, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OutputError(f"cannot write {path}: {in_one_line(error)}") from error
        os.replace(Path(folder) / path.name, temporary)


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        UsageError: there is no such file, or it cannot be opened.
        FormatError: it is no safetensors file, or of a type that torch does not have.
    """
    return read_tensors(path, device)[0]


def read_tensors(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, texts of the header); raises as `load_tensors`."""
    from safetensors import SafetensorError, safe_open

    check_safetensors(path)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, AttributeError, ValueError) as error:  # AttributeError: a type unknown to torch
        raise FormatError(f"{path} cannot be read: {in_one_line(error)}") from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each in memory that is all its own: safetensors takes no others."""
    result: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        storage = dense.untyped_storage()
        if storage.nbytes() != dense.nbytes or (dense.nbytes and storage.data_ptr() in taken):
            dense = dense.clone()
        taken.add(dense.untyped_storage().data_ptr())
        result[name] = dense
    return result
