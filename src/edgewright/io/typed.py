"""A frozen configuration from JSON: every value of the type that its field declares, before anything uses it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgewright.errors import EdgewrightError, FormatError

Config = TypeVar("Config")


def from_json(kind: type[Config], fields: Mapping[str, Any], where: str | Path) -> Config:
    """An instance of a dataclass of which a file holds the fields.

    Args:
        kind: the dataclass; numbers, texts, truth values, tuples of these, and dataclasses may be its fields.
        fields: as JSON gives them: lists stand for tuples, objects for dataclasses.
        where: the file, for the message.

    Raises:
        FormatError: a field that is unknown, missing or of another type, or values that the dataclass refuses.
    """
    if not isinstance(fields, Mapping):
        raise FormatError(f"{where} holds {type(fields).__name__} where the fields of {kind.__name__} are needed")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in fields.items():
        if name not in hints:
            raise FormatError(f"{where} has the field {str(name)[:80]!r}, which {kind.__name__} does not have")
        try:
            values[name] = _convert(hints[name], value, where)
        except TypeError:
            raise FormatError(f"{where}: {name} of {kind.__name__} cannot be {value!r:.80}") from None
    try:
        return kind(**values)
    except EdgewrightError as error:
        raise FormatError(f"{where} is no {kind.__name__}: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:  # a field without a default that is missing
        raise FormatError(f"{where} is no {kind.__name__}: {error!s:.300}") from error


def _convert(hint: Any, value: Any, where: str | Path) -> Any:
    """The value as a field of this type takes it; TypeError where it does not."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(option, value, where)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if isinstance(value, str | int) and value in arguments:
            return value
        raise TypeError
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise TypeError
        inner = list(arguments or (Any,))
        if origin is list or (len(inner) == 2 and inner[1] is ...):
            inner = [inner[0]] * len(value)
        if len(inner) != len(value):
            raise TypeError
        return origin(_convert(one, part, where) for one, part in zip(inner, value, strict=True))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError
        return {_convert(arguments[0], k, where): _convert(arguments[1], v, where) for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise TypeError
        return from_json(hint, value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if hint in (int, str, bool, type(None)) and type(value) is hint:
        return value
    raise TypeError
