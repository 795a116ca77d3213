"""Ctrl-C and SIGTERM as a request to stop at a safe point; the second one leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

MESSAGE = b"\nstopping at the next safe point; press Ctrl-C again to leave at once\n"


class StopSignals:
    """Context in which the first SIGINT or SIGTERM only sets `requested` and the second raises KeyboardInterrupt.

    Handlers go in only from the main thread, only over ones that Python can put back, and never over an ignored
    signal (a run in the background keeps ignoring Ctrl-C). On the way out the former handlers return; a request that
    nobody answered by then is delivered to them.
    """

    def __init__(self, announce: bool = True) -> None:
        self.requested: int | None = None
        self._announce = announce
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if kind is None and self.requested is not None:
            signal.raise_signal(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = number
        if self._announce:
            try:
                os.write(2, MESSAGE)  # a handler may run inside another write: no buffered stream, no lock
            except OSError:
                pass
