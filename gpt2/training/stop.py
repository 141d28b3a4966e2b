"""Signals that request a run to finish its micro-step, save and stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

SignalHandler = Callable[[int, FrameType | None], object] | int | None  # as signal.signal returns it


class StopRequest:
    """Sets `requested` at the first Ctrl-C, SIGTERM or SIGUSR1; a second one has its usual effect immediately.

    Only the main thread can install signal handlers: in other threads `requested` stays False.

    verbose  acknowledge the request on standard error.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, verbose: bool):
        self.verbose = verbose
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._before: dict[int, SignalHandler] = {}
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
            with suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, b"stopping after this micro-step, then saving (repeat to stop at once)\n")
