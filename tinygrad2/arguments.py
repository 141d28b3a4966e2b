"""Conversion of the arguments of Tensor methods and operators: numbers and arrays, axes, indices and shapes.

Types are promoted as in PyTorch, with float32 as the default floating-point type:
  - Integers and booleans combined with a floating-point array are converted to its dtype.
  - An integer or boolean array and a Python float give float32, and so does a quotient of integers.
  - Two integer types are combined as in NumPy.
  - Two Tensors of different floating-point types are an error: convert one of them.
  - A number or an array combined with a floating-point Tensor is a constant, and is converted to the Tensor's dtype. So
    a float32 Tensor times a float64 array is float32: NumPy arrays are float64 by default, and a single array must not
    convert an entire model to float64. (Two PyTorch tensors would give float64 here.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy

from tinygrad2.array import Array, Index
from tinygrad2.autograd import is_recording
from tinygrad2.backend import Backend

DEFAULT_FLOAT = numpy.dtype("float32")


def is_float(dtype: numpy.dtype) -> bool:
    """Whether a dtype is a floating-point type, including bfloat16."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def promoted_dtype(op: str, a: numpy.dtype, b: numpy.dtype) -> numpy.dtype:
    """The common dtype of two Tensors of different dtypes. Raises TypeError for two floating-point types."""
    if is_float(a) and is_float(b):
        raise TypeError(f"{op}: the operands have dtypes {a} and {b}; convert one: x.astype({b.name!r})")
    if is_float(a) or is_float(b):
        return a if is_float(a) else b
    return numpy.promote_types(a, b)


def of_numpy(value: Any) -> Any:
    """Convert an array of another library, such as PyTorch, to NumPy. Other values are returned unchanged."""
    if isinstance(getattr(value, "dtype", DEFAULT_FLOAT), numpy.dtype):
        return value
    try:
        return numpy.asarray(value)
    except TypeError:
        message = f"NumPy cannot read an array of dtype {value.dtype}; convert it first, for example to float32"
        raise TypeError(message) from None


def constant(op: str, value: Any, dtype: numpy.dtype, backend: Backend) -> Array:
    """Convert a number, list or array that is combined with a Tensor of `dtype` to an array, by the rules above."""
    if type(value) is float or type(value) is int:
        array_dtype = dtype if is_float(dtype) else DEFAULT_FLOAT if type(value) is float else None
        if array_dtype is not None:
            return backend.asarray(value, dtype=array_dtype)
    value = of_numpy(value)
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    array = value if is_array else numpy_array(op, value)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{op}: an operand has dtype {array.dtype}; expected floats, integers or booleans")
    if is_float(dtype):
        return backend.asarray(array, dtype=dtype)
    if is_float(array.dtype):  # lists of Python floats get the default type; arrays keep theirs
        return backend.asarray(array, dtype=None if is_array else DEFAULT_FLOAT)
    if (
        isinstance(value, int) and not isinstance(value, bool) and dtype.kind in "iu"
    ):  # a Python integer is converted to the Tensor's dtype if it fits
        if not numpy.iinfo(dtype).min <= value <= numpy.iinfo(dtype).max:
            raise OverflowError(f"{op}: {value} does not fit in the other operand's dtype, {dtype}")
        return backend.asarray(value, dtype=dtype)
    return backend.asarray(array, dtype=numpy.promote_types(dtype, array.dtype))


def dtype_of(op: str, dtype: Any, expected: str = "a dtype, such as 'float32'") -> numpy.dtype:
    """Convert to a dtype that a Tensor can have. Raises TypeError for anything else."""
    try:
        found = numpy.dtype(dtype)
    except TypeError:
        raise TypeError(f"{op}: {dtype!r} is not a dtype; expected {expected}") from None
    if found.kind not in "biuf" and found.name != "bfloat16":
        raise TypeError(f"{op}: the dtype is {found}; expected floats, integers or booleans")
    return found


