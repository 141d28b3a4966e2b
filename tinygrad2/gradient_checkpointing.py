"""recompute(): save only the inputs of a part of a model, and run that part again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinygrad2 import autograd
from tinygrad2.array import Array
from tinygrad2.autograd import GradientBuffers, Gradients, Saved
from tinygrad2.tensor import Tensor, form_of, record


def recompute(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """function(*inputs), saving only the inputs for the backward pass, which runs the function again.

    This trades time for memory: the backward pass runs the forward pass again, but intermediate results are not saved.
    The function must return a Tensor or a tuple of Tensors, and must be deterministic (like dropout, whose masks depend
    on a key). Results and gradients are bitwise identical to those of function(*inputs). Parameters that the function
    uses also get gradients. For a parameter that is also used elsewhere, Leaf.on_final is called once for each use.
    Source: Chen et al., arXiv:1604.06174 (gradient checkpointing).
    """
    if not autograd.is_recording():
        return function(*inputs)
    started = autograd.new_number()
    with autograd.no_grad():
        results = function(*inputs)
    data = tuple(result.data for result in results) if isinstance(results, tuple) else results.data
    saved = (function, tuple(x.data for x in inputs), tuple(x.requires_grad for x in inputs), started)
    return record(data, inputs, _recompute_backward, saved)


def _recompute_backward(saved: Saved, dy: Any, into: GradientBuffers) -> Gradients:
    function, arrays, wanted, started = saved
    gradients: list[Array | None] = [None] * len(arrays)

    def end_of_graph(i: int) -> autograd.Edge:
        """A node without parents that replaces input i. Its backward function stores the gradient that arrives."""

        def keep(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
            gradients[i] = dy
            return ()

        return autograd.Node((), keep, (), (form_of(arrays[i]),), "recompute"), 0

    copies = [Tensor(array) for array in arrays]
    for i, x in enumerate(copies):
        x._edge = end_of_graph(i) if wanted[i] else None
    with autograd.recording(True):
        results = function(*copies)
    pairs = zip(results, dy, strict=True) if isinstance(results, tuple) else [(results, dy)]
    autograd.backward([(y._edge, g) for y, g in pairs if y._edge is not None and g is not None], started)
    return tuple(gradients)
