"""What all commands share: Ctrl-C at any time, screens that cannot show every character, readers that have enough.

A file that is a command calls `begin` before its other imports, and at its end `run(main)`. While it imports NumPy and
the rest, and when it is over, Ctrl-C ends it with status 130 and shows no traceback. (Python's own way, an exception,
would come up anywhere within an import, which may turn it into another one.)
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


def begin() -> None:
    """From now on Ctrl-C ends this process, unless it is ignored (as in a shell's background jobs)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: object) -> None:
    os._exit(130)


def discard_output() -> None:
    """From now on print nowhere: the reader of a pipe has closed it, and Python would flush once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def run(main: Callable[[], int]) -> int:
    """The exit status that `main` returns. Within it Ctrl-C raises KeyboardInterrupt again."""
    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a text or a name may hold what this terminal cannot show
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has enough
        discard_output()
        return 0
    except KeyboardInterrupt:  # where main does not expect it, as while it reads its options
        return 130
    finally:
        begin()


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, with the nearest flag that exists."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the options)\n")

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [text for action in self._actions for text in action.option_strings if "_" not in text]
            if not unknown[0].startswith("-"):
                self.error(f"unexpected argument {unknown[0][:80]!r}")
            self.error(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
        return found


def nearest(word: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {match[0]}?" if match else ""
