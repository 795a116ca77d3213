"""A recipe's settings, changed from the command line: `--set path=value`, typed by the fields of the dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from edgewright.errors import UsageError
from edgewright.io.json_file import json_value
from edgewright.systems.catalogue import did_you_mean

T = TypeVar("T")

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def override(settings: T, assignments: Iterable[str]) -> T:
    """A copy of the frozen dataclass `settings` with each `path=value` applied, e.g. `training.steps=40`.

    A value is read as its field's type: numbers, text, true/false, none where allowed, a Literal's choices,
    comma-separated tuples. UsageError names the fields when the path is unknown, and the type when
    the value does not fit.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment!r} has no value; write --set {assignment.strip() or 'PATH'}=VALUE")
        settings = _replace(settings, path.strip().split("."), text.strip(), settings)
    return settings


def fields_of(settings: Any) -> Iterator[tuple[str, Any]]:
    """Every setting that can be changed, as (dotted path, value), nested dataclasses walked."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{path}", inner) for path, inner in fields_of(value))
        else:
            yield field.name, value


def plain(settings: Any) -> Any:
    """The settings as JSON values, so that two runs can be told apart by comparing them."""
    return json_value(settings, _no_setting)


def _no_setting(value: Any) -> None:
    raise TypeError(f"a recipe's settings hold {value!r}; only numbers, texts, paths, tuples and dataclasses are kept")


def _replace(settings: Any, keys: list[str], text: str, root: Any) -> Any:
    key, *rest = keys
    kinds = typing.get_type_hints(type(settings))
    if key not in {field.name for field in dataclasses.fields(settings)}:
        raise _unknown(".".join(keys), root)
    value = getattr(settings, key)
    if rest and dataclasses.is_dataclass(value):
        return dataclasses.replace(settings, **{key: _replace(value, rest, text, root)})  # type: ignore[arg-type]
    if rest or dataclasses.is_dataclass(value):
        raise _unknown(".".join(keys), root)
    try:
        return dataclasses.replace(settings, **{key: _read(text, kinds[key])})
    except UsageError:
        raise  # the dataclass checks its own values
    except ValueError as error:
        raise UsageError(f"--set {key}={text}: {error}; now {key}={value}") from None


def _unknown(path: str, root: Any) -> UsageError:
    known = [name for name, _ in fields_of(root)]
    return UsageError(f"no setting is called {path!r}{did_you_mean(path, known)}; settings: {', '.join(known)}")


def _read(text: str, kind: Any) -> Any:
    """`text` as a value of type `kind`; ValueError says what was expected."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_union(text, arguments)
    if origin is typing.Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        raise ValueError(f"expected one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        items = [item.strip() for item in text.split(",")] if text else []
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_read(item, arguments[0]) for item in items)
        if len(items) != len(arguments):
            raise ValueError(f"expected {len(arguments)} comma-separated values")
        return tuple(_read(item, inner) for item, inner in zip(items, arguments, strict=True))
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError("expected true or false")
        return _BOOLEANS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is no {'whole number' if kind is int else 'number'}") from None
    if kind in (str, Path):
        return kind(text)
    raise ValueError(f"a setting of type {kind} cannot be given on the command line")


def _read_union(text: str, kinds: tuple[Any, ...]) -> Any:
    if type(None) in kinds and text.lower() in ("none", ""):
        return None
    problems = []
    for kind in sorted((k for k in kinds if k is not type(None)), key=lambda k: k is str):  # text fits anything: last
        try:
            return _read(text, kind)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems))
