"""Checks of the arguments of the operations in ops.py, and the results of operations on empty arrays."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import DTypeLike

from tinygrad2.arguments import is_float
from tinygrad2.array import Array
from tinygrad2.autograd import GradientBuffers, Gradients, Saved
from tinygrad2.backend import backend_of
from tinygrad2.random import Key, check_key
from tinygrad2.tensor import Tensor, record


def check_tensors(op: str, *tensors: Tensor) -> None:
    """Check that all arguments are Tensors of the same floating-point dtype; types are not promoted."""
    for tensor in tensors:
        check_is_tensor(op, tensor)
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not is_float(tensors[0].dtype):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise TypeError(f"{op}: the arguments have dtypes {names}; expected one floating-point dtype")


def check_is_tensor(op: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected Tensors, got {type(value).__name__}; wrap it as Tensor(...)")


def read(op: str, name: str, parameter: Tensor, dtype: DTypeLike) -> Array:
    """The values of a parameter for an operation whose activations have this dtype; see Tensor.read_as."""
    check_is_tensor(op, parameter)
    return parameter.read_as(dtype, f"{op}: {name}")


def read_optional(op: str, name: str, parameter: Tensor | None, dtype: DTypeLike) -> Array | None:
    return None if parameter is None else read(op, name, parameter, dtype)


def empty_result(shape: tuple[int, ...], *parents: Tensor | None, value: float = 0.0) -> Tensor:
    """The result of an operation on empty arrays, which kernels do not support: an empty array, or NaN for a mean.
    The gradients of the parents are zeros."""
    wanted = tuple(parent for parent in parents if parent is not None)
    backend, dtype = wanted[0].backend, wanted[0].data.dtype
    zeros = tuple(parent.data.shape for parent in wanted)
    return record(backend.np.full(shape, value, dtype=dtype), wanted, _empty_backward, saved=zeros)


def _empty_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    return tuple(backend_of(dy).zeros(shape, dy.dtype) for shape in saved)


def check_rate(op: str, rate: float, key: Key | None) -> float:
    if key is not None:
        check_key(op, key)
    if not 0 <= rate < 1:
        raise ValueError(f"{op}: the dropout rate is {rate}; expected 0 <= rate < 1")
    return float(rate)


def expect_shape(op: str, name: str, value: Tensor | Array | None, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; expected {tuple(shape)}")


def host_indices(op: str, name: str, values: Any, limit: int) -> numpy.ndarray:
    """Convert `values` to an int64 array on the host. Raises ValueError unless all are in [0, limit), since a GPU would
    read out of bounds.

    An array on a device is copied to the host, which waits for the device.
    """
    values = values.data if isinstance(values, Tensor) else values
    if isinstance(values, list | tuple | int):
        try:
            values = numpy.asarray(values)
        except ValueError:
            raise ValueError(f"{op}: {name} have rows of different lengths; expected equal lengths") from None
    if not hasattr(values, "dtype"):
        raise TypeError(f"{op}: {name} have type {type(values).__name__}; expected an array of integers")
    if values.size == 0:  # (NumPy converts an empty list to float64)
        return numpy.zeros(values.shape, dtype=numpy.int64)
    if values.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} have dtype {values.dtype}; expected integers")
    host = backend_of(values).to_host(values)
    low, high = int(host.min()), int(host.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{op}: {name} contain {low if low < 0 else high}; expected integers in [0, {limit})")
    return host.astype(numpy.int64)
