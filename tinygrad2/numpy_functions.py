"""NumPy functions for Tensors, with NumPy's names and arguments: np.sort(x), np.where(mask, x, y), np.stack([x, y]).

If x is a Tensor, protocols.py implements np.f(x) by a method with the same arguments, or by the function f in this
file. Most functions are compositions of one or two lines; see NumPy's documentation for their descriptions. Arguments
that control memory (out, order="F" of a copy) or the algorithm are not supported.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
from numpy.typing import ArrayLike

from tinygrad2 import functional
from tinygrad2.arguments import axes_of
from tinygrad2.methods import Axis, axis_of
from tinygrad2.tensor import Tensor

Operand = Tensor | ArrayLike


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(x)


def _two(op: str, a: Operand, b: Operand) -> tuple[Tensor, Tensor]:
    """Both operands as Tensors of a common dtype."""
    x, y = functional._tensors(op, [a, b])
    return x, y


# Elementwise ----------------------------------------------------------------------------------------------------------


def positive(x: Tensor) -> Tensor:
    return x[...]


def cbrt(x: Tensor) -> Tensor:
    return x.sign() * x.abs() ** (1 / 3)


def sinc(x: Tensor) -> Tensor:
    angle = x.where(x.data != 0, 1e-20) * math.pi  # at 1e-20, sin(t) / t is 1
    return angle.sin() / angle


def fmax(a: Operand, b: Operand) -> Tensor:
    x, y = _two("fmax", a, b)
    return x.maximum(y).where(~(x.isnan() | y.isnan()), y.where(x.isnan(), x))


def fmin(a: Operand, b: Operand) -> Tensor:
    x, y = _two("fmin", a, b)
    return -fmax(-x, -y)


def logaddexp2(a: Operand, b: Operand) -> Tensor:
    x, y = _two("logaddexp2", a, b)
    return (x * math.log(2)).logaddexp(y * math.log(2)) / math.log(2)


def float_power(a: Operand, b: Operand) -> Tensor:
    x, y = _two("float_power", a, b)
    return (x * 1.0).power(y * 1.0)


def copysign(a: Operand, b: Operand) -> Tensor:
    x, y = _two("copysign", a, b)
    return x.abs() * Tensor(x.backend.np.copysign(x.backend.np.ones_like(y.data), y.data))


def fix(x: Tensor) -> Tensor:
    return x.trunc()


def nan_to_num(x: Tensor, copy: bool = True, nan: float = 0.0) -> Tensor:
    return x.nan_to_num(nan)


# Shapes ---------------------------------------------------------------------------------------------------------------


def reshape(a: Tensor, shape: Any, order: str = "C") -> Tensor:
    lengths = (shape,) if isinstance(shape, int) else tuple(shape)
    return a.reshape(lengths) if order in ("C", "A") else a.transpose().reshape(lengths[::-1]).transpose()


def ravel(a: Tensor, order: str = "C") -> Tensor:
    return (a if order in ("C", "A", "K") else a.transpose()).ravel()


def expand_dims(a: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    given = axis if isinstance(axis, tuple | list) else (axis,)
    lengths = iter(a.shape)
    ndim = a.ndim + len(given)
    new = axes_of("expand_dims", tuple(given), ndim)
    return a.reshape(tuple(1 if i in new else next(lengths) for i in range(ndim)))


def rollaxis(a: Tensor, axis: int, start: int = 0) -> Tensor:
    source = axis_of("rollaxis", axis, a.ndim)
    return a.moveaxis(source, start - 1 if source < start else start)


def matrix_transpose(x: Tensor) -> Tensor:
    return x.swapaxes(-1, -2)


def flipud(m: Tensor) -> Tensor:
    return m.flip(0)


def fliplr(m: Tensor) -> Tensor:
    return m.flip(1)


def rot90(m: Tensor, k: int = 1, axes: tuple[int, int] = (0, 1)) -> Tensor:
    for _ in range(k % 4):
        m = m.flip(axes[1]).swapaxes(*axes)
    return m


def _with_axes(*tensors: Tensor, shape: Callable[[Tensor], tuple[int, ...]]) -> Any:
    results = tuple(x.reshape(shape(x)) for x in map(_tensor, tensors))
    return results if len(results) > 1 else results[0]


def atleast_1d(*tensors: Tensor) -> Any:
    return _with_axes(*tensors, shape=lambda x: x.shape or (1,))


def atleast_2d(*tensors: Tensor) -> Any:
    return _with_axes(*tensors, shape=lambda x: (1,) * builtins.max(0, 2 - x.ndim) + x.shape)


def atleast_3d(*tensors: Tensor) -> Any:
    shapes = {0: (1, 1, 1), 1: (1, -1, 1)}
    return _with_axes(*tensors, shape=lambda x: shapes.get(x.ndim, (*x.shape, 1) if x.ndim == 2 else x.shape))


def broadcast_arrays(*tensors: Operand) -> tuple[Tensor, ...]:
    given = [_tensor(x) for x in tensors]
    shape = numpy.broadcast_shapes(*(x.shape for x in given))
    return tuple(x.broadcast_to(shape) for x in given)


# Join and split -------------------------------------------------------------------------------------------------------


def append(arr: Operand, values: Operand, axis: int | None = None) -> Tensor:
    return functional.concatenate([arr, values], axis)


def column_stack(tup: Sequence[Operand]) -> Tensor:
    given = functional._tensors("column_stack", tup)
    return functional.concatenate([x if x.ndim > 1 else x.reshape(-1, 1) for x in given], 1)


def array_split(ary: Tensor, indices_or_sections: Any, axis: int = 0) -> list[Tensor]:
    if isinstance(indices_or_sections, int | numpy.integer):
        return list(ary.array_split(int(indices_or_sections), axis))
    n = ary.shape[axis_of("split", axis, ary.ndim)]
    bounds = [
        slice(*pair).indices(n)[:2] for pair in zip([0, *indices_or_sections], [*indices_or_sections, n], strict=True)
    ]
    before = (slice(None),) * axis_of("split", axis, ary.ndim)
    return [ary[(*before, slice(first, builtins.max(first, last)))] for first, last in bounds]


def split(ary: Tensor, indices_or_sections: Any, axis: int = 0) -> list[Tensor]:
    n = ary.shape[axis_of("split", axis, ary.ndim)] if ary.ndim else 0
    if isinstance(indices_or_sections, int) and n % indices_or_sections:
        raise ValueError(f"split: length {n} cannot be split into {indices_or_sections} equal parts; use array_split")
    return array_split(ary, indices_or_sections, axis)


def hsplit(ary: Tensor, indices_or_sections: Any) -> list[Tensor]:
    return split(ary, indices_or_sections, 1 if ary.ndim > 1 else 0)


def vsplit(ary: Tensor, indices_or_sections: Any) -> list[Tensor]:
    return split(ary, indices_or_sections, 0)


def dsplit(ary: Tensor, indices_or_sections: Any) -> list[Tensor]:
    return split(ary, indices_or_sections, 2)


def unstack(x: Tensor, *, axis: int = 0) -> tuple[Tensor, ...]:
    return tuple(x.moveaxis(axis, 0))


# Elements -------------------------------------------------------------------------------------------------------------


def where(condition: Any, x: Operand, y: Operand) -> Tensor:
    return functional.where(condition, x, y)


def select(condlist: Sequence[Any], choicelist: Sequence[Operand], default: Operand = 0) -> Tensor:
    result = _two("select", choicelist[0], default)[1]
    for condition, choice in zip(condlist[::-1], choicelist[::-1], strict=True):
        result = functional.where(condition, choice, result)
    return result


def sort(a: Tensor, axis: int | None = -1, kind: Any = None) -> Tensor:
    return a.ravel().sort(0).values if axis is None else a.sort(axis).values


def partition(a: Tensor, kth: int, axis: int | None = -1) -> Tensor:
    return sort(a, axis)  # a sorted array is a valid partition


def take_along_axis(arr: Tensor, indices: Any, axis: int = -1) -> Tensor:
    values = numpy.asarray(indices.numpy() if isinstance(indices, Tensor) else indices)
    n = arr.shape[axis_of("take_along_axis", axis, arr.ndim)]
    return arr.gather(axis, numpy.where(values < 0, values + n, values))


def compress(condition: Any, a: Tensor, axis: int | None = None) -> Tensor:
    return a.take(numpy.flatnonzero(numpy.asarray(condition)), axis)


# Reductions and differences -------------------------------------------------------------------------------------------


def average(a: Tensor, axis: Axis = None, weights: Any = None, *, keepdims: bool = False) -> Tensor:
    if weights is None:
        return a.mean(axis, keepdims)
    x, w = _two("average", a, weights)
    if w.shape != x.shape and w.ndim == 1 and isinstance(axis, int):
        w = w.reshape(tuple(w.size if i == axis_of("average", axis, x.ndim) else 1 for i in range(x.ndim)))
    return (x * w).sum(axis, keepdims) / w.broadcast_to(x.shape).sum(axis, keepdims)


def ptp(a: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return a.max(axis, keepdims) - a.min(axis, keepdims)


def median(a: Tensor, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
    along = 0 if axis is None else axis_of("median", axis, a.ndim)
    x = sort(a, axis).moveaxis(along, -1)
    n = x.shape[-1]
    middle = (x[..., (n - 1) // 2] + x[..., n // 2]) * 0.5
    if not keepdims:
        return middle
    return middle.reshape((1,) * a.ndim) if axis is None else middle.unsqueeze(along)


def _without_nan(a: Tensor, value: float) -> Tensor:
    return a.masked_fill(a.isnan(), value)


def nansum(a: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return _without_nan(a, 0).sum(axis, keepdims)


def nanprod(a: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return _without_nan(a, 1).prod(axis, keepdims)


def nanmax(a: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return _without_nan(a, -math.inf).max(axis, keepdims)


def nanmin(a: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return _without_nan(a, math.inf).min(axis, keepdims)


def nanmean(a: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return nansum(a, axis, keepdims=keepdims) / (~a.isnan()).sum(axis, keepdims)


def nanvar(a: Tensor, axis: Axis = None, *, ddof: float = 0, keepdims: bool = False) -> Tensor:
    centered = _without_nan(a - nanmean(a, axis, keepdims=True), 0)
    return centered.square().sum(axis, keepdims) / ((~a.isnan()).sum(axis, keepdims) - ddof)


def nanstd(a: Tensor, axis: Axis = None, *, ddof: float = 0, keepdims: bool = False) -> Tensor:
    return nanvar(a, axis, ddof=ddof, keepdims=keepdims)._root()


def count_nonzero(a: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return (a != 0).sum(axis, keepdims)


def ediff1d(ary: Tensor) -> Tensor:
    return ary.ravel().diff()


def gradient(f: Tensor, spacing: float = 1.0, axis: int | None = None) -> Any:
    """Central differences (one-sided at the ends) along one axis, or along each axis."""
    if axis is None and f.ndim > 1:
        return [gradient(f, spacing, i) for i in range(f.ndim)]
    x = f.moveaxis(axis or 0, -1)
    inside = (x[..., 2:] - x[..., :-2]) / (2 * spacing)
    first, last = (x[..., 1:2] - x[..., :1]) / spacing, (x[..., -1:] - x[..., -2:-1]) / spacing
    return functional.concatenate([first, inside, last], -1).moveaxis(-1, axis or 0)


def trapezoid(y: Tensor, x: Any = None, dx: float = 1.0, axis: int = -1) -> Tensor:
    y = y.moveaxis(axis, -1)
    steps = dx if x is None else _two("trapezoid", y, x)[1].diff()
    return ((y[..., 1:] + y[..., :-1]) * steps * 0.5).sum(-1)


def norm(x: Tensor, ord: Any = None, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """np.linalg.norm for vectors, and the Frobenius norm for matrices."""
    if ord in (None, "fro"):
        return x.norm(2, axis, keepdims)
    if not (isinstance(axis, int) or x.ndim == 1) or ord in ("nuc", 0):
        raise ValueError(f"norm: ord is {ord!r}; for a matrix, only the Frobenius norm is supported (None or 'fro')")
    if ord == -math.inf:
        return x.abs().min(axis, keepdims)
    return x.norm(ord, axis, keepdims) if ord >= 1 else (x.abs() ** float(ord)).sum(axis, keepdims) ** (1 / ord)


# Products -------------------------------------------------------------------------------------------------------------


def einsum(subscripts: str, *operands: Operand, optimize: Any = False) -> Tensor:
    return functional.einsum(subscripts, *operands)


def cross(a: Operand, b: Operand) -> Tensor:
    """The cross product of vectors of length 3 along the last axis."""
    x, y = _two("cross", a, b)
    if x.shape[-1:] != (3,) or y.shape[-1:] != (3,):
        raise ValueError(f"cross: shapes {x.shape} and {y.shape}; expected vectors of length 3 along the last axis")
    after, before = [1, 2, 0], [2, 0, 1]
    return x[..., after] * y[..., before] - x[..., before] * y[..., after]


def convolve(a: Operand, v: Operand) -> Tensor:
    """The full convolution of two vectors."""
    x, y = _two("convolve", a, v)
    shifted = [(x * y[i]).pad((i, y.size - 1 - i)) for i in range(y.size)]
    return functional.stack(shifted).sum(0)


_OF_THEIR_NAMES = (
    cbrt, sinc, fmax, fmin, logaddexp2, float_power, copysign, fix, nan_to_num, reshape, ravel, expand_dims, rollaxis,
    matrix_transpose, flipud, fliplr, rot90, atleast_1d, atleast_2d, atleast_3d, broadcast_arrays, append, column_stack,
    array_split, split, hsplit, vsplit, dsplit, unstack, where, select, sort, partition, take_along_axis, compress,
    average, ptp, median, nansum, nanprod, nanmax, nanmin, nanmean, nanvar, nanstd, count_nonzero, ediff1d, gradient,
    trapezoid, einsum, cross, convolve, positive, functional.concatenate, functional.stack, functional.vstack,
    functional.hstack, functional.dstack, functional.meshgrid, functional.vdot, functional.kron,
    functional.zeros_like, functional.ones_like, functional.full_like, functional.arctan2,
)  # fmt: skip
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    numpy.real: positive,
    numpy.conjugate: positive,
    numpy.real_if_close: positive,
    numpy.copy: positive,
    numpy.fabs: Tensor.abs,
    numpy.deg2rad: Tensor.radians,
    numpy.rad2deg: Tensor.degrees,
    numpy.linalg.norm: norm,
}
FUNCTIONS |= {
    getattr(numpy, function.__name__): function for function in _OF_THEIR_NAMES if hasattr(numpy, function.__name__)
}
