"""Tensor's support for Python's built-in functions, NumPy functions, and the names of other libraries."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy
from numpy.typing import DTypeLike

from tinygrad2 import missing_names
from tinygrad2.arguments import axes_of
from tinygrad2.autograd import Leaf
from tinygrad2.backend import get_backend

# The methods for np.add(a, b): that of a if it is a Tensor, or else that of b.
UFUNCS: dict[numpy.ufunc, tuple[str, str | None]] = {
    numpy.add: ("__add__", "__radd__"),
    numpy.subtract: ("__sub__", "__rsub__"),
    numpy.multiply: ("__mul__", "__rmul__"),
    numpy.divide: ("__truediv__", "__rtruediv__"),
    numpy.matmul: ("__matmul__", "__rmatmul__"),
    numpy.power: ("__pow__", "__rpow__"),
    numpy.floor_divide: ("__floordiv__", "__rfloordiv__"),
    numpy.remainder: ("__mod__", "__rmod__"),
    numpy.equal: ("__eq__", "__eq__"),
    numpy.not_equal: ("__ne__", "__ne__"),
    numpy.less: ("__lt__", "__gt__"),
    numpy.less_equal: ("__le__", "__ge__"),
    numpy.greater: ("__gt__", "__lt__"),
    numpy.greater_equal: ("__ge__", "__le__"),
    numpy.bitwise_and: ("__and__", "__rand__"),
    numpy.bitwise_or: ("__or__", "__ror__"),
    numpy.bitwise_xor: ("__xor__", "__rxor__"),
    numpy.invert: ("__invert__", None),
    numpy.negative: ("__neg__", None),
    numpy.exp: ("exp", None),
    numpy.log: ("log", None),
    numpy.tanh: ("tanh", None),
    numpy.maximum: ("maximum", "maximum"),
    numpy.minimum: ("minimum", "minimum"),
    numpy.logaddexp: ("logaddexp", "logaddexp"),
    numpy.hypot: ("hypot", "hypot"),
    numpy.absolute: ("abs", None),
    numpy.rint: ("round", None),
}

_SAME_NAMES = """
    sign sqrt square reciprocal exp2 expm1 log1p log2 log10 floor ceil trunc sin cos tan sinh cosh arcsin arccos arctan
    arcsinh arccosh arctanh degrees radians isnan isinf isfinite
