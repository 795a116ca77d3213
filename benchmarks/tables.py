"""Put tables from results/*.csv into README.md and docs/: no number in them is typed by hand.

python benchmarks/tables.py            # rewrites what stands between the markers
python benchmarks/tables.py --check    # exit code 1 if a table is not what results/ gives

A marker is an HTML comment naming the file and, if wanted, columns: <!-- table demo: file_size, kl --> ... <!-- end -->
(and, after a bar, a part of the subjects' names: <!-- table bit-linear: speedup | batch 32 --> ... <!-- end -->),
or a recipe whose claims are listed: <!-- claims parq --> ... <!-- end -->
or one metric of subjects that end in a width, a line a method: <!-- widths lowbit-arena: embedding_error --> ...
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from results import load, load_claims  # noqa: E402

MARKER = re.compile(
    r"(<!-- table (?P<name>[\w.-]+)(?:: (?P<metrics>[^>|]*?))?(?: \| (?P<rows>[^>]*?))? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)

CLAIMS = re.compile(r"(<!-- claims (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

WIDTHS = re.compile(r"(<!-- widths (?P<name>[\w.-]+): (?P<metric>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render_widths(match: re.Match[str]) -> str:
    """Subjects are "METHOD WIDTH bit"."""
    report = load(match["name"])
    _, lines = report.table([match["metric"]])
    cells = {subject.removesuffix(" bit"): cell for subject, cell in lines}
    split = [subject.rpartition(" ") for subject in cells]
    methods, widths = dict.fromkeys(s[0] for s in split), dict.fromkeys(s[2] for s in split)
    rows = [["", *(f"{width} bit" for width in widths)], ["---", *["---:"] * len(widths)]]
    rows += [[method, *(cells.get(f"{method} {width}", "") for width in widths)] for method in methods]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{match[1]}{table}\n{match[4]}"


def render_claims(match: re.Match[str]) -> str:
    claims = load_claims(match["name"])
    held = sum(holds for holds, _ in claims)
    lines = [f"{held} of {len(claims)} claims held.", ""]
    lines += [f"- {'held' if holds else '**NOT held**'}: {text}" for holds, text in claims]
    return f"{match[1]}{chr(10).join(lines)}\n{match[3]}"


def render(match: re.Match[str]) -> str:
    report = load(match["name"])
    metrics = [metric.strip() for metric in match["metrics"].split(",")] if match["metrics"] else None
    header, lines = report.table(metrics)
    lines = [line for line in lines if match["rows"] is None or match["rows"] in line[0]]
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    return f"{match[1]}{table}\n<!-- end -->"


def main() -> int:
    stale = []
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "src").rglob("README.md")),
    ]:
        text = path.read_text(encoding="utf-8")
        filled = WIDTHS.sub(render_widths, CLAIMS.sub(render_claims, MARKER.sub(render, text)))
        if filled != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv[1:]:
                path.write_text(filled, encoding="utf-8")
    print("tables: " + (", ".join(stale) or "all up to date"))
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