def numpy_array(op: str, value: Any) -> numpy.ndarray:
    """Convert a number or nested lists of numbers to an array. Raises TypeError or ValueError for anything else."""
    if is_recording():
        _check_no_gradient(op, value)
    try:
        array = numpy.asarray(value)
    except ValueError:
        raise ValueError(f"{op}: nested lists have different lengths; expected equal lengths") from None
    if array.dtype.kind == "O" and isinstance(value, int):
        raise OverflowError(f"{op}: {value} does not fit in 64 bits; expected a smaller integer, or a float")
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{op}: expected a Tensor, an array or numbers, got {type(value).__name__}")
    return array


def _check_no_gradient(op: str, value: Any) -> None:
    """Raise TypeError if nested lists contain a Tensor that requires a gradient, which an array would lose."""
    if isinstance(value, list | tuple) and not set(map(type, value)) <= {float, int, bool}:
        for item in value:
            if getattr(item, "requires_grad", False):
                raise TypeError(
                    f"{op}: the list contains a Tensor that requires a gradient, which would be lost; use stack() or "
                    f"concatenate() to join Tensors, or x.detach()"
                )
            _check_no_gradient(op, item)


def axes_of(op: str, axis: Any, ndim: int) -> tuple[int, ...]:
    """Convert `axis` (one axis, several, or None for all) to a tuple of axes from 0 to ndim - 1. If ndim is 0, the axes
    0 and -1 are ignored.

    Raises ValueError if an axis is out of range or repeated, and TypeError for anything but integers.
    """
    if axis is None:
        return tuple(range(ndim))
    given = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    for i in given:
        if isinstance(i, bool) or not isinstance(i, int | numpy.integer):
            raise TypeError(f"{op}: axis is {axis!r}; expected an integer, a tuple of integers or None")
        if not -max(ndim, 1) <= i < max(ndim, 1):
            raise ValueError(f"{op}: axis {i} is out of range for a {ndim}-d tensor")
    axes = tuple(int(i) % ndim for i in given) if ndim else ()
    if len(set(axes)) < len(axes):
        raise ValueError(f"{op}: axis {axis!r} contains an axis twice")
    return axes


def lengths(op: str, given: tuple[Any, ...]) -> tuple[int, ...]:
    """The arguments of reshape(2, 3) or reshape((2, 3)) as a tuple of integers."""
    shape = tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else given
    if not all(isinstance(n, int | numpy.integer) for n in shape):
        raise TypeError(f"{op}: got {', '.join(map(repr, given))}; expected integers, or a tuple of integers")
    return tuple(int(n) for n in shape)


def plain_index(index: Any) -> Index:
    """Convert lists and Tensors in an index to arrays. Arrays are copied, since the backward pass needs them.

    Raises TypeError for anything that cannot index an array.
    """
    if type(index) is int or type(index) is slice:
        return index
    return tuple(map(_plain, index)) if type(index) is tuple else _plain(index)


def _plain(index: Any) -> Index:
    if index is None or index is Ellipsis or isinstance(index, int | slice):
        return index
    if isinstance(index, numpy.integer):
        return int(index)
    is_tensor = hasattr(index, "numpy")
    array: Any = index.data if is_tensor else index if hasattr(index, "dtype") else numpy_array("indexing", index)
    if array.dtype.kind in "iub":
        return array.copy()
    if array.size == 0 and not hasattr(index, "dtype"):
        return array.astype(numpy.int64)  # NumPy converts an empty list to float64
    raise TypeError(
        f"indexing: an index has dtype {array.dtype}; expected integers or booleans"
        + (" (a Tensor made from a list is float32; pass the list, or Tensor(list, dtype='int64'))" * is_tensor)
    )


def describe_index(index: Index) -> str:
    """An index as text, for error messages. Arrays are described by their shapes."""
    parts: Iterable[Any] = index if isinstance(index, tuple) else (index,)
    return ", ".join(
        f"[{'mask' if i.dtype.kind == 'b' else 'array'} of shape {i.shape}]" if hasattr(i, "dtype")
        else "..." if i is Ellipsis
        else ":".join("" if n is None else str(n) for n in (i.start, i.stop, i.step)).removesuffix(":") or ":"
        if isinstance(i, slice)
        else repr(i)
        for i in parts
    )  # fmt: skip
