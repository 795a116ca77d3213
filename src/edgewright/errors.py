"""The errors a user can meet. Each carries one sentence for people and the exit code for scripts."""

from __future__ import annotations

LONGEST_SENTENCE = 3000  # characters; what is longer repeats what a file says


class EdgewrightError(Exception):
    """Base of every error that edgewright raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= LONGEST_SENTENCE else f"{text[:LONGEST_SENTENCE]} [...]"


class UsageError(EdgewrightError, ValueError):
    """An argument that cannot work: the message gives the value, what is allowed and a call that would work."""

    exit_code = 2


class FormatError(EdgewrightError, ValueError):
    """A file from outside that is truncated, inconsistent or hostile."""

    exit_code = 2


class MissingPackage(EdgewrightError, ImportError):
    """An optional package that this call needs; the message holds the line that installs it."""

    exit_code = 2


class OutputError(EdgewrightError, OSError):
    """The result could not be written: unwritable folder, full disk. Nothing half-written is left."""


class CheckFailed(EdgewrightError):
    """The work was done but its verification failed: a file that does not decode to its model, a claim that failed."""


class Unsupported(EdgewrightError, NotImplementedError):
    """A model or layer that a method does not know; refused by name rather than handled silently wrong."""

    exit_code = 2


LONGEST_REASON = 2000  # characters of another library's message


def in_one_line(error: BaseException | str) -> str:
    """Another library's message on one line, whole, so that nothing that it says about the way out is lost.

    Only what is longer than LONGEST_REASON is cut, at a word and with a mark. An error without a message gives its
    type, a KeyError its type too: its message is only the key.
    """
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    if len(text) > LONGEST_REASON:
        text = text[:LONGEST_REASON].rsplit(" ", 1)[0] + " [...]"
    return text or type(error).__name__
