"""Pages of the site that have their source elsewhere: README, the systems' pages, the reference of public names."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "edgewright"
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to those of docs/."""
    pages = {target: _linked((ROOT / source).read_text("utf-8"), ROOT) for source, target in ELSEWHERE.items()}
    rows = _catalogue()
    for slug in rows:
        page = _folder(slug) / "README.md"
        if page.is_file():
            pages[f"systems/{slug}.md"] = _linked(page.read_text("utf-8"), page.parent, "../")
    pages["systems/lowbit-arena.md"] = _linked(
        (_folder("lowbit-arena") / "README.md").read_text("utf-8"), _folder("lowbit-arena"), "../"
    )
    pages["systems/index.md"] = _systems(rows, set(pages))
    pages["api/index.md"] = _reference("edgewright", PACKAGE / "__init__.py", "Public names")
    for slug, row in rows.items():
        names = _folder(slug) / "__init__.py"
        if names.is_file():
            package = f"edgewright.systems.{names.parent.name}"
            pages[f"api/{slug}.md"] = _reference(package, names, row["title"])
            pages["api/index.md"] += f"\n- [{row['title']}]({slug}.md)"
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the pages in docs/ that leave docs/."""
    if page.file.generated_by:
        return markdown
    return _linked(markdown, (ROOT / "docs" / page.file.src_uri).parent, "../" * page.file.src_uri.count("/"))


def _catalogue() -> dict[str, dict[str, str]]:
    with (PACKAGE / "systems" / "catalogue.csv").open(encoding="utf-8", newline="") as file:
        return {row["slug"]: row for row in csv.DictReader(file)}


def _folder(slug: str) -> Path:
    return PACKAGE / "systems" / slug.replace("-", "_")


def _linked(text: str, base: Path, top: str = "") -> str:
    """The text with its relative links, which are right from `base`, made right from a page `top` below the site's."""

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[1].partition("#")
        if not target or "://" in target:
            return match[0]
        path = (base / target).resolve()
        anchor = f"#{anchor}" if anchor else ""
        if path.is_relative_to(PACKAGE / "systems") and path.name == "README.md":
            return f"]({top}systems/{path.parent.name.replace('_', '-')}.md{anchor})"
        if path.is_relative_to(ROOT / "docs"):
            return f"]({top}{path.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        elsewhere = ELSEWHERE.get(path.name) if path.parent == ROOT else None
        return f"]({top}{elsewhere}{anchor})" if elsewhere else match[0]

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def _systems(rows: dict[str, dict[str, str]], pages: set[str]) -> str:
    lines = ["# Systems", "", "| system | area | state | what it does |", "| --- | --- | --- | --- |"]
    for slug, row in rows.items():
        name = f"[{row['title']}]({slug}.md)" if f"systems/{slug}.md" in pages else row["title"]
        lines.append(f"| {name} | {row['area']} | {row['state']} | {row['summary']} |")
    return "\n".join([*lines, "", "One more page compares [all low-bit methods at equal bits](lowbit-arena.md).", ""])


def _names(path: Path) -> dict[str, str]:
    """Public name -> module that defines it, as a package lists them for type checkers."""
    blocks = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.If)]
    return {a.name: n.module for block in blocks for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}


def _reference(package: str, path: Path, title: str) -> str:
    """A page with the documentation of every public name; what the top level has too is described there."""
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    parts = [f"# {title}", "", f"`from {package} import ...`", "", doc, ""]
    top = {} if package == "edgewright" else _names(PACKAGE / "__init__.py")
    for name, module in sorted(_names(path).items(), key=lambda item: item[0].lower()):
        if top.get(name) == module:
            parts += [f"`{name}`: see [the public names](index.md).", ""]
        else:
            parts += [f"::: {module}.{name}", ""]
    return "\n".join(parts)
