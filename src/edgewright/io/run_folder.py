"""Whose folder is it: a command that fills an output folder over several calls marks it, and refuses one of others.

While a call works in a folder no other one may: `working_in` locks the folder itself, so that no file is left for it,
and the lock ends with the process, however that ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
    record = {"command": command}
    if not holds_run(output, MARKER, record, f"run of {command}") and write:
        write_text(output / MARKER, json.dumps(record) + "\n")
    if write:
        sweep(output)


def holds_run(
    output: Path, marker: str, record: Mapping[str, Any], what: str, *, defaults: Mapping[str, Any] | None = None
) -> bool:
    """Whether the folder holds the run that `record` describes, by the JSON file `marker` in it; False if empty.

    what: "run of compress" and such, for messages. defaults: of values that may be younger than the folder.
    Raises UsageError, naming the first value that differs, where the folder holds another run or anything else;
    FormatError where the marker is damaged. Nothing is written.
    """
    if (output / marker).is_file():
        if other := difference({**(defaults or {}), **read_object(output / marker)}, record):
            raise UsageError(f"{output} holds another run ({other}); choose another --output, or remove that folder")
        return True
    if holds_something(output):
        raise UsageError(f"{output} is not an empty folder and holds no {what}; choose another --output")
    return False


def difference(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first value in which what a file holds differs from `wanted`, as "key=1, not 2"; "" where nothing does."""
    was, now = _flat(held), _flat(json.loads(json.dumps(wanted)))  # tuples become lists, as in the file
    for key in {**now, **was}:
        if was.get(key) != now.get(key):
            return f"{key}={_shown(was.get(key))}, not {_shown(now.get(key))}"
    return ""


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Values by dotted path; a list of objects counts as an object."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {key: value}
    parts = [_flat(entry, f"{key}.{name}" if key else str(name)) for name, entry in value.items()]
    return {path: leaf for part in parts for path, leaf in part.items()}


def _shown(value: Any) -> str:
    """A value as one types it: 4, not 4.0."""
    text = f"{value:g}" if isinstance(value, float) and value.is_integer() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def require_empty(output: Path) -> None:
    """Raise UsageError for a file, and for a folder that holds something."""
    if holds_something(output):
        raise UsageError(f"{output} is not an empty folder; choose another --output")


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
