"""Stopping a run from outside: signals that ask it to finish the step and save."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a request to stop after the step; the second acts at once.

    Only the main thread receives signals: in any other one there are no handlers, and `requested` stays False.

    verbose  say on standard error that the request has been received.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, verbose: bool):
        self.verbose = verbose
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._before[number])
        if self.verbose:
            with suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, b"finishing this step, then saving (once more to stop at once)\n")