"""
UFUNCS |= {getattr(numpy, name): (name, None) for name in _SAME_NAMES.split()}

# np.sum(x, axis) is x.sum(axis). These functions and methods have the same other arguments.
METHODS = {
    numpy.sum: "sum",
    numpy.mean: "mean",
    numpy.max: "max",
    numpy.amax: "max",
    numpy.reshape: "reshape",
    numpy.transpose: "transpose",
    numpy.min: "min",
    numpy.amin: "min",
    numpy.prod: "prod",
    numpy.var: "var",
    numpy.std: "std",
    numpy.all: "all",
    numpy.any: "any",
    numpy.argmax: "argmax",
    numpy.argmin: "argmin",
    numpy.cumsum: "cumsum",
    numpy.cumprod: "cumprod",
    numpy.argsort: "argsort",
    numpy.diff: "diff",
    numpy.clip: "clip",
    numpy.squeeze: "squeeze",
    numpy.ravel: "ravel",
    numpy.expand_dims: "expand_dims",
    numpy.swapaxes: "swapaxes",
    numpy.moveaxis: "moveaxis",
    numpy.flip: "flip",
    numpy.roll: "roll",
    numpy.broadcast_to: "broadcast_to",
    numpy.repeat: "repeat",
    numpy.tile: "tile",
    numpy.pad: "pad",
    numpy.array_split: "array_split",
    numpy.take: "take",
    numpy.diagonal: "diagonal",
    numpy.diag: "diag",
    numpy.trace: "trace",
    numpy.tril: "tril",
    numpy.triu: "triu",
    numpy.tensordot: "tensordot",
    numpy.inner: "inner",
    numpy.outer: "outer",
    numpy.dot: "dot",
}

# Arguments whose names differ between NumPy functions and Tensor methods.
NUMPY_NAMES = {"a_min": "min", "a_max": "max", "k": "offset"}


@functools.cache
def _functions() -> dict[Any, Callable[..., Any]]:
    """The table in numpy_functions.py. It is imported on first use, since that file imports Tensor, which imports this
    file."""
    table: dict[Any, Callable[..., Any]] = importlib.import_module("tinygrad2.numpy_functions").FUNCTIONS
    return table


def takes_tensors(function: Any) -> bool:
    """Whether this NumPy function accepts Tensors."""
    return any(function in table for table in (UFUNCS, METHODS, ON_ARRAYS, _functions()))


# Functions that only inspect values and shapes, so no gradient is lost. They are called with the arrays.
ON_ARRAYS = {
    numpy.allclose,
    numpy.array_equal,
    numpy.array_equiv,
    numpy.array_repr,
    numpy.array_str,
    numpy.array2string,
    numpy.isclose,
    numpy.may_share_memory,
    numpy.ndim,
    numpy.result_type,
    numpy.save,
    numpy.savetxt,
    numpy.savez,
    numpy.shape,
    numpy.shares_memory,
    numpy.size,
}

PYTORCH_NAMES = {"dim": "axis", "keepdim": "keepdims", "dim0": "axis1", "dim1": "axis2"}
DIFFERS_FROM_PYTORCH = {  # methods whose results differ from PyTorch's; PyTorch's argument names raise these errors
    "max": "PyTorch returns values and indices; use max(axis=...) and argmax(axis=...)",
    "min": "PyTorch returns values and indices; use min(axis=...) and argmin(axis=...)",
    "var": "PyTorch divides by n - 1; use var(axis=..., correction=1), or correction=0",
    "std": "PyTorch divides by n - 1; use std(axis=..., correction=1), or correction=0",
}


class Count(int):
    """The number of elements: an integer, as in NumPy. Calling it returns the shape, or one length, as in PyTorch."""

    shape: tuple[int, ...]

    def __new__(cls, size: int, shape: tuple[int, ...]) -> Count:
        count = super().__new__(cls, size)
        count.shape = shape
        return count

    def __call__(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[axes_of("size", (dim,), len(self.shape))[0]]

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


C = TypeVar("C", bound=Callable[..., Any])
K = TypeVar("K", bound=type[Any])


def pytorch_names(function: C) -> C:
    """Make a function with arguments axis and keepdims also accept PyTorch's names, dim and keepdim."""
    accepted = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if options and not options.keys() <= accepted.keys():
            if "dim" in options and "correction" not in options and function.__name__ in DIFFERS_FROM_PYTORCH:
                raise TypeError(f"{function.__name__}: dim: {DIFFERS_FROM_PYTORCH[function.__name__]}")
            options = {PYTORCH_NAMES.get(name, name): value for name, value in options.items()}
            for name in options.keys() - accepted.keys():
                expected = ", ".join(name for name in accepted if name != "self")
                raise TypeError(f"{function.__name__}: unknown argument {name}; expected {expected}")
        return function(*args, **options)

    return cast(C, call)


def takes_pytorch_names(cls: K) -> K:
    """A class decorator: apply pytorch_names to the public methods that have such arguments."""
    for name, method in list(vars(cls).items()):
        public = inspect.isfunction(method) and not name.startswith("_")
        if public and set(PYTORCH_NAMES.values()) & inspect.signature(method).parameters.keys():
            setattr(cls, name, pytorch_names(method))
    return cls


