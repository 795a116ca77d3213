"""Functions over hostile input in a small process of their own: bounded in memory, time and what they give back.

The process is started at the first call and kept for the next ones, so that a call costs a millisecond. What hangs it
or takes all its memory ends it, and the next call starts another.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from typing import Any, NoReturn

from edgewright import errors
from edgewright.errors import EdgewrightError, FormatError, UsageError
from edgewright.runtime.child_check import kept_waiting, limit_memory

TIMEOUT = 5.0  # seconds of a call, without those in which other work kept the process from running
MEMORY = 512 << 20  # bytes of address space, Python and its libraries included
LARGEST_ANSWER = 8 << 20  # bytes of JSON
_CHILD = "from edgewright.runtime.confined import _serve; _serve()"


def call_confined(module: str, function: str, what: str, *args: Any, **kwargs: Any) -> Any:
    """Call `module.function(*args, **kwargs)` in the confined process and return its result.

    Args:
        module: dotted name; imported there.
        function: top-level function of it, whose arguments and result are JSON.
        what: what is at fault when it hangs or fails, for the message: "the model's chat template".

    Raises:
        UsageError: arguments that are not JSON.
        FormatError: the call took too much time or memory, or gave too long an answer. Errors of `edgewright.errors`
            that the function raises arrive as they are.
    """
    try:
        request = json.dumps([module, function, args, kwargs]).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{what} is given what is not JSON: {error}") from error
    with _lock:
        return _process.ask(request, what)


class _Ended(FormatError):
    """The process is gone."""


class _Process:
    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes, what: str) -> Any:
        reused = self.child is not None
        try:
            try:
                answer = self._exchange(request, what)
            except _Ended:
                self.close()
                if not reused:
                    raise
                answer = self._exchange(request, what)  # it may have died since the last call
        except BaseException:
            self.close()
            raise
        if "result" in answer:
            return answer["result"]
        raise getattr(errors, answer["error"], FormatError)(answer["message"])

    def _exchange(self, request: bytes, what: str) -> dict[str, Any]:
        child = self._alive()
        assert child.stdin is not None and child.stdout is not None
        began, taken, data = time.monotonic(), _waited(child), bytearray()
        sending = memoryview(request)
        source, sink = child.stdout.fileno(), child.stdin.fileno()
        while not data.endswith(b"\n"):
            left = TIMEOUT + min(_waited(child) - taken, 2 * TIMEOUT) - (time.monotonic() - began)
            if left <= 0:
                raise FormatError(f"{what} was not done within {TIMEOUT:g} s")
            readable, writable, _ = select.select([source], [sink] if sending else [], [], min(left, 1.0))
            try:
                if writable:
                    sending = sending[os.write(sink, sending[: 1 << 16]) :]
                if readable:
                    piece = os.read(source, 1 << 20)
                    if not piece:
                        raise BrokenPipeError
                    data += piece
            except OSError as error:
                raise _Ended(f"{what} ended the process that ran it ({_ended(child)})") from error
            if len(data) > LARGEST_ANSWER:
                raise FormatError(f"{what} writes more than {LARGEST_ANSWER >> 20} MB")
        found: dict[str, Any] = json.loads(data)
        if "memory" in found:
            raise FormatError(f"{what} takes more than {MEMORY >> 20} MB")
        return found

    def _alive(self) -> subprocess.Popen[bytes]:
        if self.child is None or self.child.poll() is not None:
            self.close()
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
            self.child = subprocess.Popen(
                [sys.executable, "-c", _CHILD],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self.child

    def close(self) -> None:
        """End the process; harmless when there is none."""
        child, self.child = self.child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


_lock = threading.Lock()
_process = _Process()
atexit.register(_process.close)


def _forget() -> None:
    """In a forked process: the child belongs to the one that started it."""
    global _lock
    _lock, _process.child = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _waited(child: subprocess.Popen[bytes]) -> float:
    return kept_waiting(child.pid)


def _ended(child: subprocess.Popen[bytes]) -> str:
    try:
        code = child.wait(1)
    except subprocess.TimeoutExpired:
        return "it does not answer"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve() -> NoReturn:
    """The child: a line of JSON in, one out, until the parent's end of the pipe is closed."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a function prints goes nowhere
    limit_memory(MEMORY)
    functions: dict[tuple[str, str], Any] = {}
    for line in sys.stdin.buffer:
        # Should the parent end within a call, nobody else ends this process.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 4 * TIMEOUT)
        value: dict[str, Any]
        try:
            module, function, args, kwargs = json.loads(line)
            if (module, function) not in functions:
                functions[module, function] = getattr(import_module(module), function)
            value = {"result": functions[module, function](*args, **kwargs)}
            text = json.dumps(value)
        except EdgewrightError as error:
            text = json.dumps({"error": type(error).__name__, "message": str(error)[: 1 << 16]})
        except MemoryError:
            os.write(out, b'{"memory": true}\n')
            os._exit(0)  # its memory is in pieces
        data = memoryview(text.encode() + b"\n")
        while data:
            data = data[os.write(out, data) :]
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
    os._exit(0)
