"""Forks of a process while other threads compute.

A child process has a copy of all memory, but only the thread that forked. A lock that another thread held is never
released in the child, so a matrix product that needs the lock does not return. BLAS libraries have such locks, and so
do Numba's compiler and the memory pool. Therefore os.fork, which multiprocessing also uses, waits until no other thread
computes a product or holds one of these locks, and new products wait until the fork is complete.

This uses the hooks of os.register_at_fork. A fork in compiled code does not call them, and is safe only if the child
process then starts another program.
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
locks: list[Any] = []  # other locks to hold during a fork; a thread that holds one must not enter `computing`
worker = threading.local()  # has the attribute `inside` in the threads of kernels/pool.py
_changed = threading.Condition(lock)
_waiting = 0  # the number of threads that are waiting to fork
Identity = tuple[int, int]  # a thread, and the id of its context (a reference would keep the context alive)
_open: list[set[Identity]] = []  # for each class, its active contexts


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
                _wait_for_forks()
            self.identity = threading.get_ident(), id(self)
            self.open.add(self.identity)

    def __exit__(self, *_: object) -> None:
        with lock:
            self.open.discard(self.identity)
            if _waiting:
                _changed.notify_all()

    def __del__(self) -> None:
        if self.identity in self.open:  # it was interrupted before __exit__
            self.__exit__()


_open.append(computing.open)


def _threads() -> set[int]:
    """The threads with an active context."""
    return {thread for contexts in _open for thread, _ in list(contexts)}


def _wait_for_forks() -> None:
    """Wait until no other thread is waiting to fork. Returns immediately if this thread has an active context, or is a
    worker, whose caller has one."""
    while _waiting and not hasattr(worker, "inside") and threading.get_ident() not in _threads():
        _changed.wait()


def _before_fork() -> None:
    global _waiting
    if hasattr(worker, "inside"):
        return  # its caller has an active context, and is waiting for it
    lock.acquire()
    _waiting += 1
    try:
        while _threads() - {threading.get_ident()}:
            _changed.wait()
    finally:
        _waiting -= 1
    for other in locks:
        other.acquire()


def _after_fork() -> None:
    if hasattr(worker, "inside"):
        return
    for other in reversed(locks):
        other.release()
    _changed.notify_all()
    lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def guarded(product: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that calls BLAS so that it runs in this context."""

    @functools.wraps(product)
    def call(*arguments: Any, **options: Any) -> Any:
        with computing():
            return product(*arguments, **options)

    return call


# NumPy, with guarded products: the array library of reference.py on the CPU.
guarded_numpy = SimpleNamespace(**{**vars(numpy), **{name: guarded(vars(numpy)[name]) for name in ("matmul", "dot")}})
