"""Forks of a process while other threads compute.

A forked process has only the thread that forked, but a copy of all memory: a lock that another thread held stays locked
there, and the first product that needs it never returns. BLAS libraries have such locks, and so have Numba's compiler
and the memory pool. Therefore os.fork, which multiprocessing uses too, waits until no other thread computes a product
or holds one of these locks, and new products wait until the fork is done.

Python's hooks do this. Compiled code that forks does not call them; it is safe only if it then starts another program.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy

lock = threading.RLock()  # for this module and threads.py; re-entrant, since a signal handler may fork
locks: list[Any] = []  # further locks that a fork acquires; a thread that holds one must not enter `computing`
worker = threading.local()  # the attribute `inside` is set in the threads of kernels/pool.py
_changed = threading.Condition(lock)
_waiting = 0  # the number of threads that wait to fork
Identity = tuple[int, int]  # the thread that entered a context, and the context's id: a reference would keep it alive
_open: list[set[Identity]] = []  # the contexts that have been entered, by class


class computing:  # noqa: N801 - used as a function
    """A context in which no other thread forks."""

    open: ClassVar[set[Identity]] = set()
    identity: Identity = (0, 0)

    def __init_subclass__(cls) -> None:
        cls.open = set()
        _open.append(cls.open)

    def __enter__(self) -> None:
        with lock:
            if _waiting:
                _let_forks_pass()
            self.identity = threading.get_ident(), id(self)
            self.open.add(self.identity)

    def __exit__(self, *_: object) -> None:
        with lock:
            self.open.discard(self.identity)
            if _waiting:
                _changed.notify_all()

    def __del__(self) -> None:
        if self.identity in self.open:  # an interrupt came before __exit__
            self.__exit__()


_open.append(computing.open)


def _threads() -> set[int]:
    """The threads that are in a context."""
    return {thread for contexts in _open for thread, _ in list(contexts)}


def _let_forks_pass() -> None:
    """Wait for the forks that other threads wait for, unless this thread is in a context, or is a worker: its caller
    is in one."""
    while _waiting and not hasattr(worker, "inside") and threading.get_ident() not in _threads():
        _changed.wait()


def _before_fork() -> None:
    global _waiting
    if hasattr(worker, "inside"):
        return  # its caller waits for it, inside a context
    lock.acquire()
    _waiting += 1
    try:
        while _threads() - {threading.get_ident()}:
            _changed.wait()
    finally:
        _waiting -= 1
    for further in locks:
        further.acquire()


def _after_fork() -> None:
    if hasattr(worker, "inside"):
        return
    for further in reversed(locks):
        further.release()
    _changed.notify_all()
    lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def guarded(product: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes products by a BLAS library, inside such a context."""

    @functools.wraps(product)
    def call(*arguments: Any, **options: Any) -> Any:
        with computing():
            return product(*arguments, **options)

    return call


# NumPy, with guarded products: the array library of reference.py on the CPU.
guarded_numpy = SimpleNamespace(**{**vars(numpy), **{name: guarded(vars(numpy)[name]) for name in ("matmul", "dot")}})
