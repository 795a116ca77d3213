"""JSON: files from outside, read with a limit, each failure one sentence that names the file; and values for files."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edgewright.errors import FormatError, UsageError

LARGEST = 16 << 20  # bytes; what describes a model or a run has kilobytes
DEEPEST = 100  # objects and lists within each other; what walks a tree of them may call itself so often


def read_json(path: str | Path, largest: int = LARGEST, hint: str = "") -> Any:
    """The value in a JSON file in UTF-8.

    hint: what to do where there is no such file, added to the sentence. Raises UsageError for a file that cannot be
    read, FormatError for one larger than `largest` bytes, not JSON, or nested more than DEEPEST deep.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > largest:
            raise FormatError(f"{path} has {size} bytes; at most {largest} are allowed")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}{'; ' + hint if hint else ''}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is not JSON: {error}") from error
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inner = (node.values() if isinstance(node, dict) else node for node in level)
        level = [part for node in inner for part in node if isinstance(part, dict | list)]
        if not level:
            return value
    raise FormatError(f"{path} is nested more than {DEEPEST} deep")


def read_object(path: str | Path, largest: int = LARGEST, hint: str = "") -> dict[str, Any]:
    """The same where only an object will do. Raises FormatError for any other value."""
    value = read_json(path, largest, hint)
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds {type(value).__name__} where a JSON object is needed")
    return value


def json_value(value: Any, other: Callable[[Any], Any] = str) -> Any:
    """Any value as JSON values; numbers that JSON cannot hold (NaN, infinities) become None.

    Dataclasses and mappings become objects; tuples, sets and other iterables lists, sets sorted; numbers of numpy plain
    ones; paths texts, and the rest what `other` makes of it.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Real):
        number = plain_number(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: json_value(getattr(value, field.name), other) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_value(entry, other) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((json_value(entry, other) for entry in value), key=str)
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [json_value(entry, other) for entry in value]
    return other(value)


def plain_number(value: Any) -> float:
    """An int where the value is a whole number by its type (numpy's too; a bool is 0 or 1), else a float."""
    return int(value) if isinstance(value, numbers.Integral) else float(value)
