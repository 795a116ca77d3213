"""Processes that meet over gloo, for tests.

A test starts a script of the tests (itself, as a rule) in a fresh Python; the script forks a group, which is quick
because torch has been imported by then. pytest's own process is not forked: autograd's threads do not survive it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]


def run_script(script: str | Path, *arguments: object, timeout: float = 120) -> str:
    """Run a script of the tests, which may import what tests import; its standard output. Fails as the script does."""
    command = [sys.executable, str(script), *(str(argument) for argument in arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, check=False, env=environment)
    sys.stderr.write(done.stderr)  # pytest shows it where a test fails
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rendezvous() -> dict[str, str]:
    """Environment in which the processes of one group meet: a store of this process, as torchrun keeps one.

    The store's port is bound when it is chosen, so that two groups that start at once never share one.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


_stores: list[TCPStore] = []  # a store ends with its object


def fork(world: int, process: Callable[[int], None], quiet: tuple[type[BaseException], ...] = ()) -> list[int]:
    """Ids of `world` forked processes that call `process(rank)` with torchrun's environment and one thread each.

    An exception is printed, unless it is one of `quiet`, and ends its process with exit code 1.
    """
    place = rendezvous()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(world), **place}
            torch.set_num_threads(1)
            code = 0
            try:
                process(rank)
            except BaseException as error:
                code = 1
                if not isinstance(error, quiet):
                    sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return children


def run_group(world: int, process: Callable[[int], None]) -> None:
    """`fork`, and fail unless all processes end well."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in fork(world, process)]
    assert not any(codes), codes
