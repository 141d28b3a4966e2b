"""Operators of Tensor: comparisons, logic and floor division (without gradients), and in-place operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from tinygrad2 import arguments, autograd
from tinygrad2.methods import Methods, T


def _in_place(op: str) -> Callable[[Any, Any], Any]:
    """The method of an in-place operator. If it returns NotImplemented, Python computes x = x op y."""

    def method(x: Any, other: Any) -> Any:
        if x.leaf is None or (autograd.is_recording() and not x._is_parameter):
            return NotImplemented
        raise TypeError(
            f"{op}: a {type(x).__name__} cannot be changed in place: use x.data {op} y, which changes its values, or "
            f"x = x {op[:-1]} y, which creates a new tensor"
        )

    return method


class Comparisons(Methods[T]):
    """A base class of Tensor.

    `x += y` creates a new Tensor, like x = x + y. It is an error for a Parameter and, inside no_grad(), for any leaf:
    code such as `p -= lr * p.grad` is meant to update the parameter, but would leave it unchanged.
    """

    __slots__ = ()
    _is_parameter = False

    __hash__ = object.__hash__  # by identity, so that Tensors can be dictionary keys

    def __eq__(self, other: Any) -> T:  # type: ignore[override]
        return self._elementwise("==", numpy.equal, other)

    def __ne__(self, other: Any) -> T:  # type: ignore[override]
        return self._elementwise("!=", numpy.not_equal, other)

    def __lt__(self, other: Any) -> T:
        return self._elementwise("<", numpy.less, other)

    def __le__(self, other: Any) -> T:
        return self._elementwise("<=", numpy.less_equal, other)

    def __gt__(self, other: Any) -> T:
        return self._elementwise(">", numpy.greater, other)

    def __ge__(self, other: Any) -> T:
        return self._elementwise(">=", numpy.greater_equal, other)

    def __and__(self, other: Any) -> T:
        return self._elementwise("&", numpy.bitwise_and, other)

    def __or__(self, other: Any) -> T:
        return self._elementwise("|", numpy.bitwise_or, other)

    def __xor__(self, other: Any) -> T:
        return self._elementwise("^", numpy.bitwise_xor, other)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __invert__(self) -> T:
        if arguments.is_float(self.dtype):
            raise TypeError(f"~: the tensor has dtype {self.dtype}; expected booleans or integers")
        return self._constant(self.backend.np.invert(self.data))

    def __pos__(self) -> T:
        return self[...]

    def __floordiv__(self, other: Any) -> T:
        return self._elementwise("//", numpy.floor_divide, other)

    def __rfloordiv__(self, other: Any) -> T:
        a, b = self._operands("//", other)
        return b // a

    def __mod__(self, other: Any) -> T:
        return self.remainder(other)

    def __rmod__(self, other: Any) -> T:
        a, b = self._operands("%", other)
        return b.remainder(a)

    def _elementwise(self, op: str, ufunc: numpy.ufunc, other: Any) -> Any:
        """Call a ufunc of the array library, without a gradient. Returns NotImplemented for an unknown operand type."""
        if not hasattr(other, "dtype") and not isinstance(other, int | float | list | tuple):
            return NotImplemented
        a, b = self._operands(op, other)
        if op == "//" and autograd.is_recording() and (a.requires_grad or b.requires_grad):
            raise TypeError(f"{op}: has no gradient; use x.detach(), or no_grad()")
        if op in ("&", "|", "^") and arguments.is_float(a.dtype):
            raise TypeError(f"{op}: the operands have dtype {a.dtype}; expected booleans or integers")
        return self._constant(getattr(a.backend.np, ufunc.__name__)(a.data, b.data))

    __iadd__, __isub__, __imul__, __itruediv__ = map(_in_place, ("+=", "-=", "*=", "/="))
    __ipow__, __imatmul__, __ifloordiv__, __imod__ = map(_in_place, ("**=", "@=", "//=", "%="))
    __iand__, __ior__, __ixor__ = map(_in_place, ("&=", "|=", "^="))
