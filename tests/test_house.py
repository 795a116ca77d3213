"""The rules of the house: imports go down, doors open fast, modules stay small, nothing is left lying."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import edgewright
from edgewright import cli, systems
from edgewright.recipes.recipe import load_recipe, runnable

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "edgewright"

# From the ground up: a room imports only what stands before it. `edgewright/x/y.py` and `edgewright/x.py` are room x.
GROUND = ["errors"]
FOUNDATION = ["io", "kernels", "measure", "evaluation", "runtime", "export", "training"]
TECHNIQUES = ["curation", "merging", "alignment", "optim", "distillation", "search", "sparsity", "quantization"]
DOMAINS = ["language", "vision", "audio", "video", "spatial", "recsys"]
ROOF = ["systems", "__init__", "compression", "recipes", "verbs", "cli", "__main__"]
ORDER = GROUND + FOUNDATION + TECHNIQUES + DOMAINS + ROOF

# Modules that may be longer than the limit, each with its reason.
LONG_MODULES: dict[str, str] = {}

# What must not be imported before a command has something to do with it.
HEAVY = {"torch", "transformers", "accelerate", "numpy", "matplotlib", "rich", "gguf", "safetensors", "tokenizers"}


def imported_rooms(source: str, module: str, rooms: set[str]) -> Iterator[tuple[int, str]]:
    """(line, room) of every edgewright import in `source`, at any depth, and of every module named in a text.

    `module` is the dotted name of the file. Importing from the package itself counts as the room `__init__`, unless
    the name is a room.
    """
    for node in ast.walk(ast.parse(source)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            targets = [f"{base}.{alias.name}" for alias in node.names] if base == "edgewright" else [base]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"edgewright(\.\w+)+", node.value):  # import_module("..."), lazy tables
                targets = [node.value]
        for target in targets:
            top, _, rest = target.partition(".")
            if top == "edgewright":
                room = rest.partition(".")[0]
                yield node.lineno, room if room in rooms else "__init__"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in MODULES} <= set(ORDER)


# The package's own file is left out: its lazy table names every floor, it is the way in from outside.
@pytest.mark.parametrize(
    "path", [p for p in MODULES if p != PACKAGE / "__init__.py"], ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_imports_go_down_only(path: Path) -> None:
    here = room_of(path)
    for line, room in imported_rooms(path.read_text("utf-8"), module_name(path), set(ORDER)):
        assert room == here or ORDER.index(room) < ORDER.index(here), f"{path}:{line}: {here} imports {room}, above it"


def test_the_floor_reader_sees_every_kind_of_import() -> None:
    source = """
import edgewright.recipes.recipe
from edgewright import load, io
def late():
    from edgewright.training.loop import fit
    from . import sibling
    from ..optim import lion
    import_module("edgewright.verbs.run")
"""
    found = list(imported_rooms(source, "edgewright.search.space", set(ORDER)))
    assert sorted(room for _, room in found) == ["__init__", "io", "optim", "recipes", "search", "training", "verbs"]


def test_recipes_are_imported_by_the_command_line_only() -> None:
    for path in MODULES:
        if room_of(path) not in ("recipes", "verbs", "__init__"):
            rooms = {room for _, room in imported_rooms(path.read_text("utf-8"), module_name(path), set(ORDER))}
            assert "recipes" not in rooms, path


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_can_be_opened(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(cli.VERBS[verb][0])
    assert callable(module.add_arguments) and callable(module.run) and module.__doc__
    with pytest.raises(SystemExit) as leave:
        cli.main([verb, "--help"])
    assert leave.value.code == 0
    assert f"edgewright {verb}" in capsys.readouterr().out


def test_verbs_are_light_until_they_run() -> None:
    modules = [module for module, _ in cli.VERBS.values()]
    code = f"import sys\nfor m in {modules}: __import__(m)\nprint(*sorted({HEAVY} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_public_names_resolve() -> None:
    assert set(edgewright.__all__) <= set(dir(edgewright))
    for name in edgewright.__all__:
        assert getattr(edgewright, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        edgewright.nonsense  # noqa: B018


def test_public_names_hide_no_module() -> None:
    # Importing edgewright.x binds the attribute x of the package: a function of that name would come and go.
    assert not {path.stem for path in PACKAGE.iterdir()} & set(edgewright.__all__)


def test_the_version_is_said_once() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    written = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    assert written is None or written[1] == edgewright.__version__
    assert f"## {edgewright.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("row", [row for row in systems.systems() if row.state != "planned"], ids=lambda row: row.slug)
def test_a_built_system_has_all_its_parts(row: systems.System) -> None:
    assert row.slug in runnable(), "no recipe"
    assert load_recipe(row.slug).CLAIMS, "a recipe that claims nothing proves nothing"
    assert row.headline, "no headline: name one in the recipe and run benchmarks/headlines.py"
    page = ROOT / "docs" / "systems" / f"{row.slug}.md"
    assert page.is_file(), "no page"
    claims = results_module().load_claims(row.slug)
    assert len(claims) == sum("small" in claim.sizes for claim in load_recipe(row.slug).CLAIMS), "claims of another run"
    assert all(held for held, _ in claims) == (row.state == "working"), "the state is not what the claims say"
    assert f"<!-- claims {row.slug} -->" in page.read_text("utf-8"), "the page does not list the claims"


def results_module() -> ModuleType:
    """benchmarks/results.py"""
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_is_in_the_catalogue() -> None:
    frame = {"__init__", "recipe", "seeds", "sentences", "settings", "stem_smollm2"}  # shared parts
    names = {path.stem.replace("_", "-") for path in (PACKAGE / "recipes").glob("*.py") if path.stem not in frame}
    assert names == set(runnable())


def test_headlines_come_from_results() -> None:
    tool = runpy.run_path(str(ROOT / "benchmarks" / "headlines.py"))
    assert tool["headlines"]() == {row.slug: row.headline for row in systems.systems() if row.headline}


def test_modules_stay_small() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "module_sizes.py"))
    long = {path for path, lines in tool["module_sizes"]().items() if lines > tool["LIMIT"]}
    assert long == set(LONG_MODULES)


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), f"{path} has no docstring"


def test_nothing_of_the_workshop_is_left_lying() -> None:
    machine_path = re.compile(r"(?<![\w./~:<>-])/(?:root|home|work|mnt|Users)/\w")
    registry_host = re.compile(r"pypi\.org|pythonhosted|npmjs\.(?:org|com)|deb\.debian|download\.pytorch")
    for path in tracked_texts():
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            for pattern in (machine_path, registry_host):
                if path != Path(__file__).resolve():  # which has to spell what it looks for
                    assert not pattern.search(line), f"{path}:{number}: {line.strip()}"


def tracked_texts() -> Iterator[Path]:
    suffixes = {".py", ".md", ".toml", ".csv", ".json", ".txt", ".cpp", ".h", ".yml", ".yaml", ""}
    folders = [ROOT / name for name in ("src", "tests", "docs", "benchmarks", "tools", "results", ".ci")]
    paths = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    for path in paths:
        hidden = {"__pycache__", "edgewright.egg-info"} & set(path.parts)
        if path.is_file() and path.suffix in suffixes and not hidden and path.name != ".DS_Store":
            yield path