class Protocols:
    """A base class of Tensor that supports Python's built-in functions and NumPy functions."""

    __slots__ = ()

    def _only_element(self: Any, what: str) -> numpy.ndarray:
        if self.size != 1:
            hint = "; use (x == y).numpy().all() or .any()" if what == "bool()" else ""
            raise ValueError(f"{what}: the tensor has shape {self.shape}; expected one element{hint}")
        return self.numpy().reshape(())

    def __repr__(self: Any) -> str:
        values = numpy.array2string(self.numpy(), separator=", ", prefix="Tensor(", threshold=200, edgeitems=3)
        source = None if self._edge is None else self._edge[0]
        operation = None if source is None or isinstance(source, Leaf) else source.operation
        last = f", operation={operation}" if operation else ", requires_grad=True" if self.requires_grad else ""
        return f"{type(self).__name__}({values}, shape={self.shape}, dtype={self.dtype}, device={self.device}{last})"

    def __format__(self: Any, spec: str) -> str:
        if not spec and self.ndim:
            return str(self)
        if self.size != 1:
            raise TypeError(f"format: {spec!r} requires one element; the tensor has shape {self.shape}")
        return format(self.item(), spec)

    def __len__(self: Any) -> int:
        if not self.ndim:
            raise TypeError("len(): the tensor has shape (), which has no length")
        return len(self.data)

    def __iter__(self: Any) -> Iterator[Any]:
        if not self.ndim:
            raise TypeError("iteration: the tensor has shape () and no axis to iterate over; use item() for its value")
        return (self[i] for i in range(len(self.data)))

    def __contains__(self: Any, value: Any) -> bool:
        return bool((self == value).numpy().any())

    def __bool__(self: Any) -> bool:
        return bool(self._only_element("bool()"))

    def __float__(self: Any) -> float:
        return float(self._only_element("float()"))

    def __int__(self: Any) -> int:
        return int(self._only_element("int()"))

    def __index__(self: Any) -> int:
        if self.dtype.kind not in "iu":
            raise TypeError(f"a Tensor of dtype {self.dtype} is not an index; expected one integer")
        return int(self)

    def __setitem__(self: Any, index: Any, value: Any) -> None:
        raise TypeError("a Tensor cannot be changed in place; write into x.data before the forward pass")

    if not TYPE_CHECKING:  # so that a type checker finds misspelled names

        def __getattr__(self, name):
            if name.endswith("_") and not name.startswith("_") and name not in missing_names.TENSOR:
                raise missing_names.missing_in_place(name, type(self))
            raise missing_names.missing("Tensor", name, missing_names.TENSOR)

    def __reduce__(self: Any) -> tuple[Any, ...]:
        if self.requires_grad and self.leaf is None:
            raise TypeError("a result on the tape cannot be copied or pickled: use x.detach(), or x + 0 for a copy")
        grad = None if self.grad is None else self.backend.to_host(self.grad)
        return _rebuild, (type(self), self.numpy(), self.device, self.requires_grad, grad)

    __array_priority__ = 1000  # cupy_array * tensor calls Tensor.__rmul__

    def __array__(self: Any, dtype: DTypeLike | None = None, copy: bool | None = None) -> numpy.ndarray:
        if self.backend is not get_backend():
            raise TypeError("a Tensor on a GPU is not copied to the host implicitly; use .numpy()")
        values = numpy.asarray(self.data, dtype=dtype)
        return values.copy() if copy and values is self.data else values

    def __dlpack__(self: Any, **options: Any) -> Any:
        """Export the values to torch.from_dlpack(x), cupy.from_dlpack(x) and others, without a copy if possible."""
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self: Any) -> tuple[int, int]:
        return self.data.__dlpack_device__()

    def __array_ufunc__(self: Any, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        forward, reflected = UFUNCS.get(ufunc, ("", None))
        if method == "__call__" and not options:
            if ufunc not in UFUNCS and ufunc in _functions():
                return _functions()[ufunc](*inputs)
            first, *others = inputs
            if isinstance(first, Protocols):
                function = getattr(type(first), forward, None)
            else:
                function = getattr(type(self), reflected or "", None)
                first, others = others[0] if others else first, [first]
            if function is not None:
                return function(first, *others)
        call = ufunc.__name__ + (f".{method}" if method != "__call__" else "") + (" with options" if options else "")
        raise TypeError(f"np.{call} does not support Tensors; use an operation of Tensor or ops, or pass x.numpy()")

    def __array_function__(
        self: Any, function: Any, types: Any, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        if function in _functions():
            return _functions()[function](*arguments, **options)
        if function in METHODS and arguments and isinstance(arguments[0], Protocols):
            x: Any = arguments[0]
            if options.get("dtype") is not None:
                x = x.to(options["dtype"])
            given = {n: v for n, v in options.items() if n != "dtype" and not (n == "out" and v is None)}
            method = getattr(x, METHODS[function])
            if not given.keys() <= inspect.signature(method).parameters.keys():
                given = {NUMPY_NAMES.get(name, name): value for name, value in given.items()}
            return method(*arguments[1:], **given)
        if function in ON_ARRAYS:
            return function(*map(_as_numpy, arguments), **{name: _as_numpy(value) for name, value in options.items()})
        raise TypeError(
            f"np.{function.__name__} does not support Tensors, since it has no gradient; use an operation of "
            f"Tensor or ops, or pass x.numpy()"
        )


def _as_numpy(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_as_numpy, value))
    return cast(Any, value).numpy() if isinstance(value, Protocols) else value


def _rebuild(kind: type[Any], values: numpy.ndarray, device: str, requires_grad: bool, grad: Any) -> Any:
    """Recreate a pickled or copied Tensor; see Protocols.__reduce__."""
    data = get_backend(device).asarray(values)
    copy = kind(data, requires_grad=True) if requires_grad and not kind._is_parameter else kind(data)
    if grad is not None:
        copy.grad = grad
    return copy
