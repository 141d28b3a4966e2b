"""The framework for commands: options, exit status, one-line errors, Ctrl-C, closed pipes, and terminal output.

A command's module has this form:

    def command_line() -> Parser: ...

    @console.command("gpt2.NAME")
    def main(arguments: Sequence[str] | None = None) -> int: ...

    if __name__ == "__main__":
        sys.exit(console.run(main))

A command prints with `say` and `print_error`, and reports an error by raising ValueError, OSError or MemoryError with a
one-line message.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import io
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from gpt2 import interrupts
from tinygrad2.files import discard_stdout

MIN_WIDTH, MAX_HELP_WIDTH = 20, 100  # columns


# Terminal output


def visible(text: str) -> str:
    """The text with control characters and other invisible characters escaped, for example as \\x1b or \\u202e.

    Apply it to all text from models, file names, data and configuration files, because such characters could control
    the terminal. Newlines, tabs, and the joiners that some scripts and emoji require are kept.
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t\u200c\u200d"
        else c
        for c in text
    )


def say(line: str) -> None:
    """Print a line to stdout, with control characters escaped."""
    print(visible(line), flush=True)


def say_if_possible(line: str) -> None:
    """Print a line to stdout, and ignore an output error (a closed pipe, a full disk), so that the caller continues."""
    try:
        say(line)
    except OSError:
        discard_stdout()


def print_error(line: str) -> None:
    """Print a line to stderr, with control characters escaped."""
    print(visible(line), file=sys.stderr, flush=True)


class Wrapper:
    """Wraps text that arrives in pieces. Lines are broken between words to fit the width.

    width   the number of columns. Wide characters, such as Chinese ones, occupy two columns, and a line may be broken
            between them.
    indent  printed before every line.
    """

    def __init__(self, write: Callable[[str], object], width: int, indent: str = ""):
        self._write, self._indent = write, indent
        self._width = max(width - len(indent), MIN_WIDTH)
        self._column, self._spaces, self._word = 0, "", ""

    def write(self, text: str) -> None:
        """Print the text, except for its last word, which may continue in the next piece."""
        for c in text:
            if c == "\n":
                self.finish()
                self._write("\n")
                self._column, self._spaces = 0, ""
            elif c in " \t":
                self._print_word()
                self._spaces += " " if c == " " else "    "
            else:
                self._word += c
                if columns(c) == 2 or columns(self._word) >= self._width:
                    self._print_word()

    def finish(self) -> None:
        """Print the last word."""
        self._print_word()

    def _print_word(self) -> None:
        if not self._word:
            return
        length = columns(self._word)
        if self._column and self._column + len(self._spaces) + length > self._width:
            self._write("\n")
            self._column, self._spaces = 0, ""
        spaces = self._spaces[: self._width - 1]
        self._write(("" if self._column else self._indent) + spaces + self._word)
        self._column += len(spaces) + length
        self._spaces = self._word = ""


