"""Every recipe keeps the same contract: it ends, repeats, resumes, leaves its input alone, and its claims hold.

A toy recipe written below goes through the same tests, and broken toys show that each test can fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edgewright import cli
from edgewright.errors import CheckFailed, OutputError, UsageError
from edgewright.io.atomic import write_text
from edgewright.measure.report import Report
from edgewright.systems import recipe as frame
from edgewright.systems.recipe import Claim, Outcome, Plan, check_claims, load_recipe, run_recipe, runnable, slug_of
from edgewright.systems.settings import plain
from tests import golden

MODEL_FILES = {".gguf", ".safetensors", ".onnx", ".pte"}  # what a recipe ships: compared byte for byte


@dataclass(frozen=True)
class Walk:
    steps: int = 40
    scale: float = 1.0


@dataclass(frozen=True)
class Toy:
    """Settings of the toy: a walk of pseudo-random steps whose mean square grows with the scale."""

    seed: int = 0
    walk: Walk = field(default_factory=Walk)
    data: Path | None = None


def toy_run(settings: Toy, output: Path) -> Report:
    """One line of state a step, kept in a file, so that a second call goes on where the first stopped."""
    state = output / "state.txt"
    done = state.read_text().split() if state.exists() else []
    for step in range(len(done), settings.walk.steps):
        digest = hashlib.sha256(f"{settings.seed} {step}".encode()).digest()
        done.append(f"{digest[0] / 255:.17g}")
        write_text(state, "\n".join(done) + "\n")
    values = [float(x) for x in state.read_text().split()]
    report = Report("toy")
    for name, scale in (("plain", 1.0), ("scaled", 2.0 * settings.walk.scale)):
        report.add("power", sum((scale * x) ** 2 for x in values) / len(values), subject=name, n=len(values))
    report.add("seconds", float(threading.get_native_id()), unit="s")
    (output / "toy.gguf").write_bytes(state.read_bytes())
    (output / "walk.png").write_bytes(b"picture")
    return report


def toy_plan(settings: Toy) -> Plan:
    inputs = (settings.data,) if settings.data else ()
    return Plan(("draw", "sum"), 0.1 * settings.walk.steps, 10**6, 10**4, inputs, ("toy.gguf", "walk.png"))


def make_toy(**changes: Any) -> Any:
    module: Any = types.ModuleType("tests.toy_walk")
    members = {
        "tiny": Toy,
        "small": lambda: Toy(walk=Walk(steps=50)),
        "paper": lambda: Toy(walk=Walk(steps=60)),
        "plan": toy_plan,
        "run": toy_run,
        "CLAIMS": (Claim("power", "scaled", ">", against="plain", factor=3.0), Claim("power", "plain", "<", 1.0)),
        "CLOCKED": ("seconds",),
        "HEADLINE": None,
    }
    for name, value in {**members, **changes}.items():
        setattr(module, name, value)
    return module


# -- the contract, for every recipe ------------------------------------------------------------------------------------

RECIPES = ["toy", *runnable()]


class First(NamedTuple):
    """A tiny run, how many files it renamed, and the digests of its input before and after."""

    outcome: Outcome
    renames: int
    before: dict[Path, str]
    after: dict[Path, str]


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Any:
    return make_toy() if request.param == "toy" else load_recipe(request.param)


@pytest.fixture(scope="module")
def first(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> First:
    """The tiny run that the tests below share."""
    inputs = recipe.plan(recipe.tiny()).inputs
    before = digests(inputs)
    with counted_renames() as renames:
        outcome = run_recipe(recipe, "tiny", output=tmp_path_factory.mktemp("first") / "run", say=quiet)
    return First(outcome, renames[0], before, digests(inputs))


def quiet(text: str) -> None:
    pass


def digests(paths: Iterable[Path]) -> dict[Path, str]:
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.is_file()]
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def result(outcome: Outcome, clocked: tuple[str, ...]) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """What must be the same bit for bit: every row that is not read off a clock, and every model file."""
    assert outcome.report is not None
    rows = [
        (r.metric, r.subject, float(r.value).hex(), str(r.se)) for r in outcome.report.rows if r.metric not in clocked
    ]
    files = digests(outcome.folder / name for name in outcome.plan.outputs)
    return rows, {str(f.relative_to(outcome.folder)): d for f, d in files.items() if f.suffix in MODEL_FILES}


def check_repeats(recipe: Any, first: Outcome, folder: Path) -> None:
    again = run_recipe(recipe, "tiny", output=folder, say=quiet)
    assert result(again, recipe.CLOCKED) == result(first, recipe.CLOCKED)


@contextmanager
def counted_renames(interrupt_at: int | None = None) -> Iterator[list[int]]:
    """[renames of this thread so far]: every output of a run ends with one. That of number `interrupt_at` is Ctrl-C."""
    count, thread = [0], threading.get_ident()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and watching and threading.get_ident() == thread:
            count[0] += 1
            if count[0] == interrupt_at:
                raise KeyboardInterrupt

    watching = True
    sys.addaudithook(watch)  # which nothing takes away again
    try:
        yield count
    finally:
        watching = False


def check_resumes(recipe: Any, first: Outcome, folder: Path, renames: int) -> None:
    """Interrupt a run at half of its outputs, then let it end as the first did."""
    with pytest.raises(KeyboardInterrupt), counted_renames(interrupt_at=max(renames // 2, 2)):
        run_recipe(recipe, "tiny", output=folder, say=quiet)
    check_repeats(recipe, first, folder)


def test_the_run_ends_with_everything_in_its_folder(recipe: Any, first: First) -> None:
    outcome = first.outcome
    for name in ("report.json", "report.md", "settings.json", *outcome.plan.outputs):
        assert (outcome.folder / name).stat().st_size > 0, name
    assert list(outcome.folder.rglob("*.png")) or list(outcome.folder.rglob("*.svg")), "no plot"
    saved = json.loads((outcome.folder / "settings.json").read_text())
    assert saved["settings"] == plain(outcome.settings) and saved["size"] == "tiny"
    report = json.loads((outcome.folder / "report.json").read_text())
    assert {"rows", "machine", "versions", "settings"} <= set(report)
    assert report["rows"]
    assert all(set(row) == {"metric", "value", "se", "n", "unit", "subject"} for row in report["rows"])
    assert not list(outcome.folder.rglob("*.part"))


def test_it_repeats_and_resumes_to_the_same_bits(recipe: Any, first: First, tmp_path: Path) -> None:
    """In a new folder: what comes before the interruption is computed again, and so is what comes after."""
    check_resumes(recipe, first.outcome, tmp_path / "run", first.renames)


def test_it_equals_the_golden_file(recipe: Any, first: First, request: pytest.FixtureRequest) -> None:
    rows, files = result(first.outcome, recipe.CLOCKED)
    golden.compare(slug_of(recipe), {"rows": rows, "files": files}, request.config.getoption("--update-golden"))


def test_it_leaves_its_input_untouched(recipe: Any, first: First) -> None:
    assert first.before == first.after


def test_its_claims_hold(recipe: Any, first: First) -> None:
    for verdict in first.outcome.verdicts:
        assert verdict.held, verdict.text


def test_every_size_has_settings_and_a_plan(recipe: Any) -> None:
    seconds = []
    for size in frame.SIZES:
        settings = getattr(recipe, size)()
        assert getattr(recipe, size)() == settings
        with pytest.raises(AttributeError):  # frozen
            settings.seed = 1
        json.dumps(plain(settings))
        plan = recipe.plan(settings)
        assert plan.steps and plan.memory_bytes > 0 and plan.disk_bytes >= 0
        seconds.append(plan.seconds)
    assert 0 < seconds[0] <= seconds[1] <= seconds[2]


# -- the tests above can fail ------------------------------------------------------------------------------------------


def test_a_recipe_that_does_not_repeat_is_caught(tmp_path: Path) -> None:
    def run(settings: Toy, output: Path) -> Report:
        return toy_run(replace(settings, seed=int.from_bytes(os.urandom(4), "big")), output)

    toy = make_toy(run=run)
    with pytest.raises(AssertionError):
        check_repeats(toy, run_recipe(toy, output=tmp_path / "a", say=quiet), tmp_path / "b")


def test_a_recipe_that_resumes_wrongly_is_caught(tmp_path: Path) -> None:
    def run(settings: Toy, output: Path) -> Report:
        twice = (output / "state.txt").exists()
        if not twice:
            (output / "state.txt").write_text("0.5\n")
            raise KeyboardInterrupt
        (output / "state.txt").write_text("0.25\n" * settings.walk.steps)
        return toy_run(settings, output)

    toy = make_toy(run=run)
    good = run_recipe(make_toy(), output=tmp_path / "a", say=quiet)
    with pytest.raises(AssertionError):
        check_resumes(toy, good, tmp_path / "b", 4)


def test_a_recipe_that_forgets_a_promised_file_is_caught(tmp_path: Path) -> None:
    def run(settings: Toy, output: Path) -> Report:
        report = toy_run(settings, output)
        (output / "toy.gguf").unlink()
        return report

    with pytest.raises(CheckFailed, match="without the files it promised: toy.gguf"):
        run_recipe(make_toy(run=run), output=tmp_path / "a", say=quiet)
    assert not (tmp_path / "a" / "report.json").exists()


# -- the frame ---------------------------------------------------------------------------------------------------------


def test_claims() -> None:
    report = Report("figures")
    report.add("kl", 0.2, subject="ours")
    report.add("kl", 0.5, subject="theirs")
    report.add("kl", float("nan"), subject="broken")
    claims = [
        Claim("kl", "ours", "<", against="theirs", factor=0.5),
        Claim("kl", "ours", "<", against="theirs", factor=0.4),  # 0.2 < 0.2: an equal figure is not below
        Claim("kl", "theirs", ">", threshold=0.4),
        Claim("kl", "broken", "<", threshold=1.0),
        Claim("kl", "nobody", "<", threshold=1.0),
        Claim("kl", "ours", "<", against="broken"),
    ]
    verdicts = check_claims(report, claims)
    assert [verdict.held for verdict in verdicts] == [True, False, True, False, False, False]
    assert verdicts[0].text == "kl of ours: 0.2000 < 0.2500 = 0.5 x theirs's 0.5000"
    assert "no 'kl' for 'nobody'" in verdicts[4].text


def test_a_claim_holds_only_outside_two_combined_errors() -> None:
    report = Report("toy")
    report.add("kl", 1.0, subject="ours", se=0.03)
    report.add("kl", 1.09, subject="close", se=0.04)  # two combined errors are 0.10
    report.add("kl", 1.11, subject="far", se=0.04)
    report.add("kl", 1.07, subject="exact")
    claims = [
        Claim("kl", "ours", "<", against="close"),
        Claim("kl", "ours", "<", against="far"),
        Claim("kl", "ours", "<", against="exact"),
        Claim("kl", "ours", "<", threshold=1.05),
        Claim("kl", "ours", "<", against="far", factor=0.99),  # the bound's error shrinks with it
        Claim("kl", "far", ">", against="ours"),
    ]
    verdicts = check_claims(report, claims)
    assert [verdict.held for verdict in verdicts] == [False, True, True, False, False, True]
    assert verdicts[0].text.endswith("(the difference is inside 2 combined standard errors)")


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"threshold": 1.0, "against": "x"},
        {"threshold": 1.0, "direction": "<="},
        {"threshold": 1.0, "sizes": ("huge",)},
    ],
)
def test_a_malformed_claim_is_refused(members: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Claim(**{"metric": "kl", "subject": "ours", "direction": "<", **members})


def test_a_dry_run_only_prints_the_plan(tmp_path: Path) -> None:
    said: list[str] = []
    outcome = run_recipe(make_toy(), "small", ["walk.steps=900"], tmp_path / "run", dry_run=True, say=said.append)
    assert outcome.report is None and outcome.held and not (tmp_path / "run").exists()
    assert "1. draw" in said[0] and "about 1 min 30 s, 1 MB of memory, 10 kB of disk" in said[0]


def test_a_finished_run_is_read_again_not_repeated(tmp_path: Path) -> None:
    first = run_recipe(make_toy(), output=tmp_path / "run", say=quiet)
    calls: list[str] = []
    said: list[str] = []
    again = run_recipe(make_toy(run=lambda *a: calls.append("ran")), output=tmp_path / "run", say=said.append)
    assert not calls and "finished" in said[-1]
    assert again.report.rows == first.report.rows and again.verdicts == first.verdicts
    assert again.report.notes == first.report.notes == [f"claim held: {verdict.text}" for verdict in first.verdicts]
    fresh = run_recipe(make_toy(), output=tmp_path / "run", fresh=True, say=quiet)
    assert result(fresh, ("seconds",)) == result(first, ("seconds",))


def test_other_settings_are_refused_unless_fresh(tmp_path: Path) -> None:
    run_recipe(make_toy(), output=tmp_path / "run", say=quiet)
    with pytest.raises(UsageError, match=r"holds another run \(settings.walk.steps=40, not 9\); .*--fresh"):
        run_recipe(make_toy(), overrides=["walk.steps=9"], output=tmp_path / "run", say=quiet)
    (tmp_path / "run" / "left.txt").write_text("of the first run")
    outcome = run_recipe(make_toy(), overrides=["walk.steps=9"], output=tmp_path / "run", fresh=True, say=quiet)
    assert outcome.report.row("power", "plain").n == 9 and not (tmp_path / "run" / "left.txt").exists()


def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(UsageError, match="is not empty and holds no run"):
            run_recipe(make_toy(), output=tmp_path, fresh=fresh, say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match="is a file"):
        run_recipe(make_toy(), output=tmp_path / "thesis.txt", say=quiet)


def test_a_damaged_settings_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("[1")
    with pytest.raises(UsageError, match="cannot read .*settings.json"):
        run_recipe(make_toy(), output=tmp_path, say=quiet)


def test_too_little_disk_is_said_before_the_work(tmp_path: Path) -> None:
    toy = make_toy(plan=lambda settings: Plan(("fill",), 1.0, 1, 10**18))
    with pytest.raises(OutputError, match="needs 1e\\+06 TB of disk"):
        run_recipe(toy, output=tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


def test_claims_are_made_at_their_sizes_only(tmp_path: Path) -> None:
    toy = make_toy(CLAIMS=(Claim("power", "plain", ">", 9.0, sizes=("paper",)),))
    assert run_recipe(toy, "tiny", output=tmp_path / "tiny", say=quiet).verdicts == ()
    assert not run_recipe(toy, "paper", output=tmp_path / "paper", say=quiet).held


def test_unknown_sizes_and_planned_systems_are_wrong_usage() -> None:
    with pytest.raises(UsageError, match="no size is called 'huge'; sizes: tiny, small, paper"):
        run_recipe(make_toy(), "huge", say=quiet)
    planned = next(row for row in frame.systems() if row.slug not in runnable())
    with pytest.raises(UsageError, match=f"{planned.slug}.* is planned and has no recipe yet; systems that run:"):
        load_recipe(planned.slug)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy()
    monkeypatch.setattr(frame, "load_recipe", {"toy-walk": toy}.__getitem__)
    arguments = ["run", "toy-walk", "--set", "walk.steps=50", "--output", str(tmp_path / "run")]
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "run").exists() and "about 5 s" in capsys.readouterr().out

    assert cli.main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["slug"] == "toy-walk" and printed["settings"]["walk"]["steps"] == 50
    assert [claim["held"] for claim in printed["claims"]] == [True, True] and printed["report"]["rows"]

    toy.CLAIMS = (Claim("power", "plain", ">", 9.0),)
    assert cli.main(arguments) == 1
    assert "NOT held  power of plain" in capsys.readouterr().out
