"""What a child process does before its work: it takes care to end with the process that started it.

A parent that is killed cannot end its children, and a child in an endless loop would run on for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """End this process, by SIGKILL, when `parent` (its process id) ends.

    Linux does that by itself (prctl). Everywhere a thread also waits for the end of standard input, a pipe whose other
    end the parent holds open and never writes to.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
    threading.Thread(target=_watch, name="edgewright-parent", daemon=True).start()


def _watch() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    if os.getpgrp() == os.getpid():  # what this child has started, too
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
