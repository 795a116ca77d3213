"""How a checkpoint comes to be, and goes: a crash at any moment leaves the one before or the new one, never a mixture.

    1. tmp-<uuid>/: data files, then manifest.json, each on the disk (fsync) before the next step
    2. fsync of that folder
    3. rename to ckpt-<step>-<uuid8>, fsync of the root           from here on the checkpoint exists
    4. LATEST.tmp, fsync, rename to LATEST, fsync of the root     a hint for people; nothing depends on it

Where nothing can be renamed (object stores) the data goes to the final folder and the manifest is the last object.
Deleting begins when the new checkpoint is on the disk, and renames to trash-<uuid> first.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable

from edgewright.systems.check_n_run.files import Files
from edgewright.systems.check_n_run.manifest import FILE, ID, NAME, Manifest
from edgewright.systems.check_n_run.shards import SUFFIX

LATEST = "LATEST"
TEMPORARY, TRASH = "tmp-", "trash-"
_STARTED = time.time()


def checkpoint_id(step: int, unique: str) -> str:
    """ckpt-<step>-<uuid8>."""
    return f"ckpt-{step:08d}-{unique[:8]}"


def working_folder(files: Files, identity: str, unique: str) -> str:
    """Where the files of a checkpoint are written until it exists."""
    return f"{TEMPORARY}{unique}" if files.renames else identity


def write_file(files: Files, path: str, data: bytes) -> None:
    """A new file whose bytes are on the disk when this returns."""
    handle = files.create(path)
    try:
        files.write(handle, data)
        files.sync(handle)
    except BaseException:
        files.discard(handle)
        raise


def commit(files: Files, folder: str, manifest: Manifest) -> str:
    """Make the checkpoint in `folder`, whose data files are on the disk, exist; its digest. Raises OSError."""
    text, digest = manifest.encode()
    write_file(files, f"{folder}/{NAME}", text)
    files.sync_folder(folder)
    if files.renames:
        files.rename(folder, manifest.id)
    files.sync_folder("")
    return digest


def point(files: Files, identity: str) -> None:
    """LATEST names this checkpoint. Raises OSError, after which the checkpoint exists all the same."""
    if not files.renames:
        write_file(files, LATEST, f"{identity}\n".encode())
        return
    if f"{LATEST}.tmp" in files.names(""):  # a link is removed, not what it names
        files.unlink(f"{LATEST}.tmp")
    write_file(files, f"{LATEST}.tmp", f"{identity}\n".encode())
    files.rename(f"{LATEST}.tmp", LATEST)
    files.sync_folder("")


def latest(files: Files) -> str | None:
    """What LATEST says, if that could be a checkpoint's name."""
    try:
        with files.open(LATEST) as stream:
            text = stream.read(64).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if ID.fullmatch(text) else None


def remove(files: Files, folders: Iterable[str]) -> None:
    """Delete checkpoints in this order; what builds upon others comes before them. Raises OSError."""
    for folder in folders:
        if files.renames:
            trash = f"{TRASH}{uuid.uuid4().hex}"
            files.rename(folder, trash)
            files.sync_folder("")
            discard(files, trash)
        else:  # without its manifest it is no checkpoint
            if NAME in files.names(folder):
                files.unlink(f"{folder}/{NAME}")
            discard(files, folder)


def discard(files: Files, folder: str) -> None:
    """Delete a folder of files that a checkpointer wrote. Raises OSError."""
    for name in files.names(folder):
        files.unlink(f"{folder}/{name}")
    files.rmdir(folder)


def ours(files: Files, folder: str) -> bool:
    """Whether this is a folder, no link to one, and holds nothing but files that a checkpointer writes.

    Whatever else has the name of a checkpoint, or lies in one, is somebody's: it is never deleted.
    """
    return files.kind(folder) == "folder" and all(
        (name == NAME or FILE.fullmatch(name)) and files.kind(f"{folder}/{name}") == "file"
        for name in files.names(folder)
    )


def leftovers(files: Files, before: float = _STARTED) -> list[str]:
    """Folders that a killed process left behind: temporary ones and trash, older than `before` (this process)."""
    found = []
    for name in files.names(""):
        if name.startswith((TEMPORARY, TRASH)):
            unfinished = True
        else:
            unfinished = not files.renames and bool(ID.fullmatch(name)) and NAME not in files.names(name)
        if unfinished and _age(files, name) < before:
            found.append(name)
    return found


def clean(files: Files, before: float = _STARTED) -> list[str]:
    """Delete the leftovers; those that cannot be, or hold files of others, stay. The names of those gone."""
    gone = []
    for name in leftovers(files, before):
        if not ours(files, name):
            continue
        try:
            discard(files, name)
            gone.append(name)
        except OSError:
            continue
    return gone


def _age(files: Files, name: str) -> float:
    try:
        inside = [files.modified(f"{name}/{part}") for part in files.names(name) if part.endswith(SUFFIX)]
        return max(inside, default=files.modified(name))
    except OSError:
        return 0.0
