"""The figures of the layout's rules, read from the source as text: one command for the table before and after.

python benchmarks/structure.py            # a line for each rule, and the places where one is broken
"""

from __future__ import annotations

import ast
import csv
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from edgewright.systems.recipe import STUDIES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "edgewright"
# Modules that name systems through a lazy table.
TABLES = ("edgewright.models.decoder.kinds", "edgewright.cli", "edgewright.commands", "edgewright.systems.recipe")


@dataclass
class Module:
    """imports: modules of the package, wherever they are imported. late: names imported inside functions."""

    path: Path
    lines: int
    raises: int
    imports: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)  # in texts: lazy tables
    late: int = 0
    classes: list[str] = field(default_factory=list)


@cache
def modules() -> dict[str, Module]:
    """Every module of the package by its dotted name."""
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("edgewright", *path.relative_to(PACKAGE).with_suffix("").parts))
        paths[name.removesuffix(".__init__")] = path
    return {name: _read(name, path, paths) for name, path in paths.items()}


def _read(name: str, path: Path, known: dict[str, Path]) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = Module(path, len(text.splitlines()), sum(isinstance(node, ast.Raise) for node in ast.walk(tree)))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(n) for f in functions for n in ast.walk(f) if isinstance(n, ast.ImportFrom)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found.imports |= {target if target in known else node.module for target in whole}
            if id(node) in inside and node.module.startswith("edgewright"):
                found.late += len(node.names)
        elif isinstance(node, ast.Import):
            found.imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            found.classes.append(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known:
            found.named.add(node.value)
    found.imports = (found.imports & known.keys()) - {name}
    return found


def system_of(name: str) -> str | None:
    """The slug of the system that a module belongs to, None for the core."""
    parts = name.split(".")
    inside = len(parts) > 2 and parts[1] == "systems" and (PACKAGE / "systems" / parts[2]).is_dir()
    return parts[2].replace("_", "-") if inside else None


def circles() -> list[list[str]]:
    """Groups of modules that import one another, imports in functions and for type checkers counted (Tarjan)."""
    sys.setrecursionlimit(10_000)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in modules()[name].imports:
            if target not in order:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in modules():
        if name not in order:
            visit(name)
    return groups


def late_names() -> int:
    """Names of the package that are imported inside functions."""
    return sum(module.late for module in modules().values())


def up() -> list[tuple[str, str]]:
    """(module of the core, module of a system that it names), outside the lazy tables."""
    return [
        (name, target)
        for name, module in modules().items()
        if system_of(name) is None and not name.startswith(TABLES)
        for target in sorted(module.imports | module.named)
        if system_of(target) is not None
    ]


def across() -> set[tuple[str, str]]:
    """(system, another system that it imports); studies, which compare systems, are none."""
    pairs = {(system_of(name), system_of(target)) for name, m in modules().items() for target in m.imports | m.named}
    return {(a, b) for a, b in pairs if a is not None and b is not None and a != b and a not in STUDIES}


def requires() -> set[tuple[str, str]]:
    """The same pairs as the catalogue allows them."""
    with (PACKAGE / "systems" / "catalogue.csv").open(encoding="utf-8", newline="") as file:
        return {(row["slug"], other) for row in csv.DictReader(file) for other in row["requires"].split()}


@dataclass(frozen=True)
class Size:
    """Of a system: source files, lines outside its recipe, lines of the recipe."""

    files: int
    method: int
    recipe: int


def sizes() -> dict[str, Size]:
    """Every system's size, by slug."""
    found: dict[str, list[Module]] = {}
    for name, module in modules().items():
        if (slug := system_of(name)) is not None:
            found.setdefault(slug, []).append(module)
    return {
        slug: Size(
            len(parts),
            sum(part.lines for part in parts if part.path.name != "recipe.py"),
            sum(part.lines for part in parts if part.path.name == "recipe.py"),
        )
        for slug, parts in sorted(found.items())
    }


def class_names_used_twice() -> list[str]:
    """Public classes of one name in two modules; recipes, which nobody imports from, are left out."""
    parts = [m for name, m in modules().items() if system_of(name) is None or m.path.name != "recipe.py"]
    names = Counter(name for module in parts for name in module.classes if not name.startswith("_"))
    return sorted(name for name, count in names.items() if count > 1)


def code_lines(path: Path) -> int:
    """Lines that are no docstring, no comment and not empty."""
    text = path.read_text(encoding="utf-8")
    told: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(number not in told and bool(line.strip()) and line.strip()[0] != "#" for number, line in lines)


def main() -> int:
    lines = sum(module.lines for module in modules().values())
    print(f"import circles: {len(circles())} (at most 0)")
    for group in circles():
        print("   " + ", ".join(group))
    print(f"names of the package imported inside functions: {late_names()} (at most 150)")
    code = sum(code_lines(module.path) for module in modules().values())
    print(f"source lines: {lines} in {len(modules())} modules (at most 52,000), {code} of them code")
    print(f"raises per 1,000 lines: {1000 * sum(m.raises for m in modules().values()) / lines:.1f} (at most 15)")
    print(f"imports from the core to a system: {len(up())} (at most 0)")
    for name, target in up():
        print(f"   {name} -> {target}")
    pairs = across()
    print(f"system to system: {', '.join(f'{a} -> {b}' for a, b in sorted(pairs))}")
    print(f"   without a row of `requires`: {sorted(pairs - requires())}")
    found = sizes()
    print(f"median system: {statistics.median(s.files for s in found.values()):g} files (at most 6), ", end="")
    print(f"{statistics.median(s.method + s.recipe for s in found.values()):g} lines with recipe (at most 1,300)")
    for slug, size in found.items():
        if size.files > 8 or size.method > 1200 or size.recipe > 250:
            print(f"   over the budget: {slug}: {size.files} files, {size.method} lines, recipe {size.recipe}")
    print(f"class names used twice: {', '.join(class_names_used_twice()) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
