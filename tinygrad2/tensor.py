"""Tensor: an array and, where a gradient is wanted, its node on the tape. record() puts an operation on the tape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard, overload

import numpy
from numpy.typing import ArrayLike, DTypeLike

from tinygrad2 import autograd
from tinygrad2.array import Array, Index
from tinygrad2.autograd import BackwardFunction, GradientBuffers, Gradients, Saved
from tinygrad2.backend import Backend, backend_of, get_backend
from tinygrad2.methods import Methods


class Tensor(Methods["Tensor"]):
    """An array and, where a gradient is wanted, its node on the tape.

    data           an array, or numbers and nested lists (which become float32).
    requires_grad  makes this a leaf: backward() sums the gradient of the loss into `.grad`, an array of data's shape.

    Operators: + - * / @ ** and unary -, indexing, and the methods below, with NumPy's broadcasting. Both operands must
    have the same dtype; Python numbers take the other operand's.
    """

    __slots__ = ("data", "_edge")
    __array_ufunc__ = None  # array + tensor calls Tensor.__radd__ instead of looping over the elements

    def __init__(self, data: Any, requires_grad: bool = False, dtype: DTypeLike | None = None):
        data = data.data if isinstance(data, Tensor) else data
        if dtype is None and isinstance(data, int | float | list | tuple) and not isinstance(data, numpy.generic):
            dtype = "float32"  # (numpy.float64 is a float too, but has a dtype of its own)
        self.data: Array = data if _is_array(data) and dtype is None else get_backend().asarray(data, dtype)
        self._edge: autograd.Edge | None = None
        if requires_grad:
            if numpy.dtype(self.data.dtype).kind != "f":
                raise TypeError(f"Tensor: requires_grad needs a floating-point dtype, got {self.data.dtype}")
            self._edge = (autograd.Leaf(_zeros_like(self.data)), 0)

    @property
    def compute(self) -> Array:
        """What operations read: the data, or for a parameter that holds a copy of lower precision, that copy."""
        return self.data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> numpy.dtype:
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
        """The leaf of the tape that belongs to this tensor, or None for a result and for a constant."""
        return self._edge[0] if self._edge is not None and isinstance(self._edge[0], autograd.Leaf) else None

    @property
    def grad(self) -> Array | None:
        """The gradient summed so far, or None before the first backward() and if this tensor is not a leaf."""
        return None if self.leaf is None else self.leaf.grad

    @grad.setter
    def grad(self, value: Array | None) -> None:
        if self.leaf is None:
            raise AttributeError("grad can be set only on a leaf: a Tensor created with requires_grad=True")
        if value is not None and value.shape != self.shape:
            raise ValueError(f"grad has shape {value.shape}; expected {self.shape}, the shape of the data")
        self.leaf.grad = value

    def numpy(self) -> numpy.ndarray:
        """The values as a NumPy array on the host (on the CPU, a view of the tensor's own memory)."""
        return self.backend.to_host(self.data)

    def item(self) -> float:
        """The value of a tensor of one element, as a Python number."""
        return self.numpy().item()

    def detach(self) -> Tensor:
        """The same data, off the tape."""
        return Tensor(self.data)

    def backward(self, dy: Tensor | ArrayLike | None = None) -> None:
        """Add the gradient of this tensor to `.grad` of every leaf that it was computed from.

        dy  the gradient of the loss with respect to this tensor; may be left out for a scalar (then it is 1).
        Raises RuntimeError where nothing is recorded, or where an earlier backward() went through the same graph.
        """
        if self._edge is None:
            raise RuntimeError("backward: nothing is recorded here: no input has requires_grad, or no_grad() is active")
        if dy is None:
            if self.size != 1:
                raise ValueError(f"backward: the tensor has shape {self.shape}, not one element; pass dy of that shape")
            gradient = self.backend.np.ones(self.shape, dtype=self.dtype)
        else:
            gradient = dy.data if isinstance(dy, Tensor) else self.backend.asarray(dy, dtype=self.dtype)
        if gradient.shape != self.shape:
            raise ValueError(f"backward: dy has shape {gradient.shape}; expected {self.shape}, the tensor's own")
        autograd.backward([(self._edge, gradient)])

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"

    def __len__(self) -> int:
        return len(self.data)

    def _record(
        self, data: Any, parents: tuple[Tensor, ...], backward: BackwardFunction | str, saved: Saved = ()
    ) -> Tensor:
        return record(data, parents, backward, saved)  # for methods.py, which this file imports

    def _operands(self, op: str, other: Any, broadcast: bool = True) -> tuple[Tensor, Tensor]:
        return self, _operand(other, self)

    # Operators ------------------------------------------------------------------------------------------------------

    def __add__(self, other: Tensor | ArrayLike) -> Tensor:
        return _add(self, other)

    def __radd__(self, other: Tensor | ArrayLike) -> Tensor:
        return _add(self, other)

    def __sub__(self, other: Tensor | ArrayLike) -> Tensor:
        return _subtract(self, other)

    def __rsub__(self, other: Tensor | ArrayLike) -> Tensor:
        return _subtract(_operand(other, self), self)

    def __mul__(self, other: Tensor | ArrayLike) -> Tensor:
        return _multiply(self, other)

    def __rmul__(self, other: Tensor | ArrayLike) -> Tensor:
        return _multiply(self, other)

    def __truediv__(self, other: Tensor | ArrayLike) -> Tensor:
        return _divide(self, other)

    def __rtruediv__(self, other: Tensor | ArrayLike) -> Tensor:
        return _divide(_operand(other, self), self)

    def __matmul__(self, other: Tensor | ArrayLike) -> Tensor:
        return _matmul(self, other)

    def __rmatmul__(self, other: Tensor | ArrayLike) -> Tensor:
        return _matmul(_operand(other, self), self)

    def __neg__(self) -> Tensor:
        return _multiply(self, -1.0)

    def __pow__(self, exponent: Any) -> Tensor:
        if not isinstance(exponent, int | float):
            return self.power(exponent)
        exponent = exponent if isinstance(exponent, int) else float(exponent)  # np.float64 would promote the result
        y = self.backend.kernels.power_forward(self.data, exponent)
        return record(y, (self,), "power_backward", saved=(self.data, exponent))

    def __rpow__(self, base: Any) -> Tensor:
        return self._operands("power", base)[1].power(self)

    def __getitem__(self, index: Index) -> Tensor:
        index = tuple(map(_plain_index, index)) if isinstance(index, tuple) else _plain_index(index)
        y = self.backend.kernels.getitem_forward(self.data, index)
        return record(y, (self,), _getitem_backward, saved=(index,))

    def exp(self) -> Tensor:
        """e^x, element by element."""
        y = self.backend.kernels.exp_forward(self.data)
        return record(y, (self,), "exp_backward", saved=(y,))

    def log(self) -> Tensor:
        """The natural logarithm, element by element."""
        return record(self.backend.kernels.log_forward(self.data), (self,), "log_backward", saved=(self.data,))

    def tanh(self) -> Tensor:
        """The hyperbolic tangent, element by element."""
        y = self.backend.kernels.tanh_forward(self.data)
        return record(y, (self,), "tanh_backward", saved=(y,))

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The sum over `axis` (an axis, several, or None for all)."""
        axes = _axes(axis, self.ndim)
        y = self.backend.kernels.sum_forward(self.data, axes, keepdims)
        return record(y, (self,), "sum_backward", saved=(self.shape, axes))

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The mean over `axis` (an axis, several, or None for all)."""
        total = self.sum(axis, keepdims)
        if self.size == 0:
            raise ValueError(f"mean: the tensor has shape {self.shape}, which is empty")
        return total * (total.size / self.size)

    def max(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The maximum over `axis`; equal largest elements share the gradient equally."""
        axes = _axes(axis, self.ndim)
        y = self.backend.kernels.max_forward(self.data, axes, keepdims)
        return record(y, (self,), "max_backward", saved=(self.data, y, axes))

    def reshape(self, *shape: int | tuple[int, ...]) -> Tensor:
        """The same elements in another shape; one length may be -1."""
        return record(self.data.reshape(*shape), (self,), _reshape_backward, saved=(self.shape,))

    def transpose(self, *axes: int | tuple[int, ...]) -> Tensor:
        """The axes in another order, reversed if none is given."""
        given: Any = axes or range(self.ndim)[::-1]
        if len(axes) == 1 and isinstance(axes[0], tuple | list):
            given = axes[0]
        order = _axes(tuple(given), self.ndim)
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"transpose: the axes are {order}; expected each of the tensor's {self.ndim} once")
        return record(self.compute.transpose(order), (self,), _transpose_backward, saved=(order,))


@overload
def record(data: Array, parents: tuple[Tensor, ...], backward: BackwardFunction | str, saved: Saved = ()) -> Tensor: ...
@overload
def record(
    data: tuple[Array, ...], parents: tuple[Tensor, ...], backward: BackwardFunction | str, saved: Saved = ()
) -> tuple[Tensor, ...]: ...
def record(
    data: Array | tuple[Array, ...], parents: tuple[Tensor, ...], backward: BackwardFunction | str, saved: Saved = ()
) -> Tensor | tuple[Tensor, ...]:
    """Make an operation's result a Tensor, and put it on the tape if a parent wants a gradient.

    data      the result: an array, or a tuple of arrays for an operation with several results.
    parents   the Tensors it was computed from.
    backward  backward(saved, dy, into) -> a tuple with a gradient or None for each parent. dy is the gradient of the
              result (a tuple, None where none arrived, for several). Instead of returning a gradient it may add it to
              the buffer `into(i)`, which is None where parent i wants no gradient, and return None for it.
              A string names a kernel (a function of reference.py) that is all of the backward pass:
              kernel(dy, *saved) -> the gradient, or a tuple with one for each parent.
    saved     what backward needs; only kept where a gradient is wanted. Backward must not change it.

    This is the only way onto the tape: an operation of your own is two functions, its forward ending in record().
    """
    results = tuple(Tensor(array) for array in (data if isinstance(data, tuple) else (data,)))
    edges = tuple(parent._edge for parent in parents)
    if autograd.is_recording() and any(edge is not None for edge in edges):
        function = KernelBackward(backward) if isinstance(backward, str) else backward
        node = autograd.Node(edges, function, saved, tuple(_zeros_like(result.data) for result in results))
        for output, result in enumerate(results):
            result._edge = (node, output)
    return results if isinstance(data, tuple) else results[0]


class KernelBackward:
    """The backward function that calls the kernel of this name, of the backend that dy belongs to."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
        gradients = getattr(backend_of(dy).kernels, self.name)(dy, *saved)
        return gradients if isinstance(gradients, tuple) else (gradients,)

    def __repr__(self) -> str:
        return f"KernelBackward({self.name!r})"


def recompute(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """function(*inputs), saving only the inputs for the backward pass, which runs the function again.

    Trades time for memory: one more forward pass instead of all that the function would have saved. It must return a
    Tensor or several, and compute the same each time (dropout does: its masks are functions of a key). Results and
    gradients are those of function(*inputs), bit for bit. Parameters that the function uses get their gradients too;
    one that is also used elsewhere calls Leaf.on_final once for each use.
    Source: Chen et al., arXiv:1604.06174 (gradient checkpointing).
    """
    if not autograd.is_recording():
        return function(*inputs)
    with autograd.no_grad():
        results = function(*inputs)
    data = tuple(result.data for result in results) if isinstance(results, tuple) else results.data
    return record(data, inputs, _recompute_backward, saved=(function, inputs))


def _recompute_backward(saved: Saved, dy: Any, into: GradientBuffers) -> Gradients:
    function, inputs = saved
    gradients: list[Array | None] = [None] * len(inputs)

    def end_of_graph(i: int) -> autograd.Edge:
        """A node without parents, in the place of input i: its backward function keeps the gradient that arrives."""

        def keep(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
            gradients[i] = dy
            return ()

        return autograd.Node((), keep, (), (_zeros_like(inputs[i].data),)), 0

    copies = [Tensor(x.data) for x in inputs]
    for i, x in enumerate(copies):
        x._edge = end_of_graph(i) if inputs[i].requires_grad else None
    with autograd.recording(True):
        results = function(*copies)
    pairs = zip(results, dy, strict=True) if isinstance(results, tuple) else [(results, dy)]
    autograd.backward([(y._edge, g) for y, g in pairs if y._edge is not None and g is not None])
    return tuple(gradients)


def _is_array(data: Any) -> TypeGuard[Array]:
    return hasattr(data, "shape") and hasattr(data, "dtype") and not isinstance(data, numpy.generic)


def _zeros_like(data: Array) -> Callable[[], Array]:
    """Makes a buffer that gradients of data's shape are summed in: in float32 where data's dtype has fewer bits."""
    return partial(backend_of(data).zeros, data.shape, numpy.float32 if data.dtype.itemsize < 4 else data.dtype)


def _operand(value: Tensor | ArrayLike, like: Tensor) -> Tensor:
    """`value` as a Tensor with the dtype of `like`. Raises TypeError for a Tensor of another dtype."""
    if not isinstance(value, Tensor):
        return Tensor(like.backend.asarray(value, dtype=like.dtype))
    if value.dtype != like.dtype:
        raise TypeError(
            f"the operands have dtypes {like.dtype} and {value.dtype}; convert one (there is no type promotion)"
        )
    return value


def _plain_index(index: Index) -> Index:
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


def _add(a: Tensor, other: Tensor | ArrayLike) -> Tensor:
    b = _operand(other, a)
    y = a.backend.kernels.add_forward(a.data, b.data)
    return record(y, (a, b), "add_backward", saved=(a.shape, b.shape))


def _subtract(a: Tensor, other: Tensor | ArrayLike) -> Tensor:
    b = _operand(other, a)
    y = a.backend.kernels.subtract_forward(a.data, b.data)
    return record(y, (a, b), "subtract_backward", saved=(a.shape, b.shape))


def _multiply(a: Tensor, other: Tensor | ArrayLike) -> Tensor:
    b = _operand(other, a)
    y = a.backend.kernels.multiply_forward(a.data, b.data)
    return record(y, (a, b), "multiply_backward", saved=(a.data, b.data))


def _divide(a: Tensor, other: Tensor | ArrayLike) -> Tensor:
    b = _operand(other, a)
    y = a.backend.kernels.divide_forward(a.data, b.data)
    return record(y, (a, b), "divide_backward", saved=(a.data, b.data))


def _matmul(a: Tensor, other: Tensor | ArrayLike) -> Tensor:
    b = _operand(other, a)
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"@: shapes {a.shape} and {b.shape}; expected (..., m, k) @ (..., k, n)")
    y = a.backend.kernels.matmul_forward(a.data, b.data)
    return record(y, (a, b), "matmul_backward", saved=(a.data, b.data))


def _getitem_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    backend_of(dy).kernels.getitem_backward(dy, *saved, into(0))
    return (None,)


def _reshape_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    (shape,) = saved
    return (dy.reshape(shape),)


def _transpose_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    (order,) = saved
    return (dy.transpose(tuple(order.index(i) for i in range(len(order)))),)
