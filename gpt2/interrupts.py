"""Makes Ctrl-C exit silently, with status 130, while a command imports its modules and after its main function.

Otherwise KeyboardInterrupt could be raised anywhere within an import, which may convert it to another error, and Python
would print a traceback. The package imports this module first, before NumPy and other modules. During the main
function, console.run makes Ctrl-C raise KeyboardInterrupt as usual.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

SCRIPTS = ("train.py", "sample.py", "data/prepare.py")  # they import gpt2 before any large module


def exit_silently(number: int, frame: object) -> None:
    """The signal handler."""
    os._exit(130)


def exit_silently_on_ctrl_c() -> None:
    """Make Ctrl-C exit silently, unless it is ignored (as in a shell's background jobs) or already has a handler."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_silently)


def raise_on_ctrl_c() -> None:
    """Undo exit_silently_on_ctrl_c, so that Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is exit_silently:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def starting_a_command() -> bool:
    """Whether this process was started as `python -m gpt2.NAME` or as one of SCRIPTS."""
    if sys.argv[:1] == ["-m"]:  # its value until Python has found the module
        return any(argument.startswith("gpt2.") for argument in getattr(sys, "orig_argv", ()))
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    root = Path(__file__).resolve().parents[1]
    return file is not None and Path(file).resolve() in [root / name for name in SCRIPTS]
