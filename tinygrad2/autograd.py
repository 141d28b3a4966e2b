"""The tape: nodes, the backward pass over them, and no_grad(). Independent of ops, Tensors, array library and device.

A forward pass leaves a graph of nodes behind. Each node knows the nodes that its inputs came from, and how to compute
their gradients from its own. Nodes are numbered as they are created, so visiting them from the highest number to the
lowest reaches every node after all nodes that used its results: the backward pass is one sorted loop, no recursion.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from tinygrad2.array import Array

_numbers = itertools.count()
_recording: ContextVar[bool] = ContextVar("recording", default=True)


def is_recording() -> bool:
    """Whether operations are recorded on the tape at the moment."""
    return _recording.get()


@contextmanager
def recording(on: bool) -> Iterator[None]:
    """Inside this context operations are recorded on the tape, or are not."""
    token = _recording.set(on)
    try:
        yield
    finally:
        _recording.reset(token)


def no_grad() -> AbstractContextManager[None]:
    """Inside this context nothing is recorded and nothing is saved for a backward pass."""
    return recording(False)


class Leaf:
    """The node of a parameter, or of an input whose gradient is wanted: it has no parents.

    grad      the gradient summed so far, or None before the first contribution.
    zeros     makes a zeroed array of the leaf's shape.
    on_final  called without arguments when one backward pass has added its last contribution to `grad`.
    """

    __slots__ = ("grad", "zeros", "on_final")

    def __init__(self, zeros: Callable[[], Array]):
        self.grad: Array | None = None
        self.zeros = zeros
        self.on_final: Callable[[], None] | None = None

    def buffer(self) -> Array:
        """The array that gradients are added to; zeroed when it is first asked for."""
        if self.grad is None:
            self.grad = self.zeros()
        return self.grad


Saved = tuple[Any, ...]  # what a backward function needs from the forward pass: arrays, shapes, numbers
Gradients = Sequence[Array | None]  # one for each parent


class Node:
    """One recorded operation.

    parents   an edge (node, which of its outputs) for each input, or None for an input that wants no gradient.
    backward  backward(saved, dy, into) -> a gradient or None for each parent; see `record` in tensor.py.
    saved     what backward needs from the forward pass.
    zeros     for each output, makes a zeroed array of its shape.

    A node never holds its own output: the output holds the node, so there is no reference cycle to collect.
    """

    __slots__ = ("parents", "backward", "saved", "zeros", "number")

    def __init__(
        self,
        parents: tuple[Edge | None, ...],
        backward: BackwardFunction,
        saved: Saved,
        zeros: tuple[Callable[[], Array], ...],
    ):
        self.parents = parents
        self.backward: BackwardFunction | None = backward
        self.saved: Saved | None = saved
        self.zeros = zeros
        self.number = next(_numbers)


Edge = tuple[Node | Leaf, int]


class GradientBuffers:
    """The gradient buffers of a node's parents, which its backward function may add to: its argument `into`."""

    __slots__ = ("_pending", "_parents")

    def __init__(self, pending: _PendingGradients, parents: tuple[Edge | None, ...]):
        self._pending = pending
        self._parents = parents

    def __call__(self, i: int) -> Array | None:
        """The buffer to add parent i's gradient to, or None where that gradient is not wanted."""
        edge = self._parents[i]
        return None if edge is None else self._pending.buffer(edge)


BackwardFunction = Callable[[Saved, Any, GradientBuffers], Gradients]  # of an op of several results, dy is a tuple


class _PendingGradients:
    """Gradients of nodes whose backward function has not run yet.

    The first gradient to arrive at an output is borrowed: it may be shared with another output, so it is never written
    to. The second makes a sum in an array of its own, and later ones are added to that in place (as in HIPS autograd).
    """

    def __init__(self) -> None:
        self._gradients: dict[Edge, tuple[Array, bool]] = {}  # edge -> (gradient, whether it may be written to)

    def add(self, edge: Edge, gradient: Array) -> None:
        target = edge[0]
        if isinstance(target, Leaf):
            buffer = target.buffer()
            buffer += gradient
            return
        earlier = self._gradients.get(edge)
        if earlier is None:
            self._gradients[edge] = (gradient, False)
        elif earlier[1]:
            total = earlier[0]
            total += gradient
            self._gradients[edge] = (total, True)  # a 0-d sum may be a scalar, which += cannot change in place
        else:
            self._gradients[edge] = (earlier[0] + gradient, True)

    def buffer(self, edge: Edge) -> Array:
        target, output = edge
        if isinstance(target, Leaf):
            return target.buffer()
        gradient, owned = self._gradients.get(edge, (None, False))
        if gradient is None or not owned:
            buffer = target.zeros[output]()
            if gradient is not None:
                buffer += gradient
            gradient = buffer
            self._gradients[edge] = (gradient, True)
        return gradient

    def pop(self, node: Node) -> list[Array | None]:
        """The gradients of the node's outputs, None where none arrived."""
        return [self._gradients.pop((node, output), (None, False))[0] for output in range(len(node.zeros))]


def backward(gradients: list[tuple[Edge, Array]]) -> None:
    """Compute the gradient of every leaf behind some outputs, given the gradients of these: pairs (edge, dy).

    Gradients are summed into `Leaf.grad` until they are cleared. What a node saved is freed as soon as its backward
    function has run, so a graph can be used once.

    Raises RuntimeError where a part of the graph has been used before.
    """
    nodes, uses = _reachable([edge[0] for edge, _ in gradients])
    pending = _PendingGradients()
    for edge, dy in gradients:
        pending.add(edge, dy)
    for leaf in {edge[0] for edge, _ in gradients if isinstance(edge[0], Leaf) and edge[0] not in uses}:
        _call_on_final(leaf)
    for node in sorted(nodes, key=lambda node: node.number, reverse=True):
        arrived = pending.pop(node)
        function, saved, parents = node.backward, node.saved, node.parents
        node.backward, node.saved, node.parents = None, None, ()
        if any(gradient is not None for gradient in arrived):
            assert function is not None
            assert saved is not None
            into = GradientBuffers(pending, parents)
            results = function(saved, arrived[0] if len(arrived) == 1 else tuple(arrived), into)
            for parent, gradient in zip(parents, results, strict=True):
                if parent is not None and gradient is not None:
                    pending.add(parent, gradient)
        del saved, arrived
        for parent in reversed(parents):  # the order of the arena: last registered, first final
            if parent is not None and isinstance(parent[0], Leaf):
                uses[parent[0]] -= 1
                if not uses[parent[0]]:
                    _call_on_final(parent[0])


def _call_on_final(leaf: Leaf) -> None:
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
                "backward: an earlier backward() went through this graph and freed what it had saved; "
                "run the forward pass again, or add the losses and call backward once"
            )
        nodes.add(node)
        for parent in node.parents:
            if parent is not None:
                if isinstance(parent[0], Leaf):
                    uses[parent[0]] += 1
                stack.append(parent[0])
    return nodes, uses
