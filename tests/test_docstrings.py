"""What the documentation of public names says: every argument by name, what comes back, and where a method is from."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.processes import ROOT

PACKAGE = ROOT / "src" / "edgewright"
PACKAGES = [
    "edgewright",
    *(
        f"edgewright.systems.{path.parent.name}"
        for path in sorted((PACKAGE / "systems").glob("*/__init__.py"))
        if "lazy(" in path.read_text("utf-8")
    ),
]

CONVENTIONAL = ("state_dict", "load_state_dict", "to_dict")


def public(package: str) -> Iterator[tuple[str, Any]]:
    """Functions, classes and public methods behind the names of a package."""
    for name in importlib.import_module(package).__all__:
        value = getattr(importlib.import_module(package), name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield name, value
            for label, method in vars(value).items():
                function = getattr(method, "__func__", method)
                own = inspect.isfunction(function) and function.__module__.startswith("edgewright")
                # what every torch module, optimizer or configuration has needs no second description
                if (
                    own
                    and label not in CONVENTIONAL
                    and not label.startswith("_")
                    and not any(hasattr(base, label) for base in value.__mro__[1:])
                ):
                    yield f"{name}.{label}", function


def problems(name: str, value: Any) -> Iterator[str]:
    text = inspect.getdoc(value) or ""
    if not text:
        yield f"{name} has no docstring"
        return
    if text.startswith("As `"):  # of a protocol, where it is described
        return
    if inspect.isclass(value):
        if dataclasses.is_dataclass(value):
            own = inspect.get_annotations(value)  # not those of a base of another library
            names = [
                one.name for one in dataclasses.fields(value) if one.init and one.name in own and one.name[0] != "_"
            ]
        else:
            init = vars(value).get("__init__")
            names = list(inspect.signature(init).parameters)[1:] if inspect.isfunction(init) else []
            text += inspect.getdoc(init) or "" if init else ""
        returns = False
    else:
        signature = inspect.signature(value)
        names = [one for one in signature.parameters if one not in ("self", "cls")]
        # the line of a method says what it gives
        returns = "." not in name and signature.return_annotation not in (None, "None", inspect.Signature.empty)
        if len(names) < 2 and name.count("."):  # a method of one argument says everything in its line
            return
    missing = [one for one in names if not re.search(rf"(?m)^ +{re.escape(one)}: ", text)]
    if missing:
        yield f"{name} does not describe {', '.join(missing)}"
    if names and "Args:" not in text and "Attributes:" not in text:
        yield f"{name} has no Args"
    if returns and "Returns:" not in text and "Yields:" not in text:
        yield f"{name} has no Returns"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_described(package: str) -> None:
    found = [problem for name, value in public(package) for problem in problems(name, value)]
    assert not found, "\n".join(found)
