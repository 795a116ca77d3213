"""Print how many lines each module has, longest first: a module past the limit is usually two rooms in one.

python tools/module_sizes.py
"""

from __future__ import annotations

import statistics
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "edgewright"
LIMIT = 400


def module_sizes(package: Path = PACKAGE) -> dict[str, int]:
    """Path below the package -> lines, longest first."""
    sizes = {p.relative_to(package).as_posix(): len(p.read_text("utf-8").splitlines()) for p in package.rglob("*.py")}
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def main() -> None:
    sizes = module_sizes()
    for path, lines in sizes.items():
        print(f"{lines:5d}  {path}{'  over the limit' if lines > LIMIT else ''}")
    median = statistics.median(lines for path, lines in sizes.items() if not path.endswith("__init__.py"))
    print(f"{len(sizes)} modules, {sum(sizes.values())} lines, median {median:g}, limit {LIMIT}")


if __name__ == "__main__":
    main()
