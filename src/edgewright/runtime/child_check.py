"""The first run of a foreign file in a process of its own: a file that kills its runtime kills only that process.

Runtimes are written in C++ and trust their files. What a broken or hostile one does to them (a bad address, an endless
loop, all the memory) happens here in a child, and comes back as one FormatError.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from edgewright import errors
from edgewright.errors import EdgewrightError, FormatError
from edgewright.io.child_process import end_with_parent

TIMEOUT = 120.0  # seconds for start, load and one run
MEMORY_FLOOR = 8 << 30  # address space that imports and thread stacks may take on top of the file
OUTPUT_LIMIT = 1 << 20  # bytes of the child's own words that are looked at
REASON_LENGTH = 240

_CHILD = "from edgewright.runtime.child_check import _child; _child()"
GGUF_RUN = ("edgewright.runtime.llamacpp", "first_run")  # where a GGUF file is first run, for those that vouch for one
_passed: set[tuple[str, str, str, int, int, str]] = set()
_ANY = "any options"  # in the place of those of a run


def first_run_in_child(
    module: str,
    function: str,
    path: str | Path,
    timeout: float = TIMEOUT,
    *,
    memory: int | None = None,
    options: Mapping[str, int | str] | None = None,
) -> Any:
    """Call `module.function(path, **options)` in a fresh Python process and return its result, which must be JSON.

    module: dotted name, imported in the child only. function: top-level function of the path, as text, and of the
    options; it loads the file and runs it once. options: the settings under which the caller will run the file, for a
    file may be fit for some and end its process under others. timeout: seconds in all; those in which other work kept
    the child from running do not count (where the system tells, and at most ten times as many). memory: bytes of
    address space that the child may take (where the system keeps such a limit); default: 8 GiB and sixteen times the
    file.

    Raises FormatError when the child dies, hangs or refuses the file; errors of `edgewright.errors` that the function
    raises arrive here as they are. A file that passed is not run again in this process with the same options while its
    size and time of change stay the same: then the result is None.
    """
    file = Path(path)
    chosen = json.dumps(dict(options or {}), sort_keys=True)
    key, vouched = (_key(module, function, file, which) for which in (chosen, _ANY))
    if key in _passed or vouched in _passed:
        return None
    if memory is None:
        memory = MEMORY_FLOOR + 16 * key[3]
    with tempfile.TemporaryDirectory() as folder:
        answer, said = Path(folder, "answer"), Path(folder, "said")
        command = [
            sys.executable,
            "-c",
            _CHILD,
            module,
            function,
            str(file),
            str(answer),
            str(memory),
            str(os.getpid()),
            chosen,
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment["GGML_NO_BACKTRACE"] = (
            "1"  # llama.cpp starts a debugger otherwise, and its reason is not the last line
        )
        with said.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,  # never written to: its end is how the child knows of ours
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = _wait(process, timeout)
            finally:
                _end(process)
            if code is None:
                raise FormatError(
                    f"{file} was not loaded and run within {timeout:g} s by {module}; it is broken or far too large"
                )
        # the child writes its answer last: without one it died, whatever its exit code
        text = answer.read_text(encoding="utf-8") if answer.exists() else ""
        words = said.read_bytes()[-OUTPUT_LIMIT:].decode("utf-8", "replace")
    if not text:
        raise FormatError(f"{file} ends the process that runs it ({_death(code)}): {_last_line(words)}")
    value = json.loads(text)
    if "error" in value:
        kind = getattr(errors, value["error"], FormatError)
        raise kind(value["message"])
    _passed.add(key)
    return value["result"]


def vouch(module: str, function: str, path: str | Path) -> None:
    """This process has just written the file itself: `first_run_in_child` need not run it."""
    _passed.add(_key(module, function, Path(path), _ANY))


def _wait(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """The exit code, or None when the time is over."""
    began, left = time.monotonic(), timeout
    while left > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(left)
        left = min(timeout + kept_waiting(process.pid), 10 * timeout) - (time.monotonic() - began)
    return None


def kept_waiting(pid: int) -> float:
    """Seconds that a process was ready to run and got no processor; 0 where the system does not tell (it is Linux)."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _key(module: str, function: str, file: Path, options: str) -> tuple[str, str, str, int, int, str]:
    try:
        status = file.stat()
    except OSError as error:
        raise FormatError(f"cannot read {file}: {error.strerror}") from error
    return module, function, str(file.resolve()), status.st_size, status.st_mtime_ns, options


def _end(process: subprocess.Popen[bytes]) -> None:
    """The child and whatever it started, and nothing else: it leads a process group of its own."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:REASON_LENGTH] if lines else "it left no message"


def _child() -> None:
    module, function, path, answer, memory, parent, options = sys.argv[1:8]
    end_with_parent(int(parent))
    limit_memory(int(memory))
    value: dict[str, Any]
    try:
        value = {"result": getattr(import_module(module), function)(path, **json.loads(options))}
    except EdgewrightError as error:
        value = {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        value = {"error": "FormatError", "message": f"{path} asks for more than {int(memory) >> 20} MiB to run"}
    except Exception as error:  # a runtime's own exceptions: all say that it cannot use the file
        value = {"error": "FormatError", "message": f"{path} cannot be run: {_last_line(str(error))}"}
    finished = Path(answer + ".part")
    finished.write_text(json.dumps(value), encoding="utf-8")
    os.replace(finished, answer)


def limit_memory(memory: int) -> None:
    """No core file, and no more address space than this; systems without such limits go without."""
    try:
        import resource
    except ImportError:
        return
    for kind, wanted in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory)):
        with contextlib.suppress(OSError, ValueError):
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (wanted if hard < 0 else min(wanted, hard), hard))
