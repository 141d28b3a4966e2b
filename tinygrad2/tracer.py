"""Tracing: a function of yours is called for every operation of a forward pass, with its inputs and its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple


class Operation(NamedTuple):
    """One operation of a forward pass.

    name     such as "linear", "attention" or "add"; "an operation" where its backward function has no name.
    parents  the Tensors that it was computed from.
    results  the Tensors that it returned.
    saved    what its backward function needs.
    """

    name: str
    parents: tuple[Any, ...]
    results: tuple[Any, ...]
    saved: tuple[Any, ...]


Tracer = Callable[[Operation], object]
_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)
active = _tracer.get  # () -> the function that is called for each operation in this thread at the moment, or None


@contextmanager
def tracing(callback: Tracer) -> Iterator[None]:
    """Inside this context, in this thread, `callback` is called for every operation that returns through record().

    The callback may keep what it is given, and must not change it. Outside of the context, an operation only looks
    whether there is a callback.
    """
    token = _tracer.set(callback)
    try:
        yield
    finally:
        _tracer.reset(token)


def report(backward: Any, parents: tuple[Any, ...], results: tuple[Any, ...], saved: tuple[Any, ...]) -> None:
    """Call the active callback for an operation with this backward function, or kernel of this name."""
    callback = active()
    assert callback is not None
    name = backward if isinstance(backward, str) else getattr(backward, "__name__", "an operation")
    callback(Operation(operation_name(name), parents, results, saved))


def operation_name(backward: str) -> str:
    """The name of an operation: that of its backward function, without what says that it is one."""
    return backward.removesuffix("_backward").lstrip("_") or backward
