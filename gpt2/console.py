"""How a command runs: its exit status, errors in one line, Ctrl-C, closed pipes, and terminals without all characters.

The file of a command has

    @console.command("gpt2.NAME")
    def main(arguments: Sequence[str] | None = None) -> int: ...

    if __name__ == "__main__":
        sys.exit(console.run(main))

and raises ValueError, OSError or MemoryError with one line for the user.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from gpt2 import interrupts
from tinygrad2.files import discard_stdout


def print_error(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


def _fail(line: str, status: int) -> int:
    print_error(line)
    return status


def command(
    name: str,
    *,
    failed: int = 1,
    closed_pipe: int | None = 0,
    kept: str = "",
    fail: Callable[[str, int], int] = _fail,
) -> Callable[[Callable[[Sequence[str] | None], int]], Callable[..., int]]:
    """A decorator of a command's main function: what it raises becomes one line on stderr and an exit status.

    ValueError, OSError, MemoryError  `failed`
    a mistake in the options          2, from Parser
    BrokenPipeError                   `closed_pipe`, without a line: the reader of the output wants no more of it. With
                                      None it is an error like any other OSError.
    Ctrl-C                            130; see on_interrupt

    kept  what remains valid when the operating system refuses something or the user interrupts; ends the line.
    fail  prints the line and returns the status.
    """
    remark = f"; {kept}" if kept else ""

    def decorate(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
        @functools.wraps(main)
        def guarded(arguments: Sequence[str] | None = None) -> int:
            try:
                status = main(arguments)
                sys.stdout.flush()
                return status
            except (ValueError, OSError, MemoryError) as error:
                if isinstance(error, BrokenPipeError) and closed_pipe is not None:
                    discard_stdout()  # Python flushes once more when it ends
                    return closed_pipe
                refused = isinstance(error, OSError) and error.strerror
                return fail(f"{name}: {one_line(error)}{remark if refused else ''}", failed)
            except KeyboardInterrupt as interrupt:
                return fail(f"{name}: interrupted{f'; {interrupt}' if interrupt.args else remark}", 130)

        return guarded

    return decorate


@contextmanager
def on_interrupt(remark: str) -> Iterator[None]:
    """A Ctrl-C within the block is reported with this remark, such as what happens to the output."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(remark) from None


def run(main: Callable[[], int]) -> int:
    """The exit status of a command's main function, for the last line of its file."""
    try:
        interrupts.raise_on_ctrl_c()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a text or a name may hold what this terminal cannot show
        return main()
    except KeyboardInterrupt:  # just before or after main
        return 130
    finally:
        interrupts.exit_silently_on_ctrl_c()


def one_line(error: Exception) -> str:
    """What went wrong, with the file's name first where the operating system refused something."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty; its type where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def clock(seconds: float) -> str:
    """A duration as 2:03 (minutes, seconds) or 1:02:03 (hours too)."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, with the nearest flag that exists."""

    def error(self, message: str) -> NoReturn:
        name = self.prog.split()[-1]  # without "python -m", as in the other lines of a command
        self.exit(2, f"{name}: {message} ({self.prog} --help lists the options)\n")

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [text for action in self._actions for text in action.option_strings if "_" not in text]
            if not unknown[0].startswith("-"):
                self.error(f"unexpected argument {unknown[0][:80]!r}")
            self.error(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
        return found


def nearest(word: str, known: Sequence[str]) -> str:
    """A question that suggests the most similar of the `known` words, or "" if none is similar."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {match[0]}?" if match else ""
