"""The tape: nodes, the backward pass over them, and no_grad(). It does not depend on operations, Tensors or devices.

A forward pass records a graph of nodes. Each node refers to the nodes that computed its inputs, and can compute their
gradients from its own. Nodes are numbered in order of creation. In descending order, each node therefore comes after
all nodes that use its results, so the backward pass is one loop over sorted nodes, without recursion.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy

from tinygrad2 import missing_names
from tinygrad2.array import Array, may_share_memory
from tinygrad2.precision import sum_dtype
from tinygrad2.tracer import BackwardOperation, active_backward, operation_name

_numbers = itertools.count()
_recording: ContextVar[bool] = ContextVar("recording", default=True)


def new_number() -> int:
    """Return a number greater than that of any existing node."""
    return next(_numbers)


def is_recording() -> bool:
    """Whether operations are being recorded on the tape."""
    return _recording.get()


@contextmanager
def recording(on: bool) -> Iterator[None]:
    """Turn recording on the tape on or off inside this context."""
    token = _recording.set(on)
    try:
        yield
    finally:
        _recording.reset(token)


def no_grad() -> AbstractContextManager[None]:
    """A context manager in which operations are not recorded and save nothing for a backward pass."""
    return recording(False)


# The form of a gradient: the array type, shape and dtype of the corresponding result, and the `zeros` function of its
# array library. (It is a plain tuple for speed, since one is created for every result.)
Form = tuple[Any, tuple[int, ...], numpy.dtype, Callable[[tuple[int, ...], Any], Array]]


def zeros(form: Form) -> Array:
    """A buffer of zeros for accumulating gradients of this form. For bfloat16 gradients, the buffer is float32."""
    _, shape, dtype, library_zeros = form
    return library_zeros(shape, sum_dtype(dtype))


class Leaf:
    """The node of a parameter, or of an input that needs a gradient. It has no parents.

    grad      the gradient accumulated so far, or None before the first contribution.
    forms     a tuple with the form of the gradient, as in a Node with one result.
    on_final  called without arguments after a backward pass has added its last contribution to `grad`.
    written   the number, from the sequence of Node.number, of the last in-place change of the data; -1 if none.
    memory    the arrays that were changed then.
    """

    __slots__ = ("grad", "forms", "on_final", "written", "memory")

    def __init__(self, form: Form):
        self.grad: Array | None = None
        self.forms = (form,)
        self.on_final: Callable[[], None] | None = None
        self.written = -1
        self.memory: tuple[Array, ...] = ()

    def buffer(self) -> Array:
        """The array that gradients are added to. The first call creates it, filled with zeros."""
        if self.grad is None:
            self.grad = zeros(self.forms[0])
        return self.grad

    def mark_written(self, *memory: Array) -> None:
        """Record that these arrays were just changed in place, which invalidates values saved by earlier operations."""
        self.written, self.memory = next(_numbers), memory


Saved = tuple[Any, ...]  # what a backward function needs from the forward pass: arrays, shapes, numbers
Gradients = Sequence[Array | None]  # one per parent


class Node:
    """One recorded operation.

    parents   per input, an edge (node, index of the node's output), or None if the input needs no gradient.
    backward  backward(saved, dy, into) -> per parent, a gradient or None; see `record` in tensor.py.
    saved     the data that backward needs from the forward pass.
    forms     the form of each output.
    name      the name of the backward function.
    kernel    if true, backward is a kernel: kernel(dy, *saved) -> the gradient, or a tuple with one per parent.

    A node never refers to its own output; the output refers to the node. So there are no reference cycles to collect.
    """

    __slots__ = ("parents", "backward", "saved", "forms", "name", "kernel", "number")

    def __init__(
        self,
        parents: Sequence[Edge | None],
        backward: Callable[..., Any],
        saved: Saved,
        forms: tuple[Form, ...],
        name: str,
        kernel: bool = False,
    ):
        self.parents = parents
        self.backward: Callable[..., Any] | None = backward
        self.saved: Saved | None = saved
        self.forms = forms
        self.name = name
        self.kernel = kernel
        self.number = next(_numbers)

    @property
    def operation(self) -> str:
        """The name of the operation."""
        return operation_name(self.name)


Edge = tuple[Node | Leaf, int]


class GradientBuffers:
    """The argument `into` of a backward function, which gives access to the gradient buffers of the node's parents."""

    __slots__ = ("_pending", "_parents")

    def __init__(self, pending: _PendingGradients, parents: Sequence[Edge | None]):
        self._pending = pending
        self._parents = parents

    def __call__(self, i: int) -> Array | None:
        """The buffer to add parent i's gradient to, or None if the parent needs no gradient."""
        edge = self._parents[i]
        return None if edge is None else self._pending.buffer(edge)


BackwardFunction = Callable[[Saved, Any, GradientBuffers], Gradients]  # for several results, dy is a tuple


class _PendingGradients:
    """Gradients of nodes whose backward function has not run yet.

    The first gradient that arrives at an output is borrowed: another output may share it, so it is never modified.
    Adding the second one creates a new array, to which later ones are added in place (as in HIPS autograd).
    """

    def __init__(self) -> None:
        self._gradients: dict[Edge, tuple[Array, bool]] = {}  # edge -> (gradient, whether it may be modified)

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
        else:
            self._gradients[edge] = (as_array(earlier[0] + gradient), True)

    def buffer(self, edge: Edge) -> Array:
        target, output = edge
        if isinstance(target, Leaf):
            return target.buffer()
        gradient, owned = self._gradients.get(edge, (None, False))
        if gradient is None or not owned:
            buffer = zeros(target.forms[output])
            if gradient is not None:
                buffer += gradient
            gradient = buffer
            self._gradients[edge] = (gradient, True)
        return gradient

    def get(self, edge: Edge | None) -> Array | None:
        """The gradient accumulated at an edge so far, or None."""
        if edge is None:
            return None
        return edge[0].grad if isinstance(edge[0], Leaf) else self._gradients.get(edge, (None, False))[0]

    def pop(self, node: Node) -> Any:
        """The gradient of the node's output, or a tuple of gradients if it has several; None if none has arrived."""
        if len(node.forms) == 1:
            return self._gradients.pop((node, 0), (None, False))[0]
        arrived = [self._gradients.pop((node, output), (None, False))[0] for output in range(len(node.forms))]
        return None if all(gradient is None for gradient in arrived) else tuple(arrived)


def as_array(value: Any) -> Any:
    """Convert a NumPy scalar, which NumPy returns for 0-d arithmetic, to an array. Other values are unchanged."""
    return numpy.asarray(value) if isinstance(value, numpy.generic) else value


def backward(gradients: list[tuple[Edge, Array]], recomputed: int | None = None) -> None:
    """Compute the gradients of all leaves that the outputs depend on, given a pair (edge, dy) for each output.

    Gradients are added to `Leaf.grad`. The data that a node saved is freed as soon as its backward function has run, so
    a graph can be used only once.

    recomputed  the number of the recompute operation, if recompute() recorded this graph during the backward pass.
    Raises RuntimeError if part of the graph was used before, or if data that it needs has been changed; TypeError or
    ValueError if a backward function returns something other than the gradients of its parents.
    """
    nodes, uses = _reachable([edge[0] for edge, _ in gradients], recomputed)
    pending = _PendingGradients()
    for edge, dy in gradients:
        pending.add(edge, dy)
    for leaf in {edge[0] for edge, _ in gradients if isinstance(edge[0], Leaf) and edge[0] not in uses}:
        _call_on_final(leaf)
    report = active_backward()
    for node in sorted(nodes, key=lambda node: node.number, reverse=True):
        parents = node.parents
        _run(node, pending)
        if report is not None:
            report(BackwardOperation(node.operation, node, tuple(parents), tuple(map(pending.get, parents))))
        for parent in reversed(parents):  # in arena order: the last registered parameter's gradient is final first
            if parent is not None and isinstance(parent[0], Leaf):
                uses[parent[0]] -= 1
                if not uses[parent[0]]:
                    _call_on_final(parent[0])


def _run(node: Node, pending: _PendingGradients) -> None:
    """Run a node's backward function if a gradient has arrived, and free the node's saved data."""
    dy = pending.pop(node)
    function, saved, parents = node.backward, node.saved, node.parents
    node.backward, node.saved, node.parents = None, None, ()
    if dy is None:
        return
    assert function is not None
    assert saved is not None
    results: Any
    if node.kernel:
        results = function(dy, *saved)
        if type(results) is not tuple:
            results = (results,)
    else:
        results = function(saved, dy, GradientBuffers(pending, parents))
    if not isinstance(results, tuple | list) or len(results) != len(parents):
        raise _wrong_results(node, results, len(parents))
    for i, parent in enumerate(parents):
        gradient: Any = results[i]
        if parent is not None and gradient is not None:
            form = parent[0].forms[parent[1]]
            kind, shape, dtype, _ = form
            if type(gradient) is not kind or gradient.shape != shape or gradient.dtype != dtype:
                gradient = _checked(node, i, gradient, form)
            pending.add(parent, gradient)


def _wrong_results(node: Node, results: Any, n: int) -> Exception:
    expected = f"expected a tuple with a gradient or None for each of {n} parent{'s' * (n != 1)}"
    if isinstance(results, tuple | list):
        return ValueError(f"{node.operation}: backward returned {len(results)} gradients; {expected}")
    return TypeError(f"{node.operation}: backward returned {type(results).__name__}; {expected}, as in `return dx,`")


def _checked(node: Node, i: int, returned: Any, form: Form) -> Array:
    """Check a gradient that does not exactly match parent i's form. Raises TypeError or ValueError if it is invalid."""
    kind, shape, dtype, _ = form
    what, gradient = f"{node.operation}: backward returned for parent {i}", as_array(returned)
    array_type: type[Any] = numpy.ndarray if issubclass(kind, numpy.ndarray) else kind
    if not isinstance(gradient, array_type):
        raise TypeError(f"{what} an object of type {type(gradient).__name__}; expected an array of shape {shape}")
    if gradient.shape != shape:
        raise ValueError(f"{what} a gradient of shape {gradient.shape}; expected {shape}, the shape of the parent")
    sizes = sorted((gradient.dtype.itemsize, dtype.itemsize))
    short = sizes[0] == 2 and sizes[1] <= 4 and gradient.dtype.kind not in "iub"  # sums of bfloat16 are in float32
    if gradient.dtype != dtype and not short:
        raise TypeError(f"{what} a gradient of dtype {gradient.dtype}; expected {dtype}, the dtype of the parent")
    return gradient


def _call_on_final(leaf: Leaf) -> None:
    if leaf.on_final is not None:
        leaf.on_final()


def _reachable(roots: list[Node | Leaf], recomputed: int | None) -> tuple[set[Node], Counter[Leaf]]:
    """The nodes that are reachable from the roots, and the number of edges to each leaf."""
    nodes: set[Node] = set()
    uses: Counter[Leaf] = Counter()
    written: set[Leaf] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if isinstance(node, Leaf) or node in nodes:
            continue
        if node.backward is None:
            raise RuntimeError(
                "backward: an earlier backward() used this graph and freed its saved data; "
                "run the forward pass again, or add the losses and call backward once"
            )
        nodes.add(node)
        since = node.number if recomputed is None else recomputed
        for parent in node.parents:
            if parent is not None:
                if isinstance(parent[0], Leaf):
                    uses[parent[0]] += 1
                    if parent[0].written > since:
                        written.add(parent[0])
                stack.append(parent[0])
    if written:
        _check_saved(nodes, written, recomputed)
    return nodes, uses


def _check_saved(nodes: set[Node], written: set[Leaf], recomputed: int | None) -> None:
    """Raise RuntimeError if a node saved an array of a leaf (or a view of one) that was changed in place since then."""
    if recomputed is not None:
        raise RuntimeError(f"backward: recompute: a parameter of the function {_CHANGED}")
    for node in nodes:
        arrays = list(_arrays(node.saved))
        for leaf in written:
            if leaf.written > node.number and any(may_share_memory(a, m) for a in arrays for m in leaf.memory):
                raise RuntimeError(
                    f"backward: {node.operation}: an input of shape {leaf.forms[0][1]}, saved for the backward pass, "
                    f"{_CHANGED}"
                )


_CHANGED = (
    "was changed since the forward pass (by an optimizer's step, or an assignment to .data); call backward() before "
    "the change, or run the forward pass again"
)


def _arrays(saved: Any) -> Iterator[Array]:
    """Every array among the values that a node saved."""
    if isinstance(saved, tuple | list):
        for item in saved:
            yield from _arrays(item)
    elif hasattr(saved, "strides"):
        yield saved


if not TYPE_CHECKING:  # so that type checkers report misspelled names
    __getattr__ = missing_names.of_module("tinygrad2.autograd", missing_names.AUTOGRAD)