class TextPrinter:
    """Prints a text to stdout in pieces. It is a context manager that ends the last line, even after Ctrl-C.

    On a terminal, the text is wrapped and control characters are escaped. In a file or a pipe, it is unchanged.
    """

    def __init__(self) -> None:
        self._wrapper = Wrapper(_print_piece, terminal_width()) if sys.stdout.isatty() else None

    def __enter__(self) -> TextPrinter:
        return self

    def write(self, text: str) -> None:
        if self._wrapper:
            self._wrapper.write(visible(text))
        else:
            _print_piece(text)

    def __exit__(self, *_: object) -> None:
        if self._wrapper:
            self._wrapper.finish()
        print(flush=True)


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def columns(text: str) -> int:
    """The number of terminal columns that the text occupies."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(text: str, width: int, indent: str = "") -> str:
    """The text, wrapped by a Wrapper."""
    pieces: list[str] = []
    wrapper = Wrapper(pieces.append, width, indent)
    wrapper.write(text)
    wrapper.finish()
    return "".join(pieces)


def terminal_width() -> int:
    """The width of the terminal, or the value of COLUMNS, or else 80."""
    return shutil.get_terminal_size().columns


# Running a command

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train": "train.py", "sample": "sample.py", "prepare": "data/prepare.py"}


def quoted(text: str) -> str:
    """The text, quoted as an argument of a shell command."""
    return f'"{text}"' if all(c.isalnum() or c in " .,:;?" for c in text) else shlex.quote(text)


def script_name(name: str) -> str:
    """The name of a script in messages: its path in the repository, or its module in an installed package."""
    return SCRIPTS[name] if (ROOT / SCRIPTS[name]).is_file() else f"gpt2.{name}"


def script(name: str) -> str:
    """The command that runs a script: `python train.py`, or `python -m gpt2.train` in an installed package."""
    found = script_name(name)
    return f"python {found}" if found.endswith(".py") else f"python -m {found}"


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
    """A decorator for a command's main function, which converts exceptions to one line on stderr and an exit status.

    ValueError, OSError, MemoryError  "NAME: error: ..." and `failed`
    an invalid option                 the same line and 2, from Parser
    BrokenPipeError                   no line, and `closed_pipe`: the reader of the output closed it. If `closed_pipe`
                                      is None, the error is handled like any other OSError.
    Ctrl-C                            "NAME: interrupted" and 130; see on_interrupt

    kept  what is still valid after an operating-system error or an interrupt; appended to the line.
    fail  prints the line and returns the exit status.
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
                    discard_stdout()  # Python flushes stdout again when it exits
                    return closed_pipe
                from_system = isinstance(error, OSError) and error.strerror
                line, status = f"error: {one_line(error)}{remark if from_system else ''}", failed
            except KeyboardInterrupt as interrupt:
                line, status = f"interrupted{f'; {interrupt}' if interrupt.args else remark}", 130
            return fail(visible(f"{name}: {line}"), status)

        return guarded

    return decorate


