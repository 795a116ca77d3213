"""One call at a time behind the training: what writes checkpoints while the next steps run."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one call at a time in a thread of its own; its error waits for whoever asks."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, call: Callable[[], None]) -> None:
        """Run `call`; what went before must have been waited for."""
        assert self._thread is None and self._error is None

        def run() -> None:
            try:
                call()
            except BaseException as error:  # whatever it is, it belongs to the caller
                self._error = error

        self._thread = threading.Thread(target=run, name="edgewright-checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> BaseException | None:
        """Until nothing is running; the error of what ran, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error
