"""What a recipe is: one published system at three sizes, its plan, its run, and its claims as data that get checked.

A recipe is a module `systems/<slug>/recipe.py` (hyphens as underscores) with the members of `Recipe` below.
`run_recipe` does the rest the same way for all of them: settings, plan, folder, resume, report, claims.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

from edgewright.errors import CheckFailed, FormatError, OutputError, UsageError
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.run_folder import difference, holds_something, working_in
from edgewright.io.temporaries import sweep
from edgewright.measure.report import Report, format_value
from edgewright.systems.catalogue import find, folder_of, systems
from edgewright.systems.settings import override, plain

SIZES = ("tiny", "small", "paper")
ERRORS = 2.0  # combined standard errors by which a difference must exceed zero to count
STUDIES = ("lowbit-arena",)  # of no one published system: not in the catalogue


@dataclass(frozen=True)
class Claim:
    """`metric` of `subject` is below ("<") or above (">") a bound: `threshold`, or `factor` x that of `against`.

    Where the values carry standard errors, the difference must exceed two combined ones; values without, such as bytes,
    are compared as they are.
    """

    metric: str
    subject: str
    direction: Literal["<", ">"]
    threshold: float | None = None
    against: str | None = None  # another subject of the same report
    factor: float = 1.0
    sizes: tuple[str, ...] = SIZES  # where the claim is made: a tiny run cannot show everything that a paper's run can

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.against is None):
            raise ValueError(f"a claim needs either a threshold or a subject to stand against: {self}")
        if self.direction not in ("<", ">") or not set(self.sizes) <= set(SIZES):
            raise ValueError(f"a claim's direction is '<' or '>', its sizes are among {SIZES}: {self}")


class ClaimVerdict(NamedTuple):
    """A claim, whether it held, and the sentence with both figures."""

    claim: Claim
    held: bool
    text: str


@dataclass(frozen=True)
class Plan:
    """What a run does and costs on a 2-core machine; it leaves its `inputs` alone and `outputs` in its folder."""

    steps: tuple[str, ...]
    seconds: float
    memory_bytes: int
    disk_bytes: int
    inputs: tuple[Path, ...] = ()
    outputs: tuple[str, ...] = ()

    def text(self) -> str:
        """The plan for people, one line a step."""
        lines = [f"  {i}. {step}" for i, step in enumerate(self.steps, 1)]
        cost = (
            f"about {_duration(self.seconds)}, {_size(self.memory_bytes)} of memory, {_size(self.disk_bytes)} of disk"
        )
        return "\n".join([*lines, f"  {cost}"])


class Cell(NamedTuple):
    """One number of `results/<csv>`: the `column` of the only line whose columns equal `where`."""

    csv: str
    where: dict[str, str]
    column: str = "value"


@dataclass(frozen=True)
class Headline:
    """The catalogue's figure: `text` with named gaps ("KL {ours:.2f} instead of {rtn:.2f}") and the cell for each."""

    text: str
    cells: dict[str, Cell]


class Recipe(Protocol):
    """The members of a recipe's module. Settings are a frozen dataclass; its `seed` fixes every bit of the result."""

    __name__: str
    CLAIMS: tuple[Claim, ...]
    CLOCKED: tuple[str, ...]  # metrics read off a clock or a memory counter, which differ from run to run
    HEADLINE: Headline | None

    def tiny(self) -> Any:
        """Seconds on 2 cores: what the tests run."""

    def small(self) -> Any:
        """Minutes on 2 cores or one GPU: what our own figures come from."""

    def paper(self) -> Any:
        """The published size."""

    def plan(self, settings: Any) -> Plan:
        """What `run` will do with these settings; imports nothing heavy."""

    def run(self, settings: Any, output: Path) -> Report:
        """Do it, leaving plots and files in `output`; called again on the same folder it resumes."""