@contextmanager
def on_interrupt(remark: str) -> Iterator[None]:
    """A context in which Ctrl-C is reported with this remark, for example about the state of the output."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(remark) from None


def run(main: Callable[[], int]) -> int:
    """Run a command's main function, and return its exit status. Called on the last line of the command's module."""
    try:
        interrupts.raise_on_ctrl_c()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # the terminal's encoding may not support every character
        return main()
    except KeyboardInterrupt:  # it arrived just before or after main
        return 130
    finally:
        interrupts.exit_silently_on_ctrl_c()


def one_line(error: Exception) -> str:
    """The error's message, or, for an operating-system error, the name of the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or else the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def clock(seconds: float) -> str:
    """A duration as 2:03 (minutes and seconds) or 1:02:03 (with hours)."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def duration(seconds: float) -> str:
    """A duration in its largest suitable unit: 40 s, 23 min, 5.2 h, 2.4 days."""
    for size, unit, most, form in ((1, "s", 90, ".0f"), (60, "min", 5400, ".0f"), (3600, "h", 172_800, ".1f")):
        if seconds < most:
            return f"{seconds / size:{form}} {unit}"
    return f"{seconds / 86_400:,.1f} days"


# Options


class HelpFormatter(argparse.HelpFormatter):
    """Formats help with the same width for every command. Each option's text ends with [required] or the default. If
    the default is None, the text itself says what happens without the option."""

    def __init__(self, prog: str):
        width = max(MIN_WIDTH, min(MAX_HELP_WIDTH, terminal_width()))
        super().__init__(prog, max_help_position=28, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"  # Python 3.12 and older repeat the value after each flag

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if text.endswith("]") or isinstance(action, argparse._HelpAction):
            return text
        if action.required:
            return f"{text} [required]"
        if action.nargs == 0:
            return f"{text} [default: off]"
        return text if action.default is None else f"{text} [default: %(default)s]"


class Parser(argparse.ArgumentParser):
    """A parser with titled groups of options. An invalid option is reported in one line, with the most similar flag.

    Flags may be written with "_" instead of "-", as in nanoGPT.

    command      the command as the user types it, such as "python -m gpt2.verify".
    positionals  the positional arguments, for the usage line.
    familiar     flags of other programs, each with advice on what to use instead.
    stray        returns advice for unexpected positional arguments.
    """

    def __init__(
        self,
        command: str,
        description: str | None,
        positionals: str = "",
        epilog: str | None = None,
        familiar: Mapping[str, str] = MappingProxyType({}),
        stray: Callable[[str], str] = lambda argument: "",
    ):
        usage = " ".join(filter(None, (command, positionals, "[OPTIONS]"))).replace("%", "%%")
        super().__init__(
            prog=command,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self._familiar, self._stray = familiar, stray
        self._given: list[str] = []

    def error(self, message: str) -> NoReturn:
        message += self._choices_of_missing(message) + self._dash_advice(message)
        name = self.prog.split()[-1]  # as in the command's other messages
        self.exit(2, visible(f"{name}: error: {message} ({self.prog} --help lists the options)\n"))

    def _choices_of_missing(self, message: str) -> str:
        """The choices of the required options that are missing."""
        missing = message.rpartition("arguments are required: ")[2].split(", ")
        return "".join(
            f"; {flag} is one of {', '.join(map(str, action.choices))}"
            for action in self._actions
            for flag in action.option_strings
            if flag in missing and action.choices
        )

    def _dash_advice(self, message: str) -> str:
        """Advice on how to pass a value that begins with "-", if that is why the value is missing."""
        if not message.endswith("expected one argument"):
            return ""
        flags = message.removeprefix("argument ").partition(":")[0].split("/")
        values = [after for flag, after in pairwise(self._given) if flag in flags and after.startswith("-")]
        value = next((value for value in values if value not in self._option_string_actions), "")
        return (
            f"; write a value that begins with - after =, as in {shlex.quote(f'{flags[-1]}={value}')}" if value else ""
        )

    def check_output(self, name: str, path: Path | None) -> None:
        """Report an output file that the command cannot write, because its folder does not exist or it is a folder.

        name  the name of the option.
        path  the value of the option, or None.
        """
        if path is not None and not path.parent.is_dir():
            self.error(f"{name} {path}: the folder {path.parent}/ does not exist")
        if path is not None and path.is_dir():
            self.error(f"{name} {path} is a folder; expected a file")

    def parse_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else list(args)
        self._given = given
        end = given.index("--") if "--" in given else len(given)
        found, unknown = self.parse_known_args([*map(_with_dashes, given[:end]), *given[end:]], namespace)
        if unknown:
            known = [text for action in self._actions for text in action.option_strings]
            name = unknown[0].split("=")[0]
            if not unknown[0].startswith("-"):
                words = " ".join(word for word in unknown if not word.startswith("-"))
                self.error(f"unexpected argument {unknown[0][:80]!r}{self._stray(words)}")
            self.error(f"unknown option {unknown[0]}{suggestion(name, known, self._familiar)}")
        return found


def _with_dashes(argument: str) -> str:
    """The argument with dashes in its flag: --max_tokens=5 becomes --max-tokens=5. Other arguments are unchanged."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") and " " not in name else argument


def nearest(word: str, known: Sequence[str]) -> str:
    """A suggestion of the most similar of the `known` words, or "" if none is similar."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {match[0]}?" if match else ""


def suggestion(flag: str, known: Sequence[str], familiar: Mapping[str, str]) -> str:
    """Advice on an unknown flag: the advice for this flag of another program, or the most similar flag."""
    plain = flag.replace("--no-", "--", 1)
    if plain in familiar:
        return f"; {familiar[plain]}"
    match = difflib.get_close_matches(plain, [*known, *familiar], n=1, cutoff=0.7)
    return f"; {familiar[match[0]]}" if match and match[0] in familiar else nearest(flag, known)
