"""The tape: nodes, the backward walk, and no_grad(). It knows no op, no Tensor, no array library and no device.

A forward pass leaves a graph of nodes behind. Each node knows the nodes it came from and how to send a gradient back to
them. Nodes are numbered as they are made, so going through them from the highest number to the lowest visits every node
after everything that used it: the backward walk is one sorted loop, with no recursion.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

_numbers = itertools.count()
_recording: ContextVar[bool] = ContextVar("recording", default=True)


def is_recording() -> bool:
    """Whether operations are put on the tape at the moment."""
    return _recording.get()


@contextmanager
def recording(on: bool) -> Iterator[None]:
    """Inside this context operations are put on the tape, or are not."""
    token = _recording.set(on)
    try:
        yield
    finally:
        _recording.reset(token)


def no_grad() -> AbstractContextManager[None]:
    """Inside this context nothing is recorded and nothing is saved for a backward pass."""
    return recording(False)


class Leaf:
    """Where gradients end: the node of a parameter, or of an input whose gradient is wanted.

    grad      the gradient summed so far, or None before the first contribution.
    zeros     makes a zeroed array of the leaf's shape.
    on_final  called with no arguments when one backward walk has added its last contribution to `grad`.
    """

    __slots__ = ("grad", "zeros", "on_final")

    def __init__(self, zeros: Callable[[], Any]):
        self.grad: Any = None
        self.zeros = zeros
        self.on_final: Callable[[], None] | None = None

    def buffer(self) -> Any:
        if self.grad is None:
            self.grad = self.zeros()
        return self.grad


class Node:
    """One recorded operation.

    parents   an edge (node, which of its outputs) for each input, or None for an input that wants no gradient.
    backward  backward(saved, dy, into) -> a gradient or None for each parent; see `record` in tensor.py.
    saved     what backward needs from the forward pass.
    zeros     for each output, makes a zeroed array of its shape.

    A node never holds its own output: the output holds the node, so there is no reference cycle to collect.
    """

    __slots__ = ("parents", "backward", "saved", "zeros", "number")

    def __init__(self, parents: tuple[Edge | None, ...], backward: Callable, saved: tuple, zeros: tuple[Callable, ...]):
        self.parents = parents
        self.backward: Callable | None = backward
        self.saved: Any = saved
        self.zeros = zeros
        self.number = next(_numbers)


Edge = tuple[Node | Leaf, int]


class Into:
    """What a backward function may ask for: `into(i)`, the buffer of parent i's gradient."""

    __slots__ = ("_pending", "_parents")

    def __init__(self, pending: _Pending, parents: tuple[Edge | None, ...]):
        self._pending = pending
        self._parents = parents

    def __call__(self, i: int) -> Any:
        """The buffer that parent i's gradient is to be added to, or None where it is not wanted."""
        edge = self._parents[i]
        return None if edge is None else self._pending.buffer(edge)


class _Pending:
    """Gradients on their way to nodes that have not run yet.

    The first gradient to arrive at an output is borrowed: it may be shared with another output, so it is never written
    to. The second makes a sum of our own, and later ones are added to that in place (the scheme of HIPS autograd).
    """

    def __init__(self) -> None:
        self._slots: dict[Edge, tuple[Any, bool]] = {}  # edge -> (gradient, whether it is ours to write to)

    def add(self, edge: Edge, gradient: Any) -> None:
        target = edge[0]
        if isinstance(target, Leaf):
            buffer = target.buffer()
            buffer += gradient
            return
        there = self._slots.get(edge)
        if there is None:
            self._slots[edge] = (gradient, False)
        elif there[1]:
            total = there[0]
            total += gradient
            self._slots[edge] = (total, True)  # a 0-d sum may be a scalar, which += cannot change in place
        else:
            self._slots[edge] = (there[0] + gradient, True)

    def buffer(self, edge: Edge) -> Any:
        target, output = edge
        if isinstance(target, Leaf):
            return target.buffer()
        gradient, ours = self._slots.get(edge, (None, False))
        if not ours:
            fresh = target.zeros[output]()
            if gradient is not None:
                fresh += gradient
            gradient = fresh
            self._slots[edge] = (gradient, True)
        return gradient

    def pop(self, node: Node) -> list[Any]:
        return [self._slots.pop((node, output), (None, False))[0] for output in range(len(node.zeros))]


def backward(gradients: list[tuple[Edge, Any]]) -> None:
    """Send gradients of the loss with respect to some outputs back to every leaf they came from: pairs (edge, dy).

    Leaves add up: gradients are summed into `Leaf.grad` until somebody clears them. What the nodes saved is dropped as
    the walk passes, so a graph can be walked once.

    Raises RuntimeError where part of the graph has been walked before.
    """
    nodes, uses = _reachable([edge[0] for edge, _ in gradients])
    pending = _Pending()
    for edge, dy in gradients:
        pending.add(edge, dy)
    for leaf in {edge[0] for edge, _ in gradients if isinstance(edge[0], Leaf) and edge[0] not in uses}:
        _final(leaf)
    for node in sorted(nodes, key=lambda node: node.number, reverse=True):
        arrived = pending.pop(node)
        function, saved, parents = node.backward, node.saved, node.parents
        node.backward, node.saved, node.parents = None, None, ()
        if any(gradient is not None for gradient in arrived):
            assert function is not None
            into = Into(pending, parents)
            out = function(saved, arrived[0] if len(arrived) == 1 else tuple(arrived), into)
            for parent, gradient in zip(parents, out, strict=True):
                if parent is not None and gradient is not None:
                    pending.add(parent, gradient)
        del saved, arrived
        for parent in reversed(parents):  # the order of the arena: last registered, first final
            if parent is not None and isinstance(parent[0], Leaf):
                uses[parent[0]] -= 1
                if not uses[parent[0]]:
                    _final(parent[0])


def _final(leaf: Leaf) -> None:
    if leaf.on_final is not None:
        leaf.on_final()


def _reachable(roots: list[Node | Leaf]) -> tuple[set[Node], Counter[Leaf]]:
    """Every node behind the roots, and how many edges lead to each leaf."""
    nodes: set[Node] = set()
    uses: Counter[Leaf] = Counter()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if isinstance(node, Leaf) or node in nodes:
            continue
        if node.backward is None:
            raise RuntimeError(
                "backward: this graph has been walked before, and what it had saved is freed; "
                "run the forward pass again, or add the losses up and call backward once"
            )
        nodes.add(node)
        for parent in node.parents:
            if parent is not None:
                if isinstance(parent[0], Leaf):
                    uses[parent[0]] += 1
                stack.append(parent[0])
    return nodes, uses
