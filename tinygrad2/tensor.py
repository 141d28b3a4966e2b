"""Tensor: an array that remembers where it came from. record() puts an operation on the tape; operators use it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy

from tinygrad2 import autograd
from tinygrad2.backend import Backend, backend_of, get_backend


class Tensor:
    """An array and, where a gradient is wanted, its place on the tape.

    data           an array, or numbers and nested lists (which become float32).
    requires_grad  makes this a leaf: backward() sums the gradient of the loss into `.grad`, an array of data's shape.

    Operators: + - * / @ ** and unary -, indexing, and the methods below, with NumPy's broadcasting. Both operands must
    have the same dtype; Python numbers take the other operand's.
    """

    __slots__ = ("data", "_edge")
    __array_ufunc__ = None  # array + tensor comes to Tensor.__radd__ instead of looping over the elements

    def __init__(self, data: Any, requires_grad: bool = False, dtype: Any = None):
        if isinstance(data, Tensor):
            data = data.data
        if dtype is None and isinstance(data, int | float | list | tuple) and not isinstance(data, numpy.generic):
            dtype = "float32"  # (a NumPy scalar is a float too, but one with a dtype of its own)
        self.data: Any = data if _is_array(data) and dtype is None else get_backend().asarray(data, dtype)
        self._edge: autograd.Edge | None = None
        if requires_grad:
            if numpy.dtype(self.data.dtype).kind != "f":
                raise TypeError(f"Tensor: requires_grad needs a floating-point dtype, got {self.data.dtype}")
            self._edge = (autograd.Leaf(_zeros_like(self.data)), 0)

    @property
    def compute(self) -> Any:
        """What operations read: the data, or for a parameter that holds a copy in fewer bits, that copy."""
        return self.data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def backend(self) -> Backend:
        return backend_of(self.data)

    @property
    def requires_grad(self) -> bool:
        """Whether backward() sends a gradient to or through this tensor."""
        return self._edge is not None

    @property
    def leaf(self) -> autograd.Leaf | None:
        """The tape's end that belongs to this tensor, or None for a result and for a constant."""
        return self._edge[0] if self._edge is not None and isinstance(self._edge[0], autograd.Leaf) else None

    @property
    def grad(self) -> Any:
        """The gradient summed so far (an array), or None before the first backward() and for what is no leaf."""
        return None if self.leaf is None else self.leaf.grad

    @grad.setter
    def grad(self, value: Any) -> None:
        if self.leaf is None:
            raise AttributeError("grad can be set only on a leaf: a Tensor made with requires_grad=True")
        if value is not None and value.shape != self.shape:
            raise ValueError(f"grad has shape {value.shape}; expected {self.shape}, the shape of the data")
        self.leaf.grad = value

    def numpy(self) -> numpy.ndarray:
        """The values as a NumPy array on the host (the tensor's own memory where that is one)."""
        return self.backend.to_host(self.data)

    def item(self) -> float:
        """The value of a tensor of one element, as a Python number."""
        return self.numpy().item()

    def detach(self) -> Tensor:
        """The same data, off the tape."""
        return Tensor(self.data)

    def backward(self, dy: Any = None) -> None:
        """Add the gradient of this tensor to `.grad` of every leaf that it was computed from.

        dy  the gradient of the loss with respect to this tensor; may be left out for a scalar (then it is 1).
        Raises RuntimeError where nothing is recorded, or where the graph has been walked before.
        """
        if self._edge is None:
            raise RuntimeError("backward: nothing is recorded here: no input has requires_grad, or no_grad() is on")
        if dy is None:
            if self.size != 1:
                raise ValueError(f"backward: the tensor has shape {self.shape}, not one element; pass dy of that shape")
            dy = self.backend.np.ones(self.shape, dtype=self.dtype)
        else:
            dy = dy.data if isinstance(dy, Tensor) else self.backend.asarray(dy, dtype=self.dtype)
        if dy.shape != self.shape:
            raise ValueError(f"backward: dy has shape {dy.shape}; expected {self.shape}, the tensor's own")
        autograd.backward([(self._edge, dy)])

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"

    def __len__(self) -> int:
        return len(self.data)

    # Operators ------------------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Tensor:
        return _add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return _add(self, other)

    def __sub__(self, other: Any) -> Tensor:
        return _subtract(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return _subtract(_operand(other, self), self)

    def __mul__(self, other: Any) -> Tensor:
        return _multiply(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return _multiply(self, other)

    def __truediv__(self, other: Any) -> Tensor:
        return _divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return _divide(_operand(other, self), self)

    def __matmul__(self, other: Any) -> Tensor:
        return _matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return _matmul(_operand(other, self), self)

    def __neg__(self) -> Tensor:
        return _multiply(self, -1.0)

    def __pow__(self, exponent: float) -> Tensor:
        if not isinstance(exponent, int | float):
            raise TypeError(f"**: the exponent must be a Python number, got {type(exponent).__name__}")
        exponent = exponent if isinstance(exponent, int) else float(exponent)  # np.float64 would promote the result
        y = self.backend.kernels.power_forward(self.data, exponent)
        return record(y, (self,), _power_backward, saved=(self.data, exponent))

    def __getitem__(self, index: Any) -> Tensor:
        index = tuple(map(_plain_index, index)) if isinstance(index, tuple) else _plain_index(index)
        y = self.backend.kernels.getitem_forward(self.data, index)
        return record(y, (self,), _getitem_backward, saved=(index,))

    def exp(self) -> Tensor:
        """e^x, element by element."""
        y = self.backend.kernels.exp_forward(self.data)
        return record(y, (self,), _exp_backward, saved=(y,))

    def log(self) -> Tensor:
        """The natural logarithm, element by element."""
        return record(self.backend.kernels.log_forward(self.data), (self,), _log_backward, saved=(self.data,))

    def tanh(self) -> Tensor:
        """The hyperbolic tangent, element by element."""
        y = self.backend.kernels.tanh_forward(self.data)
        return record(y, (self,), _tanh_backward, saved=(y,))

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The sum over `axis` (an axis, several, or None for all)."""
        axes = _axes(axis, self.ndim)
        y = self.backend.kernels.sum_forward(self.data, axes, keepdims)
        return record(y, (self,), _sum_backward, saved=(self.shape, axes))

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The mean over `axis` (an axis, several, or None for all)."""
        total = self.sum(axis, keepdims)
        if self.size == 0:
            raise ValueError(f"mean: the tensor has shape {self.shape}, which holds nothing")
        return total * (total.size / self.size)

    def max(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The maximum over `axis`; where it is reached several times, those places share the gradient equally."""
        axes = _axes(axis, self.ndim)
        y = self.backend.kernels.max_forward(self.data, axes, keepdims)
        return record(y, (self,), _max_backward, saved=(self.data, y, axes))

    def reshape(self, *shape: Any) -> Tensor:
        """The same elements in another shape; one length may be -1."""
        return record(self.data.reshape(*shape), (self,), _reshape_backward, saved=(self.shape,))

    def transpose(self, *axes: Any) -> Tensor:
        """The axes in another order, reversed if none is given."""
        order = axes[0] if len(axes) == 1 and isinstance(axes[0], tuple | list) else axes or range(self.ndim)[::-1]
        order = _axes(tuple(order), self.ndim)
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"transpose: the axes are {order}; expected each of the tensor's {self.ndim} once")
        return record(self.compute.transpose(order), (self,), _transpose_backward, saved=(order,))


def record(data: Any, parents: tuple[Tensor, ...], backward: Callable, saved: tuple = ()) -> Any:
    """Make an operation's result a Tensor, and put it on the tape if a parent wants a gradient.

    data      the result: an array, or a tuple of arrays for an operation with several results.
    parents   the Tensors it was computed from.
    backward  backward(saved, dy, into) -> a tuple with a gradient or None for each parent. dy is the gradient of the
              result (a tuple, None where none arrived, for several). Instead of returning a gradient it may add it to
              the buffer `into(i)`, which is None where parent i wants no gradient, and return None for it.
    saved     what backward needs; only kept where a gradient is wanted. Backward must not change it.

    This is the only way onto the tape: an operation of your own is two functions, its forward ending in record().
    """
    several = isinstance(data, tuple)
    results = tuple(Tensor(array) for array in (data if several else (data,)))
    edges = tuple(parent._edge for parent in parents)
    if autograd.is_recording() and any(edge is not None for edge in edges):
        node = autograd.Node(edges, backward, saved, tuple(_zeros_like(result.data) for result in results))
        for output, result in enumerate(results):
            result._edge = (node, output)
    return results if several else results[0]


def recompute(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """function(*inputs), with nothing kept for the backward pass but the inputs: there the function is computed again.

    Trades time for memory: one more forward pass instead of all that it would have saved. The function must return a
    Tensor or several, and compute the same each time (dropout does: its masks are functions of a key). Results and
    gradients are those of function(*inputs), bit for bit. Parameters that the function uses get their gradients too;
    one that is used outside as well is announced as final (see Leaf.on_final) by each of the walks.
    Source: Chen et al., arXiv:1604.06174.
    """
    if not autograd.is_recording():
        return function(*inputs)
    with autograd.no_grad():
        results = function(*inputs)
    data = tuple(result.data for result in results) if isinstance(results, tuple) else results.data
    return record(data, inputs, _recompute_backward, saved=(function, inputs))


def _recompute_backward(saved, dy, into):
    function, inputs = saved
    arrived = [None] * len(inputs)

    def arrival(i: int) -> autograd.Edge:
        """Where the walk through the function ends: what comes there is the gradient of input i."""

        def keep(saved, dy, into):
            arrived[i] = dy
            return ()

        return autograd.Node((), keep, (), (_zeros_like(inputs[i].data),)), 0

    again = [Tensor(x.data) for x in inputs]
    for i, x in enumerate(again):
        x._edge = arrival(i) if inputs[i].requires_grad else None
    with autograd.recording(True):
        results = function(*again)
    several = zip(results, dy, strict=True) if isinstance(results, tuple) else [(results, dy)]
    autograd.backward([(y._edge, g) for y, g in several if y._edge is not None and g is not None])
    return tuple(arrived)


def _is_array(data: Any) -> bool:
    return hasattr(data, "shape") and hasattr(data, "dtype") and not isinstance(data, numpy.generic)


def _zeros_like(data: Any) -> Callable[[], Any]:
    """Makes the buffer for a gradient that is added up: in float32, where the data has fewer bits."""
    return partial(backend_of(data).zeros, data.shape, numpy.float32 if data.dtype.itemsize < 4 else data.dtype)


def _operand(value: Any, like: Tensor) -> Tensor:
    """`value` as a Tensor with the dtype of `like`; only another floating-point Tensor keeps its own."""
    if not isinstance(value, Tensor):
        return Tensor(like.backend.asarray(value, dtype=like.dtype))
    if value.dtype != like.dtype:
        raise TypeError(f"the operands have dtypes {like.dtype} and {value.dtype}; convert one, nothing is promoted")
    return value


def _plain_index(index: Any) -> Any:
    if isinstance(index, Tensor):
        return index.data
    return numpy.asarray(index) if isinstance(index, list) else index


def _axes(axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    axes = tuple(axis) if isinstance(axis, tuple | list) else (int(axis),)
    for i in axes:
        if not -ndim <= i < ndim:
            raise ValueError(f"axis {i} is out of range for a tensor of {ndim} axes")
    return tuple(i % ndim for i in axes)


def _add(a: Tensor, other: Any) -> Tensor:
    b = _operand(other, a)
    y = a.backend.kernels.add_forward(a.data, b.data)
    return record(y, (a, b), _add_backward, saved=(a.shape, b.shape))


def _add_backward(saved, dy, into):
    return backend_of(dy).kernels.add_backward(dy, *saved)


def _subtract(a: Tensor, other: Any) -> Tensor:
    b = _operand(other, a)
    y = a.backend.kernels.subtract_forward(a.data, b.data)
    return record(y, (a, b), _subtract_backward, saved=(a.shape, b.shape))


def _subtract_backward(saved, dy, into):
    return backend_of(dy).kernels.subtract_backward(dy, *saved)


def _multiply(a: Tensor, other: Any) -> Tensor:
    b = _operand(other, a)
    y = a.backend.kernels.multiply_forward(a.data, b.data)
    return record(y, (a, b), _multiply_backward, saved=(a.data, b.data))


def _multiply_backward(saved, dy, into):
    return backend_of(dy).kernels.multiply_backward(dy, *saved)


def _divide(a: Tensor, other: Any) -> Tensor:
    b = _operand(other, a)
    y = a.backend.kernels.divide_forward(a.data, b.data)
    return record(y, (a, b), _divide_backward, saved=(a.data, b.data))


def _divide_backward(saved, dy, into):
    return backend_of(dy).kernels.divide_backward(dy, *saved)


def _matmul(a: Tensor, other: Any) -> Tensor:
    b = _operand(other, a)
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"@: shapes {a.shape} and {b.shape}; expected (..., m, k) @ (..., k, n)")
    y = a.backend.kernels.matmul_forward(a.data, b.data)
    return record(y, (a, b), _matmul_backward, saved=(a.data, b.data))


def _matmul_backward(saved, dy, into):
    return backend_of(dy).kernels.matmul_backward(dy, *saved)


def _power_backward(saved, dy, into):
    return (backend_of(dy).kernels.power_backward(dy, *saved),)


def _exp_backward(saved, dy, into):
    return (backend_of(dy).kernels.exp_backward(dy, *saved),)


def _log_backward(saved, dy, into):
    return (backend_of(dy).kernels.log_backward(dy, *saved),)


def _tanh_backward(saved, dy, into):
    return (backend_of(dy).kernels.tanh_backward(dy, *saved),)


def _sum_backward(saved, dy, into):
    return (backend_of(dy).kernels.sum_backward(dy, *saved),)


def _max_backward(saved, dy, into):
    return (backend_of(dy).kernels.max_backward(dy, *saved),)


def _getitem_backward(saved, dy, into):
    backend_of(dy).kernels.getitem_backward(dy, *saved, into(0))
    return (None,)


def _reshape_backward(saved, dy, into):
    (shape,) = saved
    return (dy.reshape(shape),)


def _transpose_backward(saved, dy, into):
    (order,) = saved
    return (dy.transpose(tuple(order.index(i) for i in range(len(order)))),)
