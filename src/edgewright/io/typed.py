"""A frozen configuration from JSON: every value of the type that its field declares, before anything uses it."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgewright.errors import EdgewrightError, FormatError, UsageError

Config = TypeVar("Config")


def from_json(
    kind: type[Config], fields: Mapping[str, Any], where: str | Path, error_type: type[EdgewrightError] = FormatError
) -> Config:
    """An instance of a dataclass of which a file holds the fields.

    Args:
        kind: the dataclass; numbers, texts, truth values, tuples of these, and dataclasses may be its fields.
        fields: as JSON gives them: lists stand for tuples, objects for dataclasses.
        where: the file, for the message.
        error_type: what is raised; `UsageError` where the fields may come from a caller as well.

    Raises:
        FormatError: (or `error_type`) a field that is unknown, missing or of another type, or values that the dataclass
            refuses.
    """
    if not isinstance(fields, Mapping):
        raise error_type(f"{where} holds {type(fields).__name__} where the fields of {kind.__name__} are needed")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in fields.items():
        if name not in hints:
            raise error_type(f"{where} has the field {str(name)[:80]!r}, which {kind.__name__} does not have")
        try:
            values[name] = _convert(hints[name], value, where)
        except TypeError:
            raise error_type(f"{where}: {name} of {kind.__name__} cannot be {value!r:.80}") from None
    try:
        return kind(**values)
    except EdgewrightError as error:
        raise error_type(f"{where} is no {kind.__name__}: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:  # a field without a default that is missing
        raise error_type(f"{where} is no {kind.__name__}: {error!s:.300}") from error


def check_fields(kind: type, holder: Any) -> None:
    """Hold the attributes of an object against the types that `kind`, and no base of it, declares for them.

    For configurations whose class is another library's, which makes them from files itself.

    Raises:
        UsageError: an attribute of another type.
    """
    for name, hint in inspect.get_annotations(kind, eval_str=True).items():
        value = getattr(holder, name)
        try:
            _convert(hint, value, kind.__name__)
        except TypeError:
            wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else None
            raise UsageError(f"{name} of {kind.__name__} cannot be {value!r:.80}; give {wanted or hint}") from None


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
