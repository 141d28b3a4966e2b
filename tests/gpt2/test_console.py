"""gpt2/console.py: how a command starts and ends: Ctrl-C, closed pipes, and terminals without all characters."""

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
    """What SIGINT does is restored afterwards; a process that a test starts has the default."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_main_gets_keyboard_interrupt(handler):
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


def test_a_terminal_without_all_characters_is_not_an_error(tmp_path):
    (tmp_path / "café.txt").write_text("text " * 20)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    program = [sys.executable, ROOT / "data" / "prepare.py", "café.txt", "--tokenizer", "bytes", "--out", "café"]
    ended = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "train on it: python train.py --data 'caf?'" in ended.stdout


def test_a_closed_pipe_is_not_an_error(handler, capfd):
    @console.command("test")
    def main(arguments):
        print("text")
        return 1

    reading, writing = os.pipe()
    os.close(reading)
    screen = os.dup(1)
    os.dup2(writing, 1)
    with open(1, "w", closefd=False) as broken, pytest.MonkeyPatch.context() as planted:
        planted.setattr(sys, "stdout", broken)
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
def test_an_error_is_one_line_and_a_status(capsys, error, options, status, line):
    assert raising(error, **options)([]) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"gpt2.test: {line}\n")


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(TypeError, match="ours"):
        raising(TypeError("ours"))([])


def test_ranks_report_errors_in_their_own_way():
    said = []

    def fail(line, status):
        said.append((line, status))
        return 7

    assert raising(ValueError("x"), fail=fail)([]) == 7
    assert said == [("gpt2.test: x", 1)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (4e6, "1,111:06:40")]
)
def test_clock(seconds, text):
    assert console.clock(seconds) == text
