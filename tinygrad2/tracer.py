"""Tracing: calls your functions for every operation of a forward pass, with its inputs and results, and of a backward
pass, with the gradients that it computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple


class Operation(NamedTuple):
    """One operation of a forward pass.

    name     such as "linear", "attention" or "add"; "an operation" if its backward function has no name.
    parents  the Tensors that it was computed from.
    results  the Tensors that it returned.
    saved    the values that its backward function needs.
    """

    name: str
    parents: tuple[Any, ...]
    results: tuple[Any, ...]
    saved: tuple[Any, ...]


class BackwardOperation(NamedTuple):
    """One operation of a backward pass.

    name       the name of the operation, as in the forward pass.
    node       the node of its results on the tape.
    edges      where the gradients of its parents go: (node or leaf, output), or None for a parent that needs none.
    gradients  the gradients of its parents, including what other operations have added so far, or None.
    """

    name: str
    node: Any
    edges: tuple[Any, ...]
    gradients: tuple[Any, ...]


Tracer = Callable[[Operation], object]
BackwardTracer = Callable[[BackwardOperation], object]
_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)
_backward_tracer: ContextVar[BackwardTracer | None] = ContextVar("backward_tracer", default=None)
active = _tracer.get  # () -> the callback for operations that is currently active in this thread, or None
active_backward = _backward_tracer.get  # () -> the same for backward passes


@contextmanager
def tracing(callback: Tracer, backward: BackwardTracer | None = None) -> Iterator[None]:
    """Inside this context, in this thread, `callback` is called for every operation that returns through record(), and
    `backward` for every operation of a backward pass.

    They may store their arguments, but must not change them. Outside of the context, each operation and each backward
    pass only checks whether there is a callback.
    """
    token, backward_token = _tracer.set(callback), _backward_tracer.set(backward)
    try:
        yield
    finally:
        _tracer.reset(token)
        _backward_tracer.reset(backward_token)


def report(backward: Any, parents: tuple[Any, ...], results: tuple[Any, ...], saved: tuple[Any, ...]) -> None:
    """Call the active callback for an operation with this backward function, or this kernel as its backward pass."""
    callback = active()
    assert callback is not None
    name = backward if isinstance(backward, str) else getattr(backward, "__name__", "an operation")
    callback(Operation(operation_name(name), parents, results, saved))


def operation_name(backward: str) -> str:
    """The name of an operation: the name of its backward function, without "_" and "_backward"."""
    return backward.removesuffix("_backward").lstrip("_") or backward
