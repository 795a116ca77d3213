"""Write the exact versions that `make demo`, `make test`, `make test-oldest` and CI install.

python constraints/lock.py                  (`make lock`; Python 3.11 or newer)
python constraints/lock.py --newest FILE    newest versions for the running Python alone, into FILE (`make test-latest`)

py3X.txt   newest versions for each supported Python, torch at its pin; the running Python is added where it is another
oldest.txt every dependency that users install at its lower bound in pyproject.toml, the rest as new as fits

uv resolves: unlike pip's --python-version it reads environment markers as the named Python does, needs no interpreter
of it, and takes seconds. Installing stays with pip.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
OLDEST_PYTHON = "3.11"
USED = ("llamacpp", "executorch", "onnx", "vision", "recsys")  # extras that users install
TOOLS = ("peers", "test", "lint", "docs")  # extras of this repository's own tests
BUILD = ("pip", "setuptools", "wheel")  # pinned too: an environment is built by them
# Parts of CUDA that some builds of torch ask for; torch names their exact versions itself.
IGNORED = re.compile(r"nvidia-|cuda-|triton$")


def lower_bounds(project: dict[str, object]) -> list[str]:
    """name==version of every dependency and every extra that users install, the higher of two bounds of one package.

    Raises SystemExit for a line without a bound.
    """
    tables: dict[str, list[str]] = {"": project["dependencies"], **project["optional-dependencies"]}  # type: ignore
    bounds: dict[str, str] = {}
    for line in [line for extra in ("", *USED) for line in tables[extra]]:
        bound = re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)(?:\s*,.*)?", line)
        if bound is None:
            raise SystemExit(f"pyproject.toml: {line!r} has no lower bound of the form name>=version")
        name, version = bound[1], bound[2]
        bounds[name] = max(version, bounds.get(name, version), key=lambda text: [int(part) for part in text.split(".")])
    return [f"{name}=={version}" for name, version in bounds.items()]


def compile_versions(uv: Path, python: str, *arguments: str) -> dict[str, str]:
    """Name -> exact version of one resolution."""
    command = [str(uv), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--allow-unsafe"]
    done = subprocess.run(
        [*command, "--python-version", python, *arguments], cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True
    )
    lines = (line.split("==") for line in done.stdout.splitlines() if "==" in line)
    return {name: version for name, version in lines if not IGNORED.match(name)}


def resolve(uv: Path, python: str, constraints: list[str], build: str) -> dict[str, str]:
    """Name -> version of the package with all its extras, and of the packages installed without dependencies."""
    extras = [argument for extra in (*USED, *TOOLS) for argument in ("--extra", extra)]
    options = [argument for path in constraints for argument in ("--constraint", path)]
    files = compile_versions(uv, python, "--no-deps", *options, str(HERE / "files-test.txt"))
    return {**files, **compile_versions(uv, python, *extras, *options, "pyproject.toml", build)}


def write(name: str, found: dict[str, str], what: str) -> None:
    lines = [f"# {what} Written by constraints/lock.py; do not edit."]
    lines += [f"{package}=={version}" for package, version in sorted(found.items())]
    (HERE / name).write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{name}: {len(found)} packages", flush=True)


def main() -> None:
    newest = sys.argv[2] if sys.argv[1:2] == ["--newest"] else None
    bounds = lower_bounds(tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        venv.create(folder / "uv", with_pip=True)
        subprocess.run([folder / "uv" / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"], check=True)
        uv = folder / "uv" / "bin" / "uv"
        build, oldest = folder / "build.in", folder / "oldest.in"
        build.write_text("\n".join(BUILD) + "\n", "utf-8")
        oldest.write_text("\n".join(bounds) + "\n", "utf-8")
        running = f"{sys.version_info.major}.{sys.version_info.minor}"
        if newest is not None:
            found = resolve(uv, running, [str(HERE / "pins.txt")], str(build))
            return write(str(Path(newest).resolve()), found, f"Newest versions for Python {running}.")
        for python in dict.fromkeys((*PYTHONS, running)):
            found = resolve(uv, python, [str(HERE / "pins.txt")], str(build))
            write(f"py{python.replace('.', '')}.txt", found, f"Python {python}.")
        write("oldest.txt", resolve(uv, OLDEST_PYTHON, [str(oldest)], str(build)), "Lower bounds of pyproject.toml.")


if __name__ == "__main__":
    main()
