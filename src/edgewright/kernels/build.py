"""Compiles a C++ source of this folder on first use and opens it; the library is kept in the user's cache.

The cache key holds the source, the compiler's own version, its flags and the CPU, so that a changed source, compiler
or machine gets its own file. Files appear by renaming: processes that compile the same kernel at once do no harm.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import stat
import subprocess
from pathlib import Path

from edgewright.errors import EdgewrightError, OutputError
from edgewright.io.atomic import atomic_file
from edgewright.io.hashing import sha256

COMPILERS = ("c++", "g++", "clang++")
COMMON = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
# Tried in turn. Contraction stays off: results must equal the torch path's bit for bit.
TUNED: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
SECONDS = 120


@functools.cache
def load_kernel(name: str, extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of `<name>.cpp`, compiled unless the cache has it. extra: further compiler flags.

    Raises EdgewrightError where there is no compiler, it fails, or the cache folder cannot be used.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = find_compiler()
    identity = _identity(compiler)
    reason = ""
    for tuned in TUNED:
        flags = (*COMMON, *tuned, *extra)
        text = "\0".join((source.read_text("utf-8"), identity, *flags))
        path = cache_folder() / f"{name}-{sha256(text)[:24]}.so"
        if not path.exists():
            reason = _compile(compiler, source, flags, path)
        if path.exists():
            _check_owner(path)
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                reason = str(error)
    raise EdgewrightError(f"{compiler} could not build {source.name}: {reason or 'no library came out'}")


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first of the usual names. Raises EdgewrightError where there is none."""
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else COMPILERS:
        if path := shutil.which(name):
            return path
    raise EdgewrightError(f"no C++ compiler found (looked for {asked or ', '.join(COMPILERS)})")


def cache_folder() -> Path:
    """Where compiled kernels lie: below $XDG_CACHE_HOME or ~/.cache, private to the user."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "edgewright" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise OutputError(f"cannot keep compiled kernels: {error}") from error
    _check_owner(folder)
    return folder


def _check_owner(path: Path) -> None:
    """Refuse code that somebody else could have put there."""
    if not hasattr(os, "getuid"):
        return
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & stat.S_IWOTH:
        raise EdgewrightError(f"{path} belongs to another user or can be written by all; no kernel is loaded from it")


class _Refused(Exception):
    """The compiler said no: leaves `atomic_file` without a file."""


def _compile(compiler: str, source: Path, flags: tuple[str, ...], path: Path) -> str:
    """Compile into the cache; "" or the reason why not."""
    try:
        with atomic_file(path) as temporary:
            command = [compiler, *flags, str(source), "-o", str(temporary)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode:
                raise _Refused((done.stderr.strip().splitlines() or ["no message"])[-1][:300])
    except (_Refused, subprocess.SubprocessError) as error:
        return str(error)
    return ""


def _identity(compiler: str) -> str:
    """Compiler version and CPU as text."""
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EdgewrightError(f"{compiler} does not answer: {error}") from error
    cpu = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        wanted = ("flags", "Features", "model name", "CPU part")
        lines = information.read_text(errors="replace").splitlines()
        cpu += "".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
    return f"{version}{platform.system()}{platform.machine()}{cpu}"
