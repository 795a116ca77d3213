"""Type checkers and editors see real types behind every public name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from mypy import api

from tests.processes import ROOT

PACKAGE = ROOT / "src" / "edgewright"


def test_no_public_name_is_any(tmp_path: Path) -> None:
    packages = ["edgewright"]
    for path in sorted((PACKAGE / "systems").glob("*/__init__.py")):
        if "lazy(" in path.read_text("utf-8"):
            packages.append(f"edgewright.systems.{path.parent.name}")
    lines = []
    for package in packages:
        lines.append(f"import {package}")
        lines += [f"reveal_type({package}.{name})" for name in importlib.import_module(package).__all__]
    file = tmp_path / "names.py"
    file.write_text("\n".join(lines) + "\n")
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    printed, errors, _ = api.run([*options, str(file)])
    revealed = dict(re.findall(r':(\d+): note: Revealed type is "(.*)"', printed))
    assert len(revealed) == sum(line.startswith("reveal") for line in lines), printed + errors
    loose = {lines[int(number) - 1]: kind for number, kind in revealed.items() if kind == "Any"}
    assert not loose and ": error:" not in printed, printed[-2000:]
    functions = {lines[int(number) - 1]: kind for number, kind in revealed.items() if kind.startswith("def ")}
    assert not [name for name, kind in functions.items() if kind.endswith("-> Any")]
