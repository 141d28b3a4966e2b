"""Tensor: an array and, if it needs a gradient, its node on the tape. record() adds an operation to the tape."""

from __future__ import annotations

import math
from typing import Any, TypeGuard, overload

import numpy
from numpy.typing import ArrayLike, DTypeLike

from tinygrad2 import arguments, autograd, missing_names, tracer
from tinygrad2.array import Array, Index
from tinygrad2.autograd import BackwardFunction, GradientBuffers, Gradients, Saved
from tinygrad2.backend import DEVICES, Backend, backend_of, get_backend
from tinygrad2.comparisons import Comparisons
from tinygrad2.names import PyTorchNames
from tinygrad2.protocols import Count, Protocols, takes_pytorch_names

Operand = Any  # a Tensor, a number, nested lists of numbers, or an array
HostArray = numpy.ndarray  # (inside the class, type checkers resolve `numpy` to the method)


@takes_pytorch_names
class Tensor(Comparisons["Tensor"], PyTorchNames, Protocols):
    """An array and, if it needs a gradient, its node on the tape.

    data           an array, or a number or nested lists of numbers (which become float32).
    requires_grad  makes this a leaf: backward() adds the gradient of the loss to `.grad`, an array of data's shape.

    Supports + - * / @ ** and unary -, comparisons, indexing, and the methods below, with NumPy's broadcasting. Type
    promotion is described in arguments.py. Only floating-point Tensors have gradients. Gradients are arrays;
    second-order gradients are not supported. Comparisons, & | ~ // and % have no gradient.

    Operations save arrays for the backward pass without copying them. Assigning to `.data` replaces a Tensor's array.
    For a Parameter, it copies into the array, and a backward pass that needs the old values raises an error. Writing to
    the array itself (x.data[...] = y) is not detected: do it only before the forward pass or after backward().
    """

    __slots__ = ("data", "_edge", "_recipe")

    def __init__(self, data: Any, requires_grad: bool = False, dtype: DTypeLike | None = None):
        data = data.data if isinstance(data, Tensor) else arguments.of_numpy(data)
        dtype = None if dtype is None else arguments.dtype_of("Tensor", dtype)
        if not _is_array(data):
            if dtype is None and not isinstance(data, numpy.generic):
                dtype = arguments.DEFAULT_FLOAT
            data = arguments.numpy_array("Tensor", data)  # (numpy.float64, also a Python float, keeps its dtype)
        elif data.dtype.kind not in "biuf" and data.dtype.name != "bfloat16":
            raise TypeError(f"Tensor: data has dtype {data.dtype}; expected floats, integers or booleans")
        if dtype is not None or isinstance(data, numpy.generic):
            data = (backend_of(data) if _is_array(data) else get_backend()).asarray(data, dtype)
        self.data: Array = data
        self._edge: autograd.Edge | None = None
        self._recipe: Any = None  # see recipes.py
        if requires_grad is not False:
            if requires_grad is not True:
                raise TypeError(f"Tensor: requires_grad is {requires_grad!r}; expected True or False")
            if not arguments.is_float(self.data.dtype):
                raise TypeError(f"Tensor: requires_grad needs a floating-point dtype, got {self.data.dtype}")
            self._edge = (autograd.Leaf(form_of(data)), 0)

    def read_as(self, dtype: DTypeLike, what: str) -> Array:
        """Return the data for an operation whose activations have this dtype. Raises TypeError if the dtypes differ.

        what  the name of this tensor in the error message, such as "linear: weight".
        """
        if self.data.dtype != dtype:
            raise TypeError(f"{what} is {self.data.dtype}; expected {numpy.dtype(dtype)}, the dtype of the activations")
        return self.data

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""
        return self.data.shape

    @property
    def dtype(self) -> numpy.dtype:
        """The dtype of the elements, such as float32."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.data.ndim

    @property
    def size(self) -> Count:
        """The number of elements."""
        return Count(self.data.size, self.shape)

    @property
    def backend(self) -> Backend:
        """The backend of the data."""
        return backend_of(self.data)

    @property
    def device(self) -> str:
        """The device of the data: "cpu" or "cuda"."""
        return backend_of(self.data).device

    @property
    def T(self) -> Tensor:
        """The transpose, with the axes in reverse order."""
        return self.transpose()

    @property
    def requires_grad(self) -> bool:
        """Whether backward() computes a gradient for this tensor."""
        return self._edge is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        raise AttributeError(
            "requires_grad cannot be changed; use Tensor(x.data, requires_grad=True), or x.detach(); to train some of "
            "the parameters, give the optimizer a list of them"
        )

    @property
    def leaf(self) -> autograd.Leaf | None:
        """This tensor's leaf on the tape, or None for a result or a constant."""
        return self._edge[0] if self._edge is not None and isinstance(self._edge[0], autograd.Leaf) else None

    @property
    def grad(self) -> Array | None:
        """The gradient accumulated so far; None before the first backward(), or if this tensor is not a leaf."""
        return None if self.leaf is None else self.leaf.grad

    @grad.setter
    def grad(self, value: Tensor | ArrayLike | None) -> None:
        if self.leaf is None:
            raise AttributeError("grad can be set only on a leaf: a Tensor created with requires_grad=True")
        self.leaf.grad = None if value is None else gradient_array(value, self.leaf, "grad")

    def numpy(self) -> HostArray:
        """The values as a NumPy array on the host (on the CPU, a view of the tensor's memory)."""
        return self.backend.to_host(self.data)

    def item(self) -> float:
        """The value of a one-element tensor, as a Python number. Raises ValueError for any other size."""
        return self._only_element("item()").item()

    def detach(self) -> Tensor:
        """A Tensor that shares this data but is not on the tape: no gradient flows through it."""
        return Tensor(self.data)

    def astype(self, dtype: DTypeLike) -> Tensor:
        """Convert to another dtype. The gradient is converted back; integers and booleans have no gradient."""
        data = self.data.astype(arguments.dtype_of("astype", dtype))
        if not arguments.is_float(data.dtype):
            return Tensor(data)
        return record(data, (self,), _astype_backward, saved=(self.dtype,))

    def to(self, target: str | DTypeLike) -> Tensor:
        """Copy to another device ("cpu" or "cuda"), or convert to another dtype. The gradient is converted back."""
        if target not in DEVICES:
            dtype = arguments.dtype_of("to", target, "a device, 'cpu' or 'cuda', or a dtype")
            return self if dtype == self.dtype else self.astype(dtype)
        source, backend = self.backend, get_backend(str(target))
        if backend is source:
            return self

        def transfer_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
            return (source.asarray(backend.to_host(dy)),)

        return record(backend.asarray(source.to_host(self.data)), (self,), transfer_backward)

    def backward(
        self, dy: Tensor | ArrayLike | None = None, *, create_graph: bool = False, retain_graph: bool = False
    ) -> None:
        """Compute the gradients of this tensor, and add them to `.grad` of every leaf that it was computed from.

        dy  the gradient of the loss with respect to this tensor, of its shape; defaults to 1 for a one-element tensor.
        create_graph, retain_graph  not supported; True raises NotImplementedError.
        Raises RuntimeError if nothing is recorded, if an earlier backward() used the same graph, or if a parameter that
        it needs has changed since the forward pass; ValueError if dy is missing or has the wrong shape.
        """
        if create_graph:
            raise NotImplementedError("backward: create_graph: second-order gradients are not supported")
        if retain_graph:
            raise NotImplementedError(
                "backward: retain_graph: a graph is freed as it is used: add the losses, or run the forward pass again"
            )
        if self._edge is None:
            raise RuntimeError(
                "backward: nothing is recorded here: no input has requires_grad, or no_grad() is active "
                "(a .grad is an array: second-order gradients are not supported)"
            )
        if dy is None:
            if self.size != 1:
                raise ValueError(f"backward: the tensor has shape {self.shape}, not one element; pass dy of that shape")
            gradient = self.backend.np.ones(self.shape, dtype=self.dtype)
        else:
            gradient = self.backend.asarray(dy.data if isinstance(dy, Tensor) else dy, dtype=self.dtype)
        if gradient.shape != self.shape:
            raise ValueError(f"backward: dy has shape {gradient.shape}; expected {self.shape}, the shape of the tensor")
        autograd.backward([(self._edge, gradient)])

    # Operators ------------------------------------------------------------------------------------------------------

    def __add__(self, other: Operand) -> Tensor:
        a, b = _operands("+", self, other)
        try:
            y = backend_of(a.data).kernels.add_forward(a.data, b.data)
        except ValueError:
            raise _not_broadcast("+", a, b) from None
        if b._edge is None and not b.data.shape:
            return record(y, (a,), _shift_backward)
        return record(y, (a, b), "add_backward", (a.data.shape, b.data.shape))

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Tensor:
        a, b = _operands("-", self, other)
        if a.data.dtype.kind == "b":
            raise TypeError("-: the operands are booleans; use a != b, or a & ~b")
        try:
            y = backend_of(a.data).kernels.subtract_forward(a.data, b.data)
        except ValueError:
            raise _not_broadcast("-", a, b) from None
        if b._edge is None and not b.data.shape:
            return record(y, (a,), _shift_backward)
        return record(y, (a, b), "subtract_backward", (a.data.shape, b.data.shape))

    def __rsub__(self, other: Operand) -> Tensor:
        a, b = _operands("-", self, other)
        return b - a

    def __mul__(self, other: Operand) -> Tensor:
        a, b = _operands("*", self, other)
        try:
            y = backend_of(a.data).kernels.multiply_forward(a.data, b.data)
        except ValueError:
            raise _not_broadcast("*", a, b) from None
        if b._edge is None and not b.data.shape:
            return record(y, (a,), _scale_backward, (b.data,))
        return record(y, (a, b), "multiply_backward", (a.data, b.data))

    __rmul__ = __mul__

    def __truediv__(self, other: Operand) -> Tensor:
        a, b = _operands("/", self, other)
        if a.data.dtype.kind in "biu":
            a, b = _float(a), _float(b)
        try:
            y = backend_of(a.data).kernels.divide_forward(a.data, b.data)
        except ValueError:
            raise _not_broadcast("/", a, b) from None
        return record(y, (a, b), "divide_backward", (a.data, b.data))

    def __rtruediv__(self, other: Operand) -> Tensor:
        a, b = _operands("/", self, other)
        return b / a

    def __matmul__(self, other: Operand) -> Tensor:
        a, b = _operands("@", self, other)
        if a.ndim < 2 or b.ndim < 2:
            return _vector_product(a, b)
        try:
            y = backend_of(a.data).kernels.matmul_forward(a.data, b.data)
        except ValueError:
            raise _no_product(a, b) from None
        return record(y, (a, b), "matmul_backward", (a.data, b.data))

    def __rmatmul__(self, other: Operand) -> Tensor:
        a, b = _operands("@", self, other)
        return b @ a

    def __neg__(self) -> Tensor:
        if self.dtype.kind == "b":
            raise TypeError("unary -: the tensor is boolean; use ~x")
        return record(-self.data, (self,), _negate_backward)

    def __pow__(self, exponent: Any) -> Tensor:
        if isinstance(exponent, numpy.integer | numpy.floating):
            exponent = exponent.item()  # a NumPy scalar would promote the result
        if not isinstance(exponent, int | float):
            return self.power(exponent)
        x = self if isinstance(exponent, int) else _float(self)
        if exponent < 0 and x.data.dtype.kind in "biu":
            raise ValueError(f"**: integers to the power {exponent} are not integers; use x.astype('float32')")
        y = backend_of(x.data).kernels.power_forward(x.data, exponent)
        return record(y, (x,), "power_backward", (x.data, exponent))

    def __rpow__(self, base: Operand) -> Tensor:
        x, b = _operands("**", self, base)
        return b.power(x)

    def __getitem__(self, index: Index) -> Tensor:
        index = arguments.plain_index(index)
        try:
            y = backend_of(self.data).kernels.getitem_forward(self.data, index)
        except (IndexError, ValueError):
            described = arguments.describe_index(index)
            raise IndexError(
                f"indexing: [{described}] is not a valid index for a tensor of shape {self.shape}"
            ) from None
        except TypeError:
            described = arguments.describe_index(index)
            raise TypeError(f"indexing: [{described}]: slice indices must be integers or None") from None
        return record(y, (self,), _getitem_backward, (index,))

    def exp(self) -> Tensor:
        """e^x, elementwise."""
        x = _float(self)
        y = backend_of(x.data).kernels.exp_forward(x.data)
        return record(y, (x,), "exp_backward", (y,))

    def log(self) -> Tensor:
        """The natural logarithm, elementwise."""
        x = _float(self)
        return record(backend_of(x.data).kernels.log_forward(x.data), (x,), "log_backward", (x.data,))

    def tanh(self) -> Tensor:
        """The hyperbolic tangent, elementwise."""
        x = _float(self)
        y = backend_of(x.data).kernels.tanh_forward(x.data)
        return record(y, (x,), "tanh_backward", (y,))

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The sum over `axis` (one axis, several, or None for all)."""
        axes = arguments.axes_of("sum", axis, self.ndim)
        y = backend_of(self.data).kernels.sum_forward(self.data, axes, keepdims)
        return record(y, (self,), "sum_backward", (self.shape, axes))

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The mean over `axis` (one, several, or None for all); NaN over no elements. Integers give float32."""
        x = _float(self)
        axes = arguments.axes_of("mean", axis, x.ndim)
        count = math.prod(x.shape[i] for i in axes)
        return x.sum(axes, keepdims) * (1 / count if count else math.nan)

    def max(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The maximum over `axis`. Elements that tie for the maximum share the gradient equally."""
        axes = arguments.axes_of("max", axis, self.ndim)
        if not all(self.shape[i] for i in axes):
            raise ValueError(f"max: the tensor has shape {self.shape}; there is no maximum over an axis of length 0")
        y = backend_of(self.data).kernels.max_forward(self.data, axes, keepdims)
        return record(y, (self,), "max_backward", (self.data, y, axes))

    def reshape(self, *shape: int | tuple[int, ...]) -> Tensor:
        """The same elements in another shape. One dimension may be -1; it is then inferred."""
        wanted = arguments.lengths("reshape", shape)
        try:
            y = self.data.reshape(wanted)
        except ValueError:
            raise ValueError(
                f"reshape: the tensor has shape {self.shape}, which cannot be reshaped to {wanted}"
            ) from None
        return record(y, (self,), _reshape_backward, (self.shape,))

    def transpose(self, *axes: int | tuple[int, ...] | None) -> Tensor:
        """Permute the axes; without arguments, reverse them."""
        given = axes[0] if len(axes) == 1 and (axes[0] is None or isinstance(axes[0], tuple | list)) else axes or None
        order = arguments.axes_of("transpose", given, self.ndim)[:: -1 if given is None else 1]
        if len(axes) == 2 and (order == (0, 1) or len(order) < self.ndim):  # PyTorch would swap two axes
            raise ValueError(f"transpose: the axes are {axes}; use swapaxes{axes}, or transpose(order) with all axes")
        if len(order) != self.ndim:
            raise ValueError(f"transpose: the axes are {order}; expected each of the {self.ndim} axes once")
        return record(self.data.transpose(order), (self,), _transpose_backward, (order,))

    # For methods.py, which this file imports --------------------------------------------------------------------------

    def _record(
        self, data: Any, parents: tuple[Tensor, ...], backward: BackwardFunction | str, saved: Saved = ()
    ) -> Tensor:
        return record(data, parents, backward, saved)

    def _operands(self, op: str, other: Operand, broadcast: bool = True) -> tuple[Tensor, Tensor]:
        a, b = _operands(op, self, other)
        if broadcast and a.shape != b.shape:
            try:
                numpy.broadcast_shapes(a.shape, b.shape)
            except ValueError:
                raise _not_broadcast(op, a, b) from None
        return a, b


@overload
def record(data: Array, parents: tuple[Tensor, ...], backward: BackwardFunction | str, saved: Saved = ()) -> Tensor: ...
@overload
def record(
    data: tuple[Array, ...], parents: tuple[Tensor, ...], backward: BackwardFunction | str, saved: Saved = ()
) -> tuple[Tensor, ...]: ...
def record(
    data: Array | tuple[Array, ...], parents: tuple[Tensor, ...], backward: BackwardFunction | str, saved: Saved = ()
) -> Tensor | tuple[Tensor, ...]:
    """Wrap the result of an operation in a Tensor, and record the operation on the tape if a parent needs a gradient.

    data      the result: an array, or a tuple of arrays for an operation with several results.
    parents   the input Tensors.
    backward  backward(saved, dy, into) -> a tuple with a gradient or None for each parent. dy is the gradient of the
              result; for several results, it is a tuple with a gradient or None for each. Instead of returning the
              gradient of parent i, backward may add it to the buffer `into(i)` and return None; into(i) is None if
              no gradient is needed. A string is the name of a kernel (a function of reference.py) that computes the
              gradients by itself: kernel(dy, *saved) -> the gradient, or a tuple with one per parent.
    saved     the data that backward needs, kept only if a gradient is needed. backward must not modify it.

    Only this function adds to the tape. An operation consists of two functions, and the forward one ends with record().
    """
    results = tuple(map(_constant, data)) if isinstance(data, tuple) else (_constant(data),)
    try:
        edges = tuple([parent._edge for parent in parents])
    except (AttributeError, TypeError):
        raise TypeError("record: parents contains objects that are not Tensors; expected a tuple of Tensors") from None
    if any(edges) and autograd.is_recording():
        if not isinstance(parents, tuple | list):
            raise TypeError(f"record: parents is a {type(parents).__name__}; expected a tuple of Tensors, as in (x,)")
        if not callable(backward) and not isinstance(backward, str):
            raise TypeError(f"record: backward has type {type(backward).__name__}; expected a function")
        backend = backend_of(results[0].data)
        forms = tuple([(type(r.data), r.data.shape, r.data.dtype, backend.zeros) for r in results])
        if isinstance(backward, str):
            node = autograd.Node(edges, getattr(backend.kernels, backward), saved, forms, backward, kernel=True)
        else:
            node = autograd.Node(edges, backward, saved, forms, getattr(backward, "__name__", "an operation"))
        for output, result in enumerate(results):
            result._edge = (node, output)
    if tracer.active() is not None:
        tracer.report(backward, parents, results, saved)
    return results if isinstance(data, tuple) else results[0]


def gradient_array(value: Tensor | ArrayLike, leaf: autograd.Leaf, name: str) -> Array:
    """Copy `value` to a buffer that later gradients of the leaf can be added to. Raises ValueError for a bad shape."""
    buffer = autograd.zeros(leaf.forms[0])
    values = backend_of(buffer).asarray(value.data if isinstance(value, Tensor) else value, dtype=buffer.dtype)
    if values.shape != buffer.shape:
        raise ValueError(f"{name} has shape {values.shape}; expected {buffer.shape}, the shape of the data")
    buffer[...] = values
    return buffer


def _is_array(data: Any) -> TypeGuard[Array]:
    return hasattr(data, "shape") and hasattr(data, "dtype") and not isinstance(data, numpy.generic)


def form_of(data: Array) -> autograd.Form:
    """The form of a gradient with respect to this array."""
    return type(data), data.shape, data.dtype, backend_of(data).zeros


def _constant(data: Array) -> Tensor:
    """Tensor(data), but faster, for an array or a NumPy scalar (a result of 0-d arithmetic)."""
    result = _new(Tensor)
    result.data = autograd.as_array(data)
    result._edge = None
    result._recipe = None
    return result


_new = object.__new__


def _float(x: Tensor) -> Tensor:
    """x, with integers and booleans converted to the default floating-point type."""
    return _constant(x.data.astype(arguments.DEFAULT_FLOAT)) if x.data.dtype.kind in "biu" else x


def _operands(op: str, a: Tensor, b: Operand) -> tuple[Tensor, Tensor]:
    """Return a and b as Tensors of a common dtype, by the promotion rules in arguments.py."""
    dtype = a.data.dtype
    if not isinstance(b, Tensor):
        b = _constant(arguments.constant(op, b, dtype, backend_of(a.data)))
    if b.data.dtype == dtype:
        return a, b
    common = arguments.promoted_dtype(op, dtype, b.data.dtype)
    converted = [x if x.data.dtype == common else _constant(x.data.astype(common)) for x in (a, b)]
    return converted[0], converted[1]


def _not_broadcast(op: str, a: Tensor, b: Tensor) -> ValueError:
    return ValueError(f"{op}: the operands have shapes {a.shape} and {b.shape}, which do not broadcast")


def _no_product(a: Tensor, b: Tensor) -> ValueError:
    return ValueError(f"@: shapes {a.shape} and {b.shape}; expected (..., m, k) @ (..., k, n)")


def _vector_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b if one is 1-D, as in NumPy: a row on the left or a column on the right. Its axis of length 1 is removed."""
    if not (a.ndim and b.ndim) or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"@: shapes {a.shape} and {b.shape}; expected (..., m, k) or (k,) @ (..., k, n) or (k,)")
    y = (a if a.ndim > 1 else a.reshape(1, -1)) @ (b if b.ndim > 1 else b.reshape(-1, 1))
    return y.reshape(y.shape[: -1 if a.ndim > 1 else -2] + (() if b.ndim == 1 else y.shape[-1:]))


def _shift_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    return (dy,)


def _scale_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    return (dy * saved[0],)


def _negate_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    return (-dy,)


def _astype_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    return (dy.astype(saved[0]),)


def _getitem_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    backend_of(dy).kernels.getitem_backward(dy, *saved, into(0))
    return (None,)


def _reshape_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    (shape,) = saved
    return (dy.reshape(shape),)


def _transpose_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    (order,) = saved
    return (dy.transpose(tuple(order.index(i) for i in range(len(order)))),)


missing_names.reject_calls(__name__, "use tinygrad2.Tensor(values)")
