"""The rules of the layout: what imports what, how large a system may be, that every part is there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import runpy
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import edgewright
from edgewright import cli
from edgewright.systems import catalogue
from edgewright.systems.recipe import load_recipe, runnable
from tests.processes import ROOT

PACKAGE = ROOT / "src" / "edgewright"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LATE = 150  # names of the package imported inside functions
LONGEST_MODULE = 600

# Systems over the budget of 8 source files, 1,200 lines of method and 250 of recipe, each with its reason.
OVER_BUDGET = {
    "check-n-run": "a checkpoint engine of its own, with an asynchronous writer, restore, updates and three stores",
    "distributed-lion": "votes by two topologies at three widths, under DDP and FSDP, and checkpoints of all momenta",
    "dlrm": "two data sets, sharded tables and serving",
    "low-precision-recsys": "eight number formats with layers, search, gate, monitor and exporters",
    "mobilemoe": "backends, parallel experts, design and upcycling",
    "parq": "proximal maps, LSBQ and their theory",
    "r-sparse": "calibration, search, kernel and folder",
    "stem": "store, cache and reading ahead for tables outside of memory; editing",
}
# Small jobs that are done in one place: what the source says that does them, and the modules that may say it.
ONE_PLACE: dict[str, tuple[str, ...]] = {
    r"(import|from) hashlib\b|\bzlib\.crc32\b|from (zlib|binascii) import .*crc": ("io/hashing.py",),
    r"\brich\.progress\b": ("measure/progress.py",),
    r"setattr\(\w+\.get_submodule\(|\bdef set_submodule\b": (),  # nn.Module has set_submodule
    r"torch\.distributed\.(_?tensor)\b|\.(to_local|full_tensor)\(|\b_local_tensor\b|\.placements\b": (
        "training/distributed.py",
    ),
    r"\bif math\.isfinite\(\w+\) else None": ("io/json_file.py",),
    r"is not an empty folder": ("io/run_folder.py",),
    # ggml's block formats, each an expression of its own, stand where they are written and read
    r"(<<|>>) \(?(bits|width) \*|\bpackbits\(|\bunpackbits\(": (
        "export/gguf/blocks.py",
        "io/bits.py",
        "io/gguf/types.py",
    ),
    r"0xBF58476D1CE4E5B9|\bSeedSequence\(.*>> ?1\b": ("io/hashing.py",),
}

# What must not be imported before a command has something to do with it.
HEAVY = {"torch", "transformers", "accelerate", "numpy", "matplotlib", "rich", "gguf", "safetensors", "tokenizers"}


def tool(name: str) -> ModuleType:
    """A module of benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


structure = tool("structure")


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert structure.circles() == []


def test_few_names_are_imported_inside_functions() -> None:
    assert structure.late_names() <= MOST_LATE


def test_the_core_imports_no_system() -> None:
    assert structure.up() == []


def test_a_system_imports_another_only_where_the_catalogue_says_so() -> None:
    pairs = structure.across()
    assert pairs == structure.requires()


def test_systems_keep_their_budget() -> None:
    sizes = structure.sizes()
    over = {slug for slug, size in sizes.items() if size.files > 8 or size.method > 1200}
    assert over == set(OVER_BUDGET)
    assert [slug for slug, size in sizes.items() if size.recipe > 250] == []
    assert statistics.median(size.method + size.recipe for size in sizes.values()) <= 1300
    for slug in sorted(over):
        told = f"over the budget of a system: {slug}, {sizes[slug].files} files, {sizes[slug].method} lines"
        warnings.warn(f"{told}: {OVER_BUDGET[slug]}", stacklevel=1)


def test_a_small_job_is_done_in_one_place() -> None:
    for pattern, places in ONE_PLACE.items():
        modules = [path for path in MODULES if re.search(pattern, path.read_text("utf-8"))]
        assert [path.relative_to(PACKAGE).as_posix() for path in modules] == list(places), pattern


def test_two_classes_never_share_a_name() -> None:
    assert structure.class_names_used_twice() == []


