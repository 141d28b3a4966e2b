"""Ctrl-C while a command still imports NumPy and the rest, or is over: it ends with status 130, without a traceback.

A file that is a command calls `ends` before its other imports, and at its end `run(main)`. (Python's own way, an
exception, would come up anywhere within an import, which may turn it into another one.)
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def ends() -> None:
    """From now on Ctrl-C ends this process, unless it is ignored (as in a shell's background jobs)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: object) -> None:
    os._exit(130)


def run(main: Callable[[], int]) -> int:
    """The exit status that `main` returns. Within it Ctrl-C raises KeyboardInterrupt again."""
    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main()
    except KeyboardInterrupt:  # where main does not expect it, as while it reads its options
        return 130
    finally:
        ends()
