"""Whose folder is it: a command that fills an output folder over several calls marks it, and refuses one of others.

While a call works in a folder no other one may: `working_in` locks the folder itself, so that no file is left for it,
and the lock ends with the process, however that ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgewright.errors import OutputError, UsageError
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.temporaries import is_temporary, sweep

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
    elif holds_something(output):
        raise UsageError(f"{output} is not an empty folder and holds no run of {command}; choose another --output")
    elif write:
        write_text(marker, json.dumps({"command": command}) + "\n")
    if write:
        sweep(output)


def holds_something(output: Path) -> bool:
    """Whether there is a file in the way, or a folder with more in it than temporary files of killed processes."""
    if not output.is_dir():
        return os.path.lexists(output)
    return any(not is_temporary(entry.name) for entry in output.iterdir())


@contextmanager
def working_in(output: str | Path) -> Iterator[None]:
    """Keep other processes out of a run's folder until the block ends; the folder is made, and removed if still empty.

    Raises UsageError when another process works in it, or when it is a file; OutputError when it cannot be made.
    Where the system has no such locks (Windows, some network disks) nothing is kept out.
    """
    output = Path(output)
    if os.path.lexists(output) and not output.is_dir():
        raise UsageError(f"{output} is a file; --output names a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the output folder {output}: {error.strerror}") from error
    descriptor = _lock(output)
    try:
        yield
    finally:
        with suppress(OSError):
            output.rmdir()  # only where nothing came of it
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(
            f"another process is working in {folder}; wait until it has ended, or choose another --output"
        ) from None
    except OSError:  # a disk without such locks
        os.close(descriptor)
        return None
    return descriptor