def test_modules_stay_readable() -> None:
    assert [name for name, module in structure.modules().items() if module.lines > LONGEST_MODULE] == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_answers_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(cli.COMMANDS[name][0])
    assert callable(module.add_arguments) and callable(module.run) and module.__doc__
    with pytest.raises(SystemExit) as leave:
        cli.main([name, "--help"])
    assert leave.value.code == 0
    assert f"edgewright {name}" in capsys.readouterr().out


def test_commands_are_light_until_they_run() -> None:
    modules = [module for module, _ in cli.COMMANDS.values()]
    code = f"import sys\nfor m in {modules}: __import__(m)\nprint(*sorted({HEAVY} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_public_names_resolve() -> None:
    assert set(edgewright.__all__) <= set(dir(edgewright))
    for name in edgewright.__all__:
        assert getattr(edgewright, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        edgewright.nonsense  # noqa: B018


def test_the_version_is_said_once() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    written = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    assert written is None or written[1] == edgewright.__version__
    assert f"## {edgewright.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("row", [r for r in catalogue.systems() if r.state != "planned"], ids=lambda row: row.slug)
def test_a_built_system_has_all_its_parts(row: catalogue.System) -> None:
    assert row.slug in runnable(), "no recipe"
    assert load_recipe(row.slug).CLAIMS, "a recipe that claims nothing shows nothing"
    assert row.headline, "no headline: name one in the recipe and run benchmarks/headlines.py"
    folder = catalogue.folder_of(row.slug)
    page = (folder / "README.md").read_text("utf-8")
    claims = tool("results").load_claims(row.slug)
    assert len(claims) == sum("small" in claim.sizes for claim in load_recipe(row.slug).CLAIMS), "claims of another run"
    assert f"<!-- claims {row.slug} -->" in page, "the page does not list the claims"
    assert importlib.import_module(f"edgewright.systems.{folder.name}").__all__, "no public names"


def test_public_names_are_the_same_for_people_and_type_checkers() -> None:
    for path in MODULES:
        if path.name == "__init__.py" and "lazy(" in path.read_text("utf-8"):
            package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
            module = importlib.import_module(package)
            tree = ast.parse(path.read_text("utf-8"))
            blocks = [node for node in tree.body if isinstance(node, ast.If)]
            typed = {a.name: n.module for b in blocks for n in b.body if isinstance(n, ast.ImportFrom) for a in n.names}
            assert set(typed) == set(module.__all__) - {"__version__"}, package
            # Importing package.x binds the attribute x of the package: a function of that name would come and go.
            assert not {other.stem for other in path.parent.iterdir()} & set(typed), package
            for name, home in typed.items():
                assert getattr(module, name) is getattr(importlib.import_module(str(home)), name)


def test_every_system_with_a_folder_has_a_recipe_that_runs() -> None:
    folders = {path.parent.name.replace("_", "-") for path in (PACKAGE / "systems").glob("*/recipe.py")}
    assert folders == set(runnable())


def test_headlines_come_from_results() -> None:
    measured = runpy.run_path(str(ROOT / "benchmarks" / "headlines.py"))["measured"]()
    kept = {row.slug: {"headline": row.headline, "claims": list(row.claims)} for row in catalogue.systems()}
    assert measured == {slug: row for slug, row in kept.items() if row["headline"]}


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), f"{path} has no docstring"


def test_no_machine_path_or_registry_is_named() -> None:
    machine_path = re.compile(r"(?<![\w./~:<>-])/(?:root|home|work|mnt|Users)/\w")
    registry_host = re.compile(r"pypi\.org|pythonhosted|npmjs\.(?:org|com)|deb\.debian|download\.pytorch")
    for path in tracked_texts():
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            for pattern in (machine_path, registry_host):
                if path != Path(__file__).resolve():  # which has to spell what it looks for
                    assert not pattern.search(line), f"{path}:{number}: {line.strip()}"


def tracked_texts() -> Iterator[Path]:
    suffixes = {".py", ".md", ".toml", ".csv", ".json", ".txt", ".cpp", ".h", ".yml", ".yaml", ""}
    folders = [ROOT / name for name in ("src", "tests", "docs", "benchmarks", "examples", "results", ".ci", ".github")]
    paths = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    for path in paths:
        hidden = {"__pycache__", "edgewright.egg-info", ".DS_Store", ".git"} & set(path.parts)  # .git may be a file
        if path.is_file() and path.suffix in suffixes and not hidden:
            yield path
