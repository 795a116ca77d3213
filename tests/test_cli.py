"""The command line: instant help, one sentence for an error, the promised exit codes."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from collections.abc import Callable

import pytest

import edgewright
from edgewright import cli
from edgewright.errors import CheckFailed, UsageError


def command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgewright", *arguments], capture_output=True, text=True, **options)


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        result = command("--help")
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0
    assert min(seconds) < 0.3  # the least disturbed of five: other work on the machine is not ours
    for probe, (_, text) in cli.COMMANDS.items():
        assert probe in result.stdout and text in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["systems", "--json"], ["systems", "dlrm"]])
def test_light_commands_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom edgewright.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == "\n"


def test_version() -> None:
    assert command("--version").stdout == f"edgewright {edgewright.__version__}\n"


def test_no_command_prints_help_and_is_wrong_usage() -> None:
    result = command()
    assert result.returncode == 2 and "commands:" in result.stderr and not result.stdout


def test_unknown_command_suggests_the_nearest() -> None:
    result = command("compres")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "'compres'" in result.stderr and "did you mean 'compress'?" in result.stderr


@pytest.mark.parametrize("arguments", [["--nonsense"], ["systems", "--nonsense"], ["run"]])
def test_unknown_options_are_wrong_usage(arguments: list[str]) -> None:
    assert command(*arguments).returncode == 2


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "edgewright", "systems", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def raising(error: BaseException) -> Callable[[object], int]:
    def run(args: object) -> int:
        raise error

    return run


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command `probe` whose `run` the test puts in."""
    module = types.ModuleType("probe_command")
    module.add_arguments = lambda parser: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "for the tests"))
    monkeypatch.delenv("EDGEWRIGHT_TRACEBACK", raising=False)
    return module


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("bits 5 is not supported"), 2, "edgewright: bits 5 is not supported\n"),
        (CheckFailed("one claim failed"), 1, "edgewright: one claim failed\n"),
        (KeyboardInterrupt(), 130, "edgewright: interrupted\n"),
        (KeyboardInterrupt("saved at step 7"), 130, "edgewright: saved at step 7\n"),
        (OSError(13, "Denied", "x"), 1, "edgewright: [Errno 13] Denied: 'x' (EDGEWRIGHT_TRACEBACK=1 shows where)\n"),
    ],
)
def test_errors_are_one_line(probe, capsys, error: BaseException, code: int, line: str) -> None:
    probe.run = raising(error)
    assert cli.main(["probe"]) == code
    assert capsys.readouterr() == ("", line)


def test_a_bug_keeps_its_traceback(probe) -> None:
    probe.run = raising(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["probe"])


def test_traceback_on_request(probe, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWRIGHT_TRACEBACK", "1")
    probe.run = raising(UsageError("no"))
    assert cli.main(["probe"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("edgewright: no\n")


def test_the_exit_code_of_a_command_is_passed_on(probe) -> None:
    probe.run = lambda args: 1
    assert cli.main(["probe"]) == 1
