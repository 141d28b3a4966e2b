"""A backend: an array library, and the table of kernels that compute on its arrays.

Everything above this file asks the backend of the arrays at hand and never branches on a device or a dtype.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy

from tinygrad2 import reference

DTYPES = ("float32", "float64")


class Backend:
    """device: its name.  np: the array library.  kernels: x_forward / x_backward for every op, as in reference.py."""

    def __init__(self, device: str, np: ModuleType, kernels: ModuleType):
        self.device = device
        self.np = np
        self.kernels = kernels

    def asarray(self, values: Any, dtype: Any = None) -> Any:
        """`values` as an array of this backend, copied only where needed."""
        return self.np.asarray(values, dtype=dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.np.zeros(shape, dtype=dtype)

    def to_host(self, array: Any) -> numpy.ndarray:
        """The array as a NumPy array (the same memory, where it is one already)."""
        return numpy.asarray(array)

    def __repr__(self) -> str:
        return f"Backend({self.device!r})"


@functools.cache
def get_backend(device: str = "cpu") -> Backend:
    """The backend of a device, built once. Raises ValueError for a device that is not available."""
    if device != "cpu":
        raise ValueError(f"device {device!r} is not available: this version computes on 'cpu' (NumPy arrays)")
    return Backend("cpu", numpy, reference)


def backend_of(array: Any) -> Backend:
    """The backend whose arrays are of this array's type. Raises TypeError where there is none."""
    if isinstance(array, numpy.ndarray | numpy.generic):
        return get_backend("cpu")
    raise TypeError(f"expected a NumPy array, got {type(array).__name__}; wrap values as Tensor(...) or an array first")


def check_dtype(dtype: Any) -> numpy.dtype:
    """`dtype` as a NumPy dtype. Raises ValueError where parameters cannot have it."""
    name = dtype if isinstance(dtype, str) else numpy.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; choose one of {', '.join(DTYPES)}")
    return numpy.dtype(name)
