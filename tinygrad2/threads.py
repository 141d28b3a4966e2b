"""How many threads compute on the CPU, and how work is cut for them. The threads themselves: kernels/pool.py."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from threadpoolctl import ThreadpoolController


def cores(process: int = 0) -> set[int]:
    """The cores that a process may use (0 is this one), by number."""
    return os.sched_getaffinity(process) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def available() -> int:
    """How many cores this process may use; where a container gets less of their time, as many as that is worth."""
    return max(1, math.ceil(min(len(cores()), _quota())))


def _quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """The cores' worth of time that the control group (version 2) allows; infinite without a limit."""
    try:
        limit, period = file.read_text(encoding="ascii").split()
        return math.inf if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return math.inf


_count = available()
_blas: ThreadpoolController | None = None
_lock, _asking = threading.Lock(), 0  # how many ask for BLAS on one thread
_limiter: Any = None


def count() -> int:
    """How many threads compute."""
    return _count


def set_count(n: int) -> None:
    """Compute on n threads from now on, BLAS too."""
    global _count
    if n < 1:
        raise ValueError(f"threads: {n} asked for; expected at least 1")
    _count = n
    _controller().limit(limits=n, user_api="blas")


def parts(n: int, grain: int) -> list[tuple[int, int]]:
    """0 ... n-1 in at most count() contiguous parts (start, stop) of nearly equal size, each of at least `grain`."""
    pieces = max(1, min(_count, n // max(1, grain)))
    return [(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]


@contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """BLAS computes each call on the thread that makes it. Of several that ask for it, the last puts back what was."""
    global _asking, _limiter
    with _lock:
        if not _asking:
            _limiter = _controller().limit(limits=1, user_api="blas")
        _asking += 1
    try:
        yield
    finally:
        with _lock:
            _asking -= 1
            if not _asking:
                _limiter.restore_original_limits()


def _controller() -> ThreadpoolController:
    global _blas
    if _blas is None:
        _blas = ThreadpoolController()
    return _blas
