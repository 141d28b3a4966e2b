"""gpt2/console.py: Ctrl-C, closed pipes, exit statuses, and terminals with limited encodings."""

import argparse
import io
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from gpt2 import console, interrupts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def handler():
    """Set Python's default SIGINT handler, and restore the previous one after the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_main_receives_keyboard_interrupt(handler):
    def main():
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.raise_signal(signal.SIGINT)
        return 0

    interrupts.exit_silently_on_ctrl_c()
    ending = signal.getsignal(signal.SIGINT)
    assert ending is not signal.default_int_handler
    assert console.run(main) == 130
    assert console.run(lambda: 7) == 7
    assert signal.getsignal(signal.SIGINT) is ending


def test_a_terminal_with_a_limited_encoding_is_not_an_error(tmp_path):
    (tmp_path / "café.txt").write_text("text " * 20)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    program = [sys.executable, ROOT / "data" / "prepare.py", "café.txt", "--tokenizer", "bytes", "--out", "café"]
    ended = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "next: python train.py --data 'caf?' --out-dir" in ended.stdout


def test_a_closed_pipe_is_not_an_error(handler, capfd):
    @console.command("test")
    def main(arguments):
        print("text")
        return 1

    reading, writing = os.pipe()
    os.close(reading)
    screen = os.dup(1)
    os.dup2(writing, 1)
    with open(1, "w", closefd=False) as broken, pytest.MonkeyPatch.context() as injected:
        injected.setattr(sys, "stdout", broken)
        assert console.run(main) == 0
    os.dup2(screen, 1)
    for file in (screen, writing):
        os.close(file)


# Errors and exit statuses --------------------------------------------------------------------------------------------


def raising(error, **options):
    @console.command("gpt2.test", **options)
    def main(arguments=None):
        if isinstance(error, KeyboardInterrupt):
            with console.on_interrupt(*error.args) if error.args else nullcontext():
                raise KeyboardInterrupt
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "options", "status", "line"),
    [
        (ValueError("x is 3; expected 4"), {}, 1, "x is 3; expected 4"),
        (ValueError("x"), {"failed": 2}, 2, "x"),
        (MemoryError(), {}, 1, "MemoryError"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), {}, 1, "a/b: No such file or directory"),
        (FileExistsError("c: it exists already"), {"kept": "d is intact"}, 1, "c: it exists already"),
        (OSError(28, "No space left on device"), {"kept": "d is intact"}, 1, "No space left on device; d is intact"),
        (KeyboardInterrupt(), {}, 130, "interrupted"),
        (KeyboardInterrupt(), {"kept": "d is intact"}, 130, "interrupted; d is intact"),
        (KeyboardInterrupt("e was not written"), {"kept": "d is intact"}, 130, "interrupted; e was not written"),
        (BrokenPipeError(32, "Broken pipe"), {"closed_pipe": None}, 1, "Broken pipe"),
    ],
)
def test_an_error_prints_one_line_and_returns_a_status(capsys, error, options, status, line):
    assert raising(error, **options)([]) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"gpt2.test: {'' if 'interrupted' in line else 'error: '}{line}\n")


def test_unexpected_exceptions_propagate():
    with pytest.raises(TypeError, match="ours"):
        raising(TypeError("ours"))([])


def test_a_command_can_replace_the_error_function():
    said = []

    def fail(line, status):
        said.append((line, status))
        return 7

    assert raising(ValueError("x"), fail=fail)([]) == 7
    assert said == [("gpt2.test: error: x", 1)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (4e6, "1,111:06:40")]
)
def test_clock(seconds, text):
    assert console.clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (1400, "23 min"),
        (5399, "90 min"),
        (18_700, "5.2 h"),
        (2e5, "2.3 days"),
        (1e9, "11,574.1 days"),
    ],
)
def test_duration(seconds, text):
    assert console.duration(seconds) == text


# Text on a terminal --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text\n\tand a tab", "plain text\n\tand a tab"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\rb\x07\x00\x7f\x9b", "a\\rb\\x07\\x00\\x7f\\x9b"),
        ("\u202eright to left", "\\u202eright to left"),
        ("naïve 文字 👩\u200d👧", "naïve 文字 👩\u200d👧"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_are_visible(text, shown):
    assert console.visible(text) == shown


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_every_line_is_escaped(monkeypatch, stream):
    """Lines are escaped even if the stream is a file, because the file may be shown on a terminal later."""
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    console.say("a\x1bb")
    console.print_error("c\x1bd")
    assert raising(ValueError("e\x1bf"))([]) == 1
    assert sys.stdout.getvalue() == "a\\x1bb\n"
    assert sys.stderr.getvalue() == "c\\x1bd\ngpt2.test: error: e\\x1bf\n"


TEXT = "It is 12 words long, this one,    and it has\n\n  an indented line. " + 30 * "x" + " 文字文字文字文字文字文字"


@pytest.mark.parametrize("width", [20, 23, 40, 200])
@pytest.mark.parametrize("indent", ["", "    "])
def test_wrapping_keeps_the_words_and_fits_the_width(width, indent):
    result = console.wrapped(TEXT, width, indent)
    room = max(width, 20 + len(indent))
    assert all(console.columns(line) <= room for line in result.splitlines())
    assert all(line.startswith(indent) for line in result.splitlines() if line)
    assert "".join(result.split()) == "".join(TEXT.split())
    if width == 200:
        assert result == "\n".join(indent * bool(line) + line for line in TEXT.split("\n"))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_text_in_pieces_is_wrapped_like_the_complete_text(size):
    pieces = []
    wrapper = console.Wrapper(pieces.append, 24)
    for start in range(0, len(TEXT), size):
        wrapper.write(TEXT[start : start + size])
    wrapper.finish()
    assert "".join(pieces) == console.wrapped(TEXT, 24)


def test_text_is_wrapped_only_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    for screen, expected in (
        (Terminal(), "one two three four\nfive \\x1b\n"),
        (io.StringIO(), "one two three four five \x1b\n"),
    ):
        monkeypatch.setattr(sys, "stdout", screen)
        with console.TextPrinter() as printer:
            printer.write("one two thr")
            printer.write("ee four five \x1b")
        assert screen.getvalue() == expected


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (["--max_tokens", "5"], 5),
        (["--max_tokens=5"], 5),
        (["--max-tokens=5"], 5),
    ],
)
def test_flags_may_be_written_with_underscores(given, parsed):
    parser = console.Parser("python x.py", "")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--text")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args([*given, "--text=a_b", "--", "--c_d"]) == argparse.Namespace(
        max_tokens=parsed, text="a_b", rest=["--c_d"]
    )
