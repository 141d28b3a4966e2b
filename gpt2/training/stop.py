"""Handles the signals that request a run to finish its micro-step, save and stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

SignalHandler = Callable[[int, FrameType | None], object] | int | None  # what signal.signal returns


class StopRequest:
    """Sets `requested` on the first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP (the terminal was closed; nohup ignores it). A
    second signal has its usual effect immediately.

    Only the main thread can install signal handlers; in other threads, `requested` remains False.

    verbose  acknowledge the request on standard error.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
    )

    def __init__(self, verbose: bool):
        self.verbose = verbose
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._before: dict[int, SignalHandler] = {}
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                # Background jobs (&) ignore SIGINT.
                if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                    self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._before[number])
        if self.verbose:
            with suppress(OSError):  # print is not used here, since the signal may have interrupted a print
                os.write(2, b"stopping after this micro-step or compilation, then saving (repeat to stop at once)\n")