@dataclass(frozen=True)
class Outcome:
    """What `run_recipe` did; `report` is None and `verdicts` empty after a dry run."""

    slug: str
    size: str
    settings: Any
    plan: Plan
    folder: Path
    report: Report | None = None
    verdicts: tuple[ClaimVerdict, ...] = ()

    @property
    def held(self) -> bool:
        """No claim failed."""
        return all(verdict.held for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        plan = {"steps": self.plan.steps, "seconds": self.plan.seconds, "memory_bytes": self.plan.memory_bytes}
        return {
            "slug": self.slug,
            "size": self.size,
            "settings": plain(self.settings),
            "plan": {**plan, "disk_bytes": self.plan.disk_bytes},
            "output": str(self.folder),
            "report": self.report.to_dict() if self.report else None,
            "claims": [{"held": verdict.held, "text": verdict.text} for verdict in self.verdicts],
        }


def runnable() -> list[str]:
    """The slugs of the catalogue that have a recipe, and those of the studies; found without importing any."""
    ready = [row.slug for row in systems() if (folder_of(row.slug) / "recipe.py").is_file()]
    return [*ready, *STUDIES]


def load_recipe(slug: str) -> Recipe:
    """The recipe of a system.

    Args:
        slug: such as "parq"; see `edgewright systems`.

    Returns:
        Its module: settings by size, plan, run and claims.

    Raises:
        UsageError: the system is only planned, or there is none of that name.
    """
    if slug not in runnable():
        row = find(slug)
        ready = ", ".join(runnable()) or "none yet"
        raise UsageError(f"{row.title} ({slug}) is planned and has no recipe yet; systems that run: {ready}")
    return cast(Recipe, import_module(f"edgewright.systems.{slug.replace('-', '_')}.recipe"))


def slug_of(recipe: Recipe) -> str:
    """The slug that a recipe's module stands for: the name of its folder, or its own where it is not in one."""
    return recipe.__name__.removesuffix(".recipe").rpartition(".")[2].replace("_", "-")


def check_claims(report: Report, claims: Iterable[Claim]) -> list[ClaimVerdict]:
    """Hold each claim against the report's figures, outside their noise. A figure that is missing or NaN does not."""
    return [_check(report, claim) for claim in claims]


def run_recipe(
    recipe: str | Recipe,
    size: str = "tiny",
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    *,
    dry_run: bool = False,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run a system's recipe and check its claims.

    Args:
        recipe: a slug, or a recipe's module.
        size: "tiny" (a check, seconds) or "small" (the figures of the page).
        overrides: "path=value" texts that change settings.
        output: folder, default `runs/<slug>-<size>`; it ends with settings.json, report.json, report.md and what the
            plan names. One with the same settings is resumed, a finished one is read again, other settings are refused.
        dry_run: show the plan and stop.
        fresh: clear a folder of other settings, or of a finished run, first.
        say: receives the plan and the state of the folder.

    Returns:
        Settings, plan, report and claims, each held or not.

    Raises:
        UsageError: an unknown size or setting, or a folder of another run.
        OutputError: the folder could not be written.
        CheckFailed: a file that the plan names is missing.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    slug = slug_of(recipe)
    if size not in SIZES:
        raise UsageError(f"no size is called {size!r}; sizes: {', '.join(SIZES)}")
    settings = override(getattr(recipe, size)(), overrides)
    plan = recipe.plan(settings)
    folder = Path(output) if output is not None else Path("runs") / f"{slug}-{size}"
    outcome = Outcome(slug, size, settings, plan, folder)
    say(f"{slug}, size {size}, in {folder}:\n{plan.text()}")
    if dry_run:
        return outcome

    with working_in(folder):
        return _run_in(recipe, outcome, fresh, say)


def _run_in(recipe: Recipe, outcome: Outcome, fresh: bool, say: Callable[[str], None]) -> Outcome:
    """The run that the outcome plans, in its folder."""
    slug, size, settings, plan, folder = (
        outcome.slug, outcome.size, outcome.settings, outcome.plan, outcome.folder
    )  # fmt: skip
    record = {"recipe": slug, "size": size, "settings": plain(settings)}
    state = _open_folder(folder, record, plan, fresh)
    if state == "finished":
        say(f"{folder} holds this run already, finished; --fresh runs it again")
        report = Report.from_file(folder)
    else:
        if state == "resumed":
            say(f"resuming in {folder}")
        report = recipe.run(settings, folder)
        missing = [name for name in plan.outputs if not (folder / name).exists()]
        if missing:
            raise CheckFailed(f"the run of {slug} ended without the files it promised: {', '.join(missing)}")
        report.settings.update({"recipe": slug, "size": size, **record["settings"]})
    verdicts = tuple(check_claims(report, (claim for claim in recipe.CLAIMS if size in claim.sizes)))
    if state != "finished":
        report.notes.extend(f"claim {'held' if verdict.held else 'NOT held'}: {verdict.text}" for verdict in verdicts)
        report.save(folder)  # last: its presence says that the run is finished
    return Outcome(slug, size, settings, plan, folder, report, verdicts)


def _check(report: Report, claim: Claim) -> ClaimVerdict:
    try:
        row = report.row(claim.metric, claim.subject)
        against = None if claim.against is None else report.row(claim.metric, claim.against)
    except UsageError as error:
        return ClaimVerdict(claim, False, str(error))
    reference = claim.threshold if against is None else against.value
    assert reference is not None  # Claim.__post_init__
    bound = claim.factor * reference
    margin = bound - row.value if claim.direction == "<" else row.value - bound  # NaN compares false either way
    noise = ERRORS * math.hypot(row.se or 0.0, claim.factor * (against.se or 0.0) if against else 0.0)
    text = f"{claim.metric} of {claim.subject or 'the run'}: {row.text()} {claim.direction} {format_value(bound)}"
    if against is not None:
        scale = "" if claim.factor == 1 else f"{claim.factor:g} x "
        text += f" = {scale}{claim.against}'s {against.text()}"
    if 0 < margin <= noise:
        text += f" (the difference is inside {ERRORS:g} combined standard errors)"
    return ClaimVerdict(claim, margin > noise and math.isfinite(row.value), text)


def _open_folder(
    folder: Path, record: dict[str, Any], plan: Plan, fresh: bool
) -> Literal["new", "resumed", "finished"]:
    marker = folder / "settings.json"
    if holds_something(folder):
        if not marker.is_file():
            raise UsageError(f"{folder} is not empty and holds no run; choose an empty folder with --output")
        if fresh:
            for entry in folder.iterdir():  # not the folder, on which the lock is
                entry.unlink() if entry.is_symlink() or not entry.is_dir() else shutil.rmtree(entry)
        else:
            _same_run(folder, marker, record)
            sweep(folder)
            return "finished" if (folder / "report.json").is_file() else "resumed"
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(parent).free) < plan.disk_bytes:
        raise OutputError(f"the run needs {_size(plan.disk_bytes)} of disk, {parent} has {_size(free)} left")
    sweep(folder)
    write_text(marker, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return "new"


def _same_run(folder: Path, marker: Path, record: dict[str, Any]) -> None:
    try:
        held = read_object(marker)
    except (UsageError, FormatError) as error:
        raise UsageError(f"cannot read {marker}: {error}; --fresh clears the folder") from None
    if other := difference({**held, "size": ""}, {**record, "size": ""}):  # two sizes may have the same settings
        raise UsageError(
            f"{folder} holds another run ({other}); choose another folder with --output, or --fresh clears this one"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _size(count: int) -> str:
    """Decimal units, as disks and files are counted."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
