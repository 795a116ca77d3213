"""Which checkpoints stay: the newest that can be restored, with everything that they build upon."""

from __future__ import annotations

from edgewright.errors import FormatError
from edgewright.systems.check_n_run import commit
from edgewright.systems.check_n_run.chain import Catalogue, catalogue, check_chain
from edgewright.systems.check_n_run.files import Files


def kept(files: Files, known: Catalogue, keep: int, proved: set[str] | None = None) -> set[str]:
    """Ids of the newest `keep` checkpoints whose chains prove good, and of their chains. proved: needs no new proof."""
    proved = set() if proved is None else proved
    result: set[str] = set()
    count = 0
    for manifest in known.found:
        if count == keep:
            break
        try:
            result |= {link.id for link in check_chain(files, known, manifest, proved)}
            count += 1
        except FormatError:
            continue
    return result


def collect(files: Files, keep: int, proved: set[str] | None = None, broken: bool = False) -> list[str]:
    """Delete what `kept` does not name; the ids that are gone. broken: also folders whose manifest cannot be read,
    except those of another format version. Nothing is deleted where nothing can be restored, and no link or folder with
    files of others ever. Raises OSError."""
    known = catalogue(files)
    stay = kept(files, known, keep, proved)
    if not stay:
        return []
    gone = [manifest.id for manifest in known.found if manifest.id not in stay]
    if broken and known.other_version is None:
        gone = [*known.broken, *gone]
    gone = [name for name in gone if commit.ours(files, name)]
    commit.remove(files, gone)
    return gone
