"""Tracing: callbacks for every operation of a forward pass, with its inputs and results, and of a backward pass, with
the gradients that it computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple


class Operation(NamedTuple):
    """One operation of a forward pass.

    name     such as "linear", "attention" or "add"; "an operation" if its backward function has no name.
    parents  the input Tensors.
    results  the resulting Tensors.
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
    edges      per parent, the edge that its gradient is added to: (node or leaf, output); None if it needs no gradient.
    gradients  per parent, the gradient accumulated so far, including contributions of other operations, or None.
    """

    name: str
    node: Any
    edges: tuple[Any, ...]
    gradients: tuple[Any, ...]


Tracer = Callable[[Operation], object]
BackwardTracer = Callable[[BackwardOperation], object]
_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)
_backward_tracer: ContextVar[BackwardTracer | None] = ContextVar("backward_tracer", default=None)
active = _tracer.get  # () -> the callback for operations that is active in this thread, or None
active_backward = _backward_tracer.get  # () -> the callback for backward passes, or None


@contextmanager
def tracing(callback: Tracer, backward: BackwardTracer | None = None) -> Iterator[None]:
    """A context manager, for the current thread, in which `callback` is called for every operation that returns through
    record(), and `backward` for every operation of a backward pass.

    Callbacks may store their arguments, but must not modify them. Without a callback, the only cost is a check per
    operation and per backward pass.
    """
    token, backward_token = _tracer.set(callback), _backward_tracer.set(backward)
    try:
        yield
    finally:
        _tracer.reset(token)
        _backward_tracer.reset(backward_token)


def report(backward: Any, parents: tuple[Any, ...], results: tuple[Any, ...], saved: tuple[Any, ...]) -> None:
    """Call the active callback for an operation. `backward` is its backward function, or the name of a kernel."""
    callback = active()
    assert callback is not None
    name = backward if isinstance(backward, str) else getattr(backward, "__name__", "an operation")
    callback(Operation(operation_name(name), parents, results, saved))


def operation_name(backward: str) -> str:
    """The name of an operation: the name of its backward function, without the prefix "_" and suffix "_backward"."""
    return backward.removesuffix("_backward").lstrip("_") or backward
