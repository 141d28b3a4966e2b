"""PyTorch's names for the operators and NumPy-style methods of Tensor: x.add(y) is x + y, x.clamp(0, 1) is
x.clip(0, 1)."""

from __future__ import annotations

import builtins
from typing import Any

from tinygrad2.methods import concatenate


class PyTorchNames:
    """A base class of Tensor. Each method is an alias, defined by its expression."""

    __slots__ = ()

    def add(self: Any, other: Any) -> Any:
        """x + other."""
        return self + other

    def sub(self: Any, other: Any) -> Any:
        """x - other."""
        return self - other

    def mul(self: Any, other: Any) -> Any:
        """x * other."""
        return self * other

    def div(self: Any, other: Any) -> Any:
        """x / other."""
        return self / other

    def pow(self: Any, exponent: Any) -> Any:
        """x**exponent."""
        return self**exponent

    def neg(self: Any) -> Any:
        """-x."""
        return -self

    def matmul(self: Any, other: Any) -> Any:
        """x @ other."""
        return self @ other

    mm = bmm = mv = matmul

    def eq(self: Any, other: Any) -> Any:
        """x == other."""
        return self == other

    def ne(self: Any, other: Any) -> Any:
        """x != other."""
        return self != other

    def lt(self: Any, other: Any) -> Any:
        """x < other."""
        return self < other

    def le(self: Any, other: Any) -> Any:
        """x <= other."""
        return self <= other

    def gt(self: Any, other: Any) -> Any:
        """x > other."""
        return self > other

    def ge(self: Any, other: Any) -> Any:
        """x >= other."""
        return self >= other

    def logical_not(self: Any) -> Any:
        """x == 0."""
        return self == 0

    def clamp(self: Any, min: builtins.float | None = None, max: builtins.float | None = None) -> Any:
        """x.clip(min, max)."""
        return self.clip(min, max)

    def asin(self: Any) -> Any:
        """x.arcsin()."""
        return self.arcsin()

    def acos(self: Any) -> Any:
        """x.arccos()."""
        return self.arccos()

    def atan(self: Any) -> Any:
        """x.arctan()."""
        return self.arctan()

    def asinh(self: Any) -> Any:
        """x.arcsinh()."""
        return self.arcsinh()

    def acosh(self: Any) -> Any:
        """x.arccosh()."""
        return self.arccosh()

    def atanh(self: Any) -> Any:
        """x.arctanh()."""
        return self.arctanh()

    def atan2(self: Any, other: Any) -> Any:
        """x.arctan2(other)."""
        return self.arctan2(other)

    def swish(self: Any) -> Any:
        """x.silu()."""
        return self.silu()

    def frac(self: Any) -> Any:
        """The fractional part: x - x.trunc()."""
        return self - self.trunc()

    def fmod(self: Any, other: Any) -> Any:
        """The remainder of x / other rounded toward 0: x - (x / other).trunc() * other."""
        return self - (self / other).trunc() * other

    def movedim(self: Any, source: builtins.int, destination: builtins.int) -> Any:
        """x.moveaxis(source, destination)."""
        return self.moveaxis(source, destination)

    def repeat_interleave(self: Any, repeats: Any, dim: builtins.int | None = None) -> Any:
        """x.repeat(repeats, dim)."""
        return self.repeat(repeats, dim)

    def index_select(self: Any, dim: builtins.int, index: Any) -> Any:
        """x.take(index, dim)."""
        return self.take(index, dim)

    def take_along_dim(self: Any, indices: Any, dim: builtins.int) -> Any:
        """x.gather(dim, indices)."""
        return self.gather(dim, indices)

    def masked_select(self: Any, mask: Any) -> Any:
        """x[mask]."""
        return self[mask]

    def unbind(self: Any, dim: builtins.int = 0) -> tuple[Any, ...]:
        """The slices along `dim`, which is removed, as a tuple."""
        return tuple(self.moveaxis(dim, 0))

    def logcumsumexp(self: Any, dim: builtins.int) -> Any:
        """The logarithm of the cumulative sum of e^x, in O(n^2) time."""
        x = self.moveaxis(dim, -1)
        parts = [x[..., : i + 1].logsumexp(-1, keepdims=True) for i in range(x.shape[-1])] if x.ndim else []
        return concatenate(parts, -1).moveaxis(-1, dim) if parts else self[...]

    def var_mean(self: Any, dim: Any = None, correction: builtins.float = 1, keepdim: bool = False) -> tuple[Any, Any]:
        """(x.var(dim, correction=correction), x.mean(dim))."""
        return self.var(dim, keepdim, correction=correction), self.mean(dim, keepdim)

    def std_mean(self: Any, dim: Any = None, correction: builtins.float = 1, keepdim: bool = False) -> tuple[Any, Any]:
        """(x.std(dim, correction=correction), x.mean(dim))."""
        return self.std(dim, keepdim, correction=correction), self.mean(dim, keepdim)

    def isclose(self: Any, other: Any, rtol: builtins.float = 1e-5, atol: builtins.float = 1e-8) -> Any:
        """Whether |x - other| <= atol + rtol |other|, elementwise. No gradient."""
        return (self.detach() - other).abs() <= (self * 0.0 + other).detach().abs() * rtol + atol

    def numel(self: Any) -> builtins.int:
        """The number of elements."""
        return builtins.int(self.size)

    def dim(self: Any) -> builtins.int:
        """The number of axes."""
        return builtins.int(self.ndim)

    def tolist(self: Any) -> Any:
        """The values as nested lists of Python numbers."""
        return self.numpy().tolist()

    def contiguous(self: Any) -> Any:
        """x itself; operations accept any memory layout."""
        return self

    def float(self: Any) -> Any:
        """x.to('float32')."""
        return self.to("float32")

    def double(self: Any) -> Any:
        """x.to('float64')."""
        return self.to("float64")

    def half(self: Any) -> Any:
        """x.to('float16')."""
        return self.to("float16")

    def int(self: Any) -> Any:
        """x.to('int32')."""
        return self.to("int32")

    def long(self: Any) -> Any:
        """x.to('int64')."""
        return self.to("int64")

    def t(self: Any) -> Any:
        """x.transpose()."""
        return self.transpose()
