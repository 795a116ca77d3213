"""The report every tool ends with: rows of (metric, value, standard error, n, unit) per subject."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import write_text
from edgewright.io.json_file import json_value, plain_number, read_json

if TYPE_CHECKING:
    from rich.console import Console

ROW_KEYS = ("metric", "value", "se", "n", "unit", "subject")
MAX_REPORT_BYTES = 64 * 2**20  # a report is small; anything larger is not one of ours


@dataclasses.dataclass(frozen=True)
class Row:
    """One number: `value` of `metric` for `subject`, with its standard error `se` over `n` observations, in `unit`."""

    metric: str
    value: float
    se: float | None = None
    n: int | None = None
    unit: str = ""
    subject: str = ""

    def text(self) -> str:
        """`value ± se`, both rounded where the error begins; a value without error gets four significant digits."""
        return format_value(self.value, self.se)


class Report:
    """Rows in the order they were added, with the machine, the versions and the settings that produced them.

    Args:
        title: heading of report.md.
        settings: JSON values that decide the result.
    """

    def __init__(self, title: str, settings: Mapping[str, Any] | None = None) -> None:
        self.title = title
        self.settings: dict[str, Any] = dict(settings or {})
        self.notes: list[str] = []
        self._rows: dict[tuple[str, str], Row] = {}
        self._machine: dict[str, Any] | None = None
        self._versions: dict[str, str] | None = None

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(row.subject for row in self.rows))

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(row.metric for row in self.rows))

    def add(
        self,
        metric: str,
        value: float,
        *,
        subject: str = "",
        se: float | None = None,
        n: int | None = None,
        unit: str = "",
    ) -> Row:
        """Add one number; a second one of the same metric and subject takes the place of the first.

        Args:
            metric: what was measured, such as "kl".
            value: NaN and infinities are kept, and become null in JSON.
            subject: of which candidate; a row of the table.
            se: standard error of the value.
            n: observations behind it.
            unit: such as "nats/token".

        Returns:
            The row.
        """
        error, count = None if se is None else float(se), None if n is None else int(n)
        row = self._rows[metric, subject] = Row(metric, plain_number(value), error, count, unit, subject)
        return row

    def value(self, metric: str, subject: str = "") -> float:
        """One number.

        Args:
            metric: as it was added.
            subject: as it was added.

        Returns:
            The value.

        Raises:
            UsageError: it was not measured; the message says what was.
        """
        return self.row(metric, subject).value

    def row(self, metric: str, subject: str = "") -> Row:
        """As `value`, the whole row.

        Args:
            metric: as it was added.
            subject: as it was added.

        Returns:
            Value, standard error, number of observations and unit.

        Raises:
            UsageError: it was not measured; the message says what was.
        """
        try:
            return self._rows[metric, subject]
        except KeyError:
            known = f"metrics: {', '.join(self.metrics) or 'none'}; subjects: {', '.join(self.subjects) or 'none'}"
            raise UsageError(f"the report {self.title!r} has no {metric!r} for {subject!r}; {known}") from None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; numbers that JSON cannot hold (NaN, infinities) become None."""
        if self._machine is None or self._versions is None:
            from edgewright.measure.machine import machine, versions

            self._machine, self._versions = machine(), versions()
        return {
            "title": self.title,
            "rows": [json_value(row) for row in self.rows],
            "machine": json_value(self._machine),
            "versions": json_value(self._versions),
            "settings": json_value(self.settings),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """`to_dict` as text, valid JSON whatever the values."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_file(cls, path: str | Path) -> Report:
        """Read a `report.json` (or the folder that holds one). Raises FormatError when it is not one."""
        path = Path(path)
        if path.is_dir():
            path = path / "report.json"
        data = read_json(path, MAX_REPORT_BYTES)
        return cls._from_dict(data, str(path))

    @classmethod
    def _from_dict(cls, data: Any, where: str) -> Report:
        _check(isinstance(data, dict), where, "it is not an object")
        _check(isinstance(data.get("title"), str), where, "'title' is not a text")
        _check(isinstance(data.get("rows"), list), where, "'rows' is not a list")
        for key in ("machine", "versions", "settings"):
            _check(isinstance(data.get(key, {}), dict), where, f"{key!r} is not an object")
        notes = data.get("notes", [])
        _check(isinstance(notes, list), where, "'notes' is not a list")
        _check(all(isinstance(note, str) for note in notes), where, "a note is not a text")
        report = cls(data["title"], data.get("settings", {}))
        report.notes = list(notes)
        report._machine, report._versions = data.get("machine", {}), data.get("versions", {})
        for i, row in enumerate(data["rows"]):
            _check(isinstance(row, dict), where, f"row {i} is not an object")
            _check(set(row) <= set(ROW_KEYS), where, f"row {i} has other keys than {', '.join(ROW_KEYS)}")
            _check("metric" in row and "value" in row, where, f"row {i} lacks 'metric' or 'value'")
            for key in ("metric", "unit", "subject"):
                _check(isinstance(row.get(key, ""), str), where, f"row {i}: {key!r} is not a text")
            for key in ("value", "se", "n"):
                _check(_is_number(row.get(key)), where, f"row {i}: {key!r} is neither a number nor null")
            _check(not isinstance(row.get("n"), float), where, f"row {i}: 'n' is not a whole number")
            fields = {**row, "value": math.nan if row["value"] is None else row["value"]}
            report.add(fields.pop("metric"), fields.pop("value"), **fields)
        return report

    def table(self, metrics: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
        """Header and cells (subjects down, metrics across) as texts; `metrics` picks and orders the columns."""
        chosen = list(self.metrics if metrics is None else metrics)
        missing = [m for m in chosen if m not in self.metrics]
        if missing:
            known = ", ".join(self.metrics)
            raise UsageError(f"the report {self.title!r} has no metric {missing[0]!r}; it has {known}")
        header = [""] + [f"{m} ({u})" if (u := self._unit(m)) else m for m in chosen]
        lines = []
        for subject in self.subjects:
            cells = [self._rows.get((m, subject)) for m in chosen]
            if any(cells):
                lines.append([subject] + [cell.text() if cell else "" for cell in cells])
        return header, lines

    def markdown(self, metrics: Sequence[str] | None = None) -> str:
        """The report as Markdown: title, table, notes, machine and versions."""
        header, lines = self.table(metrics)
        data = self.to_dict()
        parts = [f"# {self.title}", ""]
        if lines:
            parts += [_markdown_line(header), _markdown_line(["---"] + ["---:"] * (len(header) - 1))]
            parts += [_markdown_line(line) for line in lines] + [""]
        parts += [f"- {note}" for note in self.notes] + ([""] if self.notes else [])
        for name in ("settings", "machine", "versions"):
            if data[name]:
                parts += [f"{name.capitalize()}: " + ", ".join(f"{k} {_inline(v)}" for k, v in data[name].items()), ""]
        return "\n".join(parts).rstrip() + "\n"

    def print_table(self, console: Console | None = None, metrics: Sequence[str] | None = None) -> None:
        """Print the table, with the notes beneath it; turned on its side where it would not fit the width.

        Args:
            console: of rich; None prints to standard output.
            metrics: columns and their order; None for all.
        """
        from rich.console import Console
        from rich.markup import escape
        from rich.measure import Measurement
        from rich.table import Table

        console = console or Console()
        header, lines = self.table(metrics)

        def build(columns: list[str], rows: list[list[str]]) -> Table:
            table = Table(title=escape(self.title), title_justify="left", title_style="bold")
            for i, name in enumerate(columns):
                table.add_column(escape(name), justify="right" if i else "left", overflow="fold")
            for row in rows:
                table.add_row(*(escape(cell) for cell in row))
            return table

        def width(table: Table) -> int:
            return Measurement.get(console, console.options.update(max_width=10_000), table).maximum

        table = build(header, lines)
        if width(table) > console.width:
            columns, *rows = [list(cells) for cells in zip(header, *lines, strict=True)]
            turned = build(columns, rows)
            table = turned if width(turned) < width(table) else table
        console.print(table)
        for note in self.notes:
            console.print(escape(note), style="dim", highlight=False)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.md` into `folder`, each whole or not at all; returns the JSON's path."""
        folder = Path(folder)
        write_text(folder / "report.md", self.markdown())
        write_text(folder / "report.json", self.to_json())
        return folder / "report.json"

    def _unit(self, metric: str) -> str:
        units = {row.unit for row in self.rows if row.metric == metric}
        return units.pop() if len(units) == 1 else ""


def format_value(value: float, se: float | None = None) -> str:
    """A number for people: `0.1723 ± 0.0041` keeps two digits of the error, `78.61` four digits of the value."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if se is not None and math.isfinite(se) and se > 0:
        decimals = min(max(1 - math.floor(math.log10(se)), 0), 12)
        return f"{value:.{decimals}f} ± {se:.{decimals}f}"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value)}"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.3e}"
    return f"{value:.{max(3 - math.floor(math.log10(abs(value))), 0)}f}"


def _inline(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _is_number(value: Any) -> bool:
    if value is None:
        return True
    # json reads integers of any length; those beyond a float's range are no measurement
    return isinstance(value, int | float) and not isinstance(value, bool) and not 1e300 < abs(value) < math.inf


def _check(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise FormatError(f"{where} is not an edgewright report: {problem}")
