"""Text files as text, the same everywhere: a byte-order mark says UTF-8, UTF-16 or UTF-32; without one it is UTF-8."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from edgewright.errors import UsageError

# UTF-32 stands before UTF-16, whose mark is the beginning of its own.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(start: bytes) -> str:
    """Python's name of the encoding of a text that starts with these bytes (4 are enough)."""
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")


@contextmanager
def open_text(path: str | Path) -> Iterator[TextIO]:
    """A text file (.gz: unpacked while it is read) without its mark, line ends as they are.

    Raises OSError as `open` does; UsageError, also while reading, for bytes that are not the encoding.
    """
    path = Path(path)
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        encoding = encoding_of(file.read(4))
    try:
        with opener(path, "rt", encoding=encoding, newline="") as file:
            yield file
    except UnicodeError as error:
        raise UsageError(not_text(path, error)) from error


def read_text(path: str | Path) -> str:
    """The whole of a text file. Raises UsageError for one that cannot be read or is not text."""
    try:
        with open_text(path) as file:
            text = file.read()
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read the text file {path}: {getattr(error, 'strerror', None) or error}") from error
    if "\0" in text:
        raise UsageError(
            f"{path} has zero bytes: it is no text, or UTF-16 without a byte-order mark; convert it to UTF-8 first"
        )
    return text


def not_text(path: str | Path, error: UnicodeError) -> str:
    """What is wrong with the encoding of a file, and how to mend it."""
    encoding = getattr(error, "encoding", "utf-8").upper()
    what = "UTF-8" if encoding in ("UTF-8", "UTF-8-SIG") else encoding
    start = getattr(error, "start", None)
    value = ""
    if isinstance(error, UnicodeDecodeError) and error.start < len(error.object):
        value = f" is 0x{error.object[error.start]:02x}"
    return (
        f"{path} is not {what} text (byte {start}{value}); save it as UTF-8, for example "
        f"iconv -f WINDOWS-1252 -t UTF-8 {path}, with the encoding that it has"
    )
