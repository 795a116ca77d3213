"""Whose folder is it: a command that fills an output folder over several calls marks it, and refuses one of others."""

from __future__ import annotations

import json
from pathlib import Path

from edgewright.errors import UsageError
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object

MARKER = "run.json"


def claim_folder(output: str | Path, command: str, *, write: bool = True) -> None:
    """Make `output` the folder of a run of `command`, or find that it is one.

    command: as typed, such as "train dlrm". write: whether this process makes the mark (the first one of several).
    Raises UsageError where the folder holds anything else, or a run of another command; FormatError where its mark is
    damaged. Then nothing in it has been touched.
    """
    output = Path(output)
    marker = output / MARKER
    if marker.is_file():
        if (held := read_object(marker).get("command")) != command:
            raise UsageError(f"{output} holds a run of {str(held)[:40]!r}, not of {command!r}; choose another --output")
        return
    if output.exists() and (not output.is_dir() or any(not _unfinished(entry.name) for entry in output.iterdir())):
        raise UsageError(f"{output} is not an empty folder and holds no run of {command}; choose another --output")
    if write:
        write_text(marker, json.dumps({"command": command}) + "\n")


def _unfinished(name: str) -> bool:
    """Whether a killed process, or the first one of several right now, left this of its mark."""
    return name.startswith(f".{MARKER}.") and name.endswith(".part")
