"""Tensor methods that are composed of a few others. They are also available as functions in functional.py.

    elementwise   abs sign sqrt rsqrt square reciprocal exp2 expm1 log1p log2 log10 erf floor ceil round trunc
                  sin cos tan sinh cosh arcsin arccos arctan arcsinh arccosh arctanh degrees radians
                  isnan isinf isfinite nan_to_num
    activations   relu relu6 leaky_relu elu celu selu sigmoid logsigmoid silu mish softplus softsign
                  hardtanh hardsigmoid hardswish quick_gelu
    two operands  maximum minimum power remainder logaddexp arctan2 hypot lerp where masked_fill clip
    reductions    min prod var std norm all any argmax argmin logsumexp softmax log_softmax
                  cumsum cumprod diff sort argsort topk
    shapes        squeeze unsqueeze expand_dims flatten ravel view unflatten permute swapaxes moveaxis flip roll
                  broadcast_to expand repeat tile split array_split chunk pad
    elements      gather take diagonal diag trace tril triu
    products      dot inner outer tensordot

Names and arguments are as in NumPy, or as in PyTorch if NumPy has no such function. Where a function is not
differentiable, the gradient is as in PyTorch: relu'(0) = abs'(0) = 0, equal operands of maximum get half of the
gradient each, and the bounds of clip count as inside. Functions with fractional results convert integers and booleans
to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy

from tinygrad2.arguments import DEFAULT_FLOAT, axes_of
from tinygrad2.array import Array
from tinygrad2.autograd import BackwardFunction, GradientBuffers, Gradients, Saved
from tinygrad2.backend import Backend, backend_of
from tinygrad2.protocols import takes_pytorch_names

T = TypeVar("T", bound="Methods[Any]")  # Tensor, which cannot be imported here, since Methods is its base class
Axis = int | tuple[int, ...] | None
Function = Callable[[Any, Any], Any]  # called with the array library and an array


@takes_pytorch_names
class Methods(Generic[T]):
    """A base class of Tensor. The type variable T stands for Tensor."""

    __slots__ = ()

    if TYPE_CHECKING:  # the methods of Tensor that are used here
        data: Any

        @property
        def shape(self) -> tuple[int, ...]: ...
        @property
        def ndim(self) -> int: ...
        @property
        def size(self) -> int: ...
        @property
        def dtype(self) -> numpy.dtype: ...
        @property
        def backend(self) -> Backend: ...
        @property
        def requires_grad(self) -> bool: ...
        def _record(
            self, data: Any, parents: tuple[Any, ...], backward: BackwardFunction | str, saved: Saved = ()
        ) -> T: ...
        def _operands(self, op: str, other: Any, broadcast: bool = True) -> tuple[T, T]: ...
        def detach(self) -> T: ...
        def __add__(self, other: Any) -> T: ...
        def __sub__(self, other: Any) -> T: ...
        def __mul__(self, other: Any) -> T: ...
        def __truediv__(self, other: Any) -> T: ...
        def __matmul__(self, other: Any) -> T: ...
        def __floordiv__(self, other: Any) -> T: ...
        def __neg__(self) -> T: ...
        def __getitem__(self, index: Any) -> T: ...
        def exp(self) -> T: ...
        def log(self) -> T: ...
        def tanh(self) -> T: ...
        def sum(self, axis: Axis = None, keepdims: bool = False) -> T: ...
        def mean(self, axis: Axis = None, keepdims: bool = False) -> T: ...
        def max(self, axis: Axis = None, keepdims: bool = False) -> T: ...
        def reshape(self, *shape: int | tuple[int, ...]) -> T: ...
        def transpose(self, *axes: int | tuple[int, ...]) -> T: ...

    # Elementwise ------------------------------------------------------------------------------------------------------

    def _map(self, name: str, forward: Function, slope: Function | None = None, of_result: bool = False) -> T:
        """y = forward(np, x), with dx = dy slope(np, x), or dx = dy slope(np, y) if of_result. Without a slope, dx = 0.

        np is the array library. Saves x, or y if of_result.
        """
        y = forward(self.backend.np, self.data)
        return self._record(y, (self,), Slope(name, slope), saved=(y if of_result else self.data,))

    def _constant(self, data: Any) -> T:
        """A result without a gradient."""
        return self._record(data, (), "")

    def _float(self) -> Methods[T]:
        """This tensor, with integers and booleans converted to float32."""
        if self.dtype.kind not in "iub":
            return self
        return self._constant(self.data.astype(DEFAULT_FLOAT))

    def abs(self) -> T:
        """|x|; the gradient at 0 is 0."""
        return self._map("abs", lambda np, x: np.abs(x), lambda np, x: np.sign(x))

    def __abs__(self) -> T:
        return self.abs()

    def sign(self) -> T:
        """-1, 0 or 1; the gradient is 0."""
        return self._map("sign", lambda np, x: np.sign(x))

    def floor(self) -> T:
        """The largest integer <= x; the gradient is 0."""
        return self._map("floor", lambda np, x: np.floor(x))

    def ceil(self) -> T:
        """The smallest integer >= x; the gradient is 0."""
        return self._map("ceil", lambda np, x: np.ceil(x))

    def round(self) -> T:
        """The nearest integer, ties to even; the gradient is 0."""
        return self._map("round", lambda np, x: np.rint(x))

    def trunc(self) -> T:
        """The integer part (rounded toward 0); the gradient is 0."""
        return self._map("trunc", lambda np, x: np.trunc(x))

    def sqrt(self) -> T:
        """The square root."""
        return self._float()._map("sqrt", lambda np, x: np.sqrt(x), lambda np, y: 0.5 / y, of_result=True)

    def rsqrt(self) -> T:
        """1 / sqrt(x)."""
        return self._float()._map("rsqrt", lambda np, x: 1 / np.sqrt(x), lambda np, y: -0.5 * y * y * y, of_result=True)

    def square(self) -> T:
        """x^2."""
        return self._map("square", lambda np, x: x * x, lambda np, x: 2 * x)

    def reciprocal(self) -> T:
        """1 / x."""
        return self._float()._map("reciprocal", lambda np, x: 1 / x, lambda np, y: -y * y, of_result=True)

    def exp2(self) -> T:
        """2^x."""
        return self._float()._map("exp2", lambda np, x: np.exp2(x), lambda np, y: y * math.log(2), of_result=True)

    def expm1(self) -> T:
        """e^x - 1, accurate near 0."""
        return self._float()._map("expm1", lambda np, x: np.expm1(x), lambda np, y: y + 1, of_result=True)

    def log1p(self) -> T:
        """ln(1 + x), accurate near 0."""
        return self._float()._map("log1p", lambda np, x: np.log1p(x), lambda np, x: 1 / (1 + x))

    def log2(self) -> T:
        """The base-2 logarithm."""
        return self._float()._map("log2", lambda np, x: np.log2(x), lambda np, x: 1 / (x * math.log(2)))

    def log10(self) -> T:
        """The base-10 logarithm."""
        return self._float()._map("log10", lambda np, x: np.log10(x), lambda np, x: 1 / (x * math.log(10)))

    def sin(self) -> T:
        """The sine of x in radians."""
        return self._float()._map("sin", lambda np, x: np.sin(x), lambda np, x: np.cos(x))

    def cos(self) -> T:
        """The cosine of x in radians."""
        return self._float()._map("cos", lambda np, x: np.cos(x), lambda np, x: -np.sin(x))

    def tan(self) -> T:
        """The tangent of x in radians."""
        return self._float()._map("tan", lambda np, x: np.tan(x), lambda np, y: 1 + y * y, of_result=True)

    def sinh(self) -> T:
        """(e^x - e^-x) / 2."""
        return self._float()._map("sinh", lambda np, x: np.sinh(x), lambda np, x: np.cosh(x))

    def cosh(self) -> T:
        """(e^x + e^-x) / 2."""
        return self._float()._map("cosh", lambda np, x: np.cosh(x), lambda np, x: np.sinh(x))

    def arcsin(self) -> T:
        """The inverse of sin, in [-pi / 2, pi / 2]."""
        return self._float()._map("arcsin", lambda np, x: np.arcsin(x), lambda np, x: 1 / np.sqrt(1 - x * x))

    def arccos(self) -> T:
        """The inverse of cos, in [0, pi]."""
        return self._float()._map("arccos", lambda np, x: np.arccos(x), lambda np, x: -1 / np.sqrt(1 - x * x))

    def arctan(self) -> T:
        """The inverse of tan, in [-pi / 2, pi / 2]."""
        return self._float()._map("arctan", lambda np, x: np.arctan(x), lambda np, x: 1 / (1 + x * x))

    def arcsinh(self) -> T:
        """The inverse of sinh."""
        return self._float()._map("arcsinh", lambda np, x: np.arcsinh(x), lambda np, x: 1 / np.sqrt(x * x + 1))

    def arccosh(self) -> T:
        """The inverse of cosh, for x >= 1."""
        return self._float()._map("arccosh", lambda np, x: np.arccosh(x), lambda np, x: 1 / np.sqrt(x * x - 1))

    def arctanh(self) -> T:
        """The inverse of tanh, for |x| <= 1."""
        return self._float()._map("arctanh", lambda np, x: np.arctanh(x), lambda np, x: 1 / (1 - x * x))

    def degrees(self) -> T:
        """Convert x from radians to degrees."""
        return self * (180 / math.pi)

    def radians(self) -> T:
        """Convert x from degrees to radians."""
        return self * (math.pi / 180)

    def erf(self) -> T:
        """The error function, 2 / sqrt(pi) times the integral of exp(-t^2) from 0 to x."""
        return self._float()._map(
            "erf", lambda np, x: backend_of(x).kernels.erf(x), lambda np, x: 2 / math.sqrt(math.pi) * np.exp(-x * x)
        )

    def isnan(self) -> T:
        """Whether x is NaN. Booleans, without a gradient."""
        return self._constant(self.backend.np.isnan(self.data))

    def isinf(self) -> T:
        """Whether x is infinite. Booleans, without a gradient."""
        return self._constant(self.backend.np.isinf(self.data))

    def isfinite(self) -> T:
        """Whether x is neither infinite nor NaN. Booleans, without a gradient."""
        return self._constant(self.backend.np.isfinite(self.data))

    def nan_to_num(self, nan: float = 0.0) -> T:
        """Replace NaN by `nan`, and infinities by the largest finite values. The gradient of replaced elements is 0."""
        return self._map("nan_to_num", lambda np, x: np.nan_to_num(x, nan=nan), lambda np, x: np.isfinite(x))

    # Activations ------------------------------------------------------------------------------------------------------

    def relu(self) -> T:
        """max(x, 0); the gradient at 0 is 0."""
        return self._map("relu", lambda np, x: np.maximum(x, 0), lambda np, y: y != 0, of_result=True)

    def relu6(self) -> T:
        """min(max(x, 0), 6)."""
        return self.hardtanh(0.0, 6.0)

    def leaky_relu(self, negative_slope: float = 0.01) -> T:
        """x where x > 0, else negative_slope x."""
        negative_slope = float(negative_slope)
        return self._float()._map(
            "leaky_relu",
            lambda np, x: np.where(x > 0, x, negative_slope * x),
            lambda np, x: np.where(x > 0, _as(x, 1.0), _as(x, negative_slope)),
        )

    def elu(self, alpha: float = 1.0) -> T:
        """x where x > 0, else alpha (e^x - 1) (arXiv:1511.07289)."""
        alpha = float(alpha)
        return self._float()._map(
            "elu",
            lambda np, x: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
            lambda np, x: np.where(x > 0, _as(x, 1.0), alpha * np.exp(np.minimum(x, 0))),
        )

    def celu(self, alpha: float = 1.0) -> T:
        """x where x > 0, else alpha (e^(x / alpha) - 1) (arXiv:1704.07483)."""
        return (self / alpha).elu() * alpha

    def selu(self) -> T:
        """1.0507 elu(x, alpha=1.6733), which preserves mean 0 and variance 1 (arXiv:1706.02515, eq. 2)."""
        return self.elu(1.6732632423543772848170429916717) * 1.0507009873554804934193349852946

    def sigmoid(self) -> T:
        """1 / (1 + e^-x), computed without overflow or loss of precision."""

        def forward(np: Any, x: Array) -> Array:
            e = np.exp(-np.abs(x))
            return np.where(x < 0, e, _as(x, 1.0)) / (1 + e)

        return self._float()._map("sigmoid", forward, lambda np, y: y * (1 - y), of_result=True)

    def logsigmoid(self) -> T:
        """log(sigmoid(x)) = -softplus(-x)."""
        return -(-self).softplus()

    def silu(self) -> T:
        """x sigmoid(x), also called swish (arXiv:1702.03118)."""
        return self * self.sigmoid()

    def quick_gelu(self) -> T:
        """x sigmoid(1.702 x), an approximation of GELU (arXiv:1606.08415)."""
        return self * (self * 1.702).sigmoid()

    def softplus(self) -> T:
        """log(1 + e^x), computed without overflow as max(x, 0) + log1p(e^-|x|)."""
        return self._float()._map(
            "softplus",
            lambda np, x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
            lambda np, x: np.where(x < 0, np.exp(-np.abs(x)), _as(x, 1.0)) / (1 + np.exp(-np.abs(x))),
        )

    def mish(self) -> T:
        """x tanh(softplus(x)) (arXiv:1908.08681)."""
        return self * self.softplus().tanh()

    def softsign(self) -> T:
        """x / (1 + |x|)."""
        return self / (self.abs() + 1.0)

    def hardtanh(self, min_val: float = -1.0, max_val: float = 1.0) -> T:
        """x clamped to [min_val, max_val]; the gradient at both bounds is 0."""
        min_val, max_val = float(min_val), float(max_val)  # NumPy scalars would promote x
        _check(min_val <= max_val, f"hardtanh: min_val is {min_val} and max_val {max_val}; expected min_val <= max_val")
        return self._float()._map(
            "hardtanh", lambda np, x: np.clip(x, min_val, max_val), lambda np, x: ~((x <= min_val) | (x >= max_val))
        )

    def hardsigmoid(self) -> T:
        """relu6(x + 3) / 6 (arXiv:1905.02244)."""
        return (self + 3.0).relu6() / 6.0

    def hardswish(self) -> T:
        """x relu6(x + 3) / 6 (arXiv:1905.02244)."""
        return self._float()._map(
            "hardswish",
            lambda np, x: x * np.clip(x + 3, 0, 6) / 6,
            lambda np, x: np.where(x <= -3, _as(x, 0.0), np.where(x < 3, x / 3 + 0.5, _as(x, 1.0))),
        )

    # Two operands -----------------------------------------------------------------------------------------------------

    def maximum(self, other: Any) -> T:
        """The elementwise maximum, with broadcasting. Equal elements get half of the gradient each."""
        a, b = self._operands("maximum", other)
        y = self.backend.np.maximum(a.data, b.data)
        return self._record(y, (a, b), _maximum_backward, saved=(a.data, b.data))

    def minimum(self, other: Any) -> T:
        """The elementwise minimum, with broadcasting. Equal elements get half of the gradient each."""
        a, b = self._operands("minimum", other)
        return self._record(self.backend.np.minimum(a.data, b.data), (a, b), _minimum_backward, saved=(a.data, b.data))

    def power(self, exponent: Any) -> T:
        """x^exponent for two tensors. The gradient of the exponent, y ln x, is defined as 0 if x = 0 <= exponent."""
        a, b = self._operands("power", exponent)
        np = self.backend.np
        if b.dtype.kind == "i" and b.size and bool((b.data < 0).any()):
            raise ValueError("power: x is an integer and the exponent is negative; convert x to a float type")
        wanted = (a.requires_grad, b.requires_grad)
        y = np.power(a.data, b.data)
        return self._record(y, (a, b), _power_backward, saved=(a.data, b.data, y if wanted[1] else None, wanted))

    def remainder(self, other: Any) -> T:
        """x - other floor(x / other), with the sign of `other`, like Python's and NumPy's %."""
        a, b = self._operands("remainder", other)
        y = self.backend.np.remainder(a.data, b.data)
        return self._record(y, (a, b), _remainder_backward, saved=(a.data, b.data))

    def logaddexp(self, other: Any) -> T:
        """log(e^x + e^other), computed without overflow."""
        a, b = self._float()._operands("logaddexp", other)
        y = self.backend.np.logaddexp(a.data, b.data)
        return self._record(y, (a, b), _logaddexp_backward, saved=(a.data, b.data))

    def arctan2(self, other: Any) -> T:
        """The angle between the point (other, x) and the first axis, in [-pi, pi]; the gradient at the origin is 0."""
        a, b = self._float()._operands("arctan2", other)
        y = self.backend.np.arctan2(a.data, b.data)
        return self._record(y, (a, b), _arctan2_backward, saved=(a.data, b.data))

    def hypot(self, other: Any) -> T:
        """sqrt(x^2 + other^2), computed without overflow."""
        a, b = self._float()._operands("hypot", other)
        y = self.backend.np.hypot(a.data, b.data)
        return self._record(y, (a, b), _hypot_backward, saved=(a.data, b.data, y))

    def lerp(self, end: Any, weight: Any) -> T:
        """x + weight (end - x)."""
        return self + (-self + end) * weight

    def where(self, condition: Any, other: Any) -> T:
        """x where `condition` is true, and `other` elsewhere, with broadcasting."""
        a, b = self._operands("where", other)
        chosen = self._mask("where", "condition", condition)
        _broadcast("where", chosen.shape, a.shape, b.shape)
        y = self.backend.np.where(chosen, a.data, b.data)
        return self._record(y, (a, b), _where_backward, saved=(chosen, a.shape, b.shape))

    def masked_fill(self, mask: Any, value: Any) -> T:
        """`value` where `mask` is true, and x elsewhere."""
        return self.where(~self._mask("masked_fill", "mask", mask), value)

    def clip(self, min: float | None = None, max: float | None = None) -> T:
        """x clamped to [min, max], each a number or None. The gradient is dy on the bounds, and 0 outside."""
        for name, bound in (("min", min), ("max", max)):
            if bound is not None and not isinstance(bound, int | float | numpy.number):
                raise TypeError(f"clip: {name} has type {type(bound).__name__}; expected a number, or use maximum()")
        low, high = -math.inf if min is None else float(min), math.inf if max is None else float(max)
        if self.dtype.kind in "iu" and all(math.isinf(bound) or bound.is_integer() for bound in (low, high)):
            low, high = (int(bound) if math.isfinite(bound) else None for bound in (low, high))  # type: ignore[assignment]
            return self._constant(self.data if low is high is None else self.backend.np.clip(self.data, low, high))
        return self._float()._map("clip", lambda np, x: np.clip(x, low, high), lambda np, x: (x >= low) & (x <= high))

    def _mask(self, op: str, name: str, values: Any) -> Any:
        """`values` as a boolean array of this tensor's backend."""
        array = values.data if isinstance(values, Methods) else self.backend.asarray(values)
        if array.dtype.kind != "b":
            raise TypeError(f"{op}: {name} has dtype {array.dtype}; expected booleans")
        return array

    # Reductions -------------------------------------------------------------------------------------------------------

    def min(self, axis: Axis = None, keepdims: bool = False) -> T:
        """The minimum over `axis`. Elements that tie for the minimum share the gradient equally."""
        return -(-self).max(axis, keepdims)

    def prod(self, axis: Axis = None, keepdims: bool = False) -> T:
        """The product over `axis` (one, several, or None for all). The gradient is also correct at zeros."""
        axes, x = axes_of("prod", axis, self.ndim), self._wide()
        y = self.backend.np.prod(x.data, axis=axes, keepdims=keepdims, dtype=x.dtype)
        return self._record(y, (x,), _prod_backward, saved=(x.data, axes))

    def _wide(self) -> Methods[T]:
        """This tensor, with integers and booleans converted to int64, for sums and products."""
        return self._constant(self.data.astype("int64")) if self.dtype.kind in "biu" else self

    def var(self, axis: Axis = None, keepdims: bool = False, ddof: float = 0, correction: float | None = None) -> T:
        """The sum of (x - mean)^2 over `axis`, divided by n - ddof. The default is that of NumPy; PyTorch's is 1, and
        it calls the argument `correction`."""
        axes, x = axes_of("var", axis, self.ndim), self._float()
        centered = x - x.mean(axes, keepdims=True)
        count = math.prod(self.shape[i] for i in axes) - (ddof if correction is None else correction)
        return centered.square().sum(axes, keepdims) * (1 / count if count > 0 else math.nan)

    def std(self, axis: Axis = None, keepdims: bool = False, ddof: float = 0, correction: float | None = None) -> T:
        """The square root of var(). The gradient is 0 where the result is 0."""
        return self.var(axis, keepdims, ddof, correction)._root()

    def norm(self, p: float = 2, axis: Axis = None, keepdims: bool = False) -> T:
        """(sum |x|^p)^(1/p) over `axis`, p >= 1, or max |x| for p = inf. The gradient is 0 where the result is 0."""
        if isinstance(p, bool) or not isinstance(p, int | float | numpy.number) or not p >= 1:
            raise ValueError(f"norm: p is {p!r}; expected a number of 1 or more (the axis is the second argument)")
        axes, x = axes_of("norm", axis, self.ndim), self._float()
        if p == 2:
            return x.square().sum(axes, keepdims)._root()
        size = x.abs()
        if p == 1 or math.isinf(p):
            return size.sum(axes, keepdims) if p == 1 else size.max(axes, keepdims)
        total = size.power(float(p)).sum(axes, keepdims)
        none = total.data == 0  # where the derivative of the root is infinite
        return total.masked_fill(none, 1.0).power(1 / float(p)).masked_fill(none, 0.0)

    def _root(self) -> T:
        """The square root, with gradient 0 at 0."""

        def slope(np: Any, y: Array) -> Array:
            return np.where(y == 0, _as(y, 0.0), 0.5 / np.where(y == 0, _as(y, 1.0), y))

        return self._map("sqrt", lambda np, x: np.sqrt(x), slope, of_result=True)

    def all(self, axis: Axis = None, keepdims: bool = False) -> T:
        """Whether all elements along `axis` are true. No gradient."""
        y = self.backend.np.all(self.data, axis=axes_of("all", axis, self.ndim), keepdims=keepdims)
        return self._constant(y)

    def any(self, axis: Axis = None, keepdims: bool = False) -> T:
        """Whether any element along `axis` is true. No gradient."""
        y = self.backend.np.any(self.data, axis=axes_of("any", axis, self.ndim), keepdims=keepdims)
        return self._constant(y)

    def argmax(self, axis: int | None = None, keepdims: bool = False) -> T:
        """The index of the first maximum along `axis`, or in the flattened tensor. No gradient."""
        return self._arg("argmax", axis, keepdims)

    def argmin(self, axis: int | None = None, keepdims: bool = False) -> T:
        """The index of the first minimum along `axis`, or in the flattened tensor. No gradient."""
        return self._arg("argmin", axis, keepdims)

    def _arg(self, op: str, axis: int | None, keepdims: bool) -> T:
        x = self.data.reshape(-1) if axis is None or self.ndim == 0 else self.data
        along = 0 if x.ndim == 1 else axis_of(op, axis, self.ndim)
        if axis is not None:
            axis_of(op, axis, self.ndim)
        _check(x.shape[along] > 0, f"{op}: shape {self.shape} has no element along the axis; expected at least one")
        y = getattr(self.backend.np, op)(x, axis=along)
        if keepdims or (axis is not None and self.ndim == 0):
            kept = (1,) * self.ndim if axis is None else tuple(1 if i == along else n for i, n in enumerate(self.shape))
            y = y.reshape(kept)
        return self._constant(y)

    def logsumexp(self, axis: Axis = None, keepdims: bool = False) -> T:
        """log(sum e^x) over `axis`. The largest element is subtracted first, to avoid overflow."""
        axes, x, np = axes_of("logsumexp", axis, self.ndim), self._float(), self.backend.np
        if not all(self.shape[i] for i in axes):
            return x.sum(axes, keepdims).log()
        largest = x.detach().max(axes, keepdims=True)
        largest = largest.masked_fill(np.isinf(largest.data), 0)  # since infinity minus infinity is NaN
        total = (x - largest).exp().sum(axes, keepdims).log()
        return total + largest.reshape(total.shape)

    def softmax(self, axis: int = -1) -> T:
        """e^x / (the sum of e^x) along `axis`. Saves the result."""
        last, inverse = self._to_last("softmax", axis)
        if not self.size:
            return inverse(last)
        y = self.backend.kernels.softmax_forward(last.data)
        return inverse(self._record(y, (last,), "softmax_backward", saved=(y,)))

    def log_softmax(self, axis: int = -1) -> T:
        """log(softmax(x)), computed as z - log(the sum of e^z) with z = x - max(x), to be accurate for any offset."""
        last, inverse = self._to_last("log_softmax", axis)
        if not self.size:
            return inverse(last)
        shifted = last - last.detach().max(-1, keepdims=True)
        return inverse(shifted - shifted.exp().sum(-1, keepdims=True).log())

    def _to_last(self, op: str, axis: int) -> tuple[T, Callable[[T], T]]:
        """Return the tensor with `axis` moved to the end, and a function that moves it back."""
        x, along = self._float(), axis_of(op, axis, self.ndim)
        if self.ndim == 0:
            return x.reshape(1), lambda y: y.reshape(())
        if along == self.ndim - 1:
            return x.reshape(self.shape) if x.dtype != self.dtype else x[...], lambda y: y
        return x.swapaxes(along, -1), lambda y: y.swapaxes(along, -1)

    def cumsum(self, axis: int | None = None) -> T:
        """The cumulative sum along `axis`, or of the flattened tensor."""
        if axis is None:
            return self.ravel().cumsum(0)
        along = axis_of("cumsum", axis, self.ndim)
        if self.ndim == 0:
            return self[...]
        x = self._wide()
        y = self.backend.np.cumsum(x.data, axis=along, dtype=x.dtype)
        return self._record(y, (x,), _cumsum_backward, saved=(along,))

    def diff(self, n: int = 1, axis: int = -1) -> T:
        """The n-th differences of consecutive elements along `axis`."""
        along = axis_of("diff", axis, self.ndim)
        _check(
            self.ndim > 0 and n >= 0, f"diff: the tensor has shape {self.shape}, n is {n}; expected an axis and n >= 0"
        )
        y, before = self[...], (slice(None),) * along
        for _ in range(n):
            y = y[(*before, slice(1, None))] - y[(*before, slice(-1))]
        return y

    def cumprod(self, axis: int | None = None) -> T:
        """The cumulative product along `axis`, or of the flattened tensor, in O(n^2) time."""
        if axis is None:
            return self.ravel().cumprod(0)
        along = axis_of("cumprod", axis, self.ndim)
        if self.ndim == 0 or self.shape[along] < 2:
            return self[...]
        before = (slice(None),) * along
        parts = [self[(*before, slice(i + 1))].prod(along, keepdims=True) for i in range(self.shape[along])]
        return concatenate(parts, along)

    def argsort(self, axis: int = -1, descending: bool = False) -> T:
        """The indices that sort the elements along `axis`. No gradient."""
        along = axis_of("argsort", axis, self.ndim)
        if self.ndim == 0:
            return self._constant(self.backend.zeros((), "int64"))
        order = self.backend.np.argsort(self.data, axis=along)
        return self._constant(self.backend.np.flip(order, along) if descending else order)

    def sort(self, axis: int = -1, descending: bool = False) -> Sorted[T]:
        """(values, indices): the elements sorted along `axis`, and their original positions, as in PyTorch."""
        order = self.argsort(axis, descending)
        return Sorted(self._gather(axis_of("sort", axis, self.ndim), order.data), order)

    def topk(self, k: int, axis: int = -1, largest: bool = True) -> Sorted[T]:
        """(values, indices) of the k largest (or smallest) elements along `axis`, sorted."""
        length = 1 if self.ndim == 0 else self.shape[axis_of("topk", axis, self.ndim)]
        _check(0 <= k <= length, f"topk: k is {k}; expected 0 <= k <= {length}, the length of axis {axis}")
        values, order = self.sort(axis, descending=largest)
        if self.ndim == 0:
            return Sorted(values, order)
        first = (*(slice(None),) * axis_of("topk", axis, self.ndim), slice(k))
        return Sorted(values[first], order[first])

    # Shapes -----------------------------------------------------------------------------------------------------------

    def squeeze(self, axis: Axis = None) -> T:
        """Remove the axes of length 1, or `axis` if its length is 1 (as in PyTorch)."""
        axes = axes_of("squeeze", axis, self.ndim)
        return self.reshape(tuple(n for i, n in enumerate(self.shape) if n != 1 or i not in axes))

    def unsqueeze(self, axis: int) -> T:
        """Insert an axis of length 1 at `axis`."""
        at = axis_of("unsqueeze", axis, self.ndim + 1)
        return self.reshape((*self.shape[:at], 1, *self.shape[at:]))

    def expand_dims(self, axis: int) -> T:
        """NumPy's name for unsqueeze."""
        return self.unsqueeze(axis)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> T:
        """Merge the axes start_dim ... end_dim into one."""
        first, last = axis_of("flatten", start_dim, self.ndim), axis_of("flatten", end_dim, self.ndim)
        _check(first <= last, f"flatten: start_dim is {start_dim} and end_dim {end_dim}; expected start_dim <= end_dim")
        return self.reshape((*self.shape[:first], math.prod(self.shape[first : last + 1]), *self.shape[last + 1 :]))

    def ravel(self) -> T:
        """Merge all axes into one."""
        return self.reshape((self.size,))

    def view(self, *shape: int | tuple[int, ...]) -> T:
        """PyTorch's name for reshape."""
        return self.reshape(*shape)

    def unflatten(self, axis: int, shape: tuple[int, ...]) -> T:
        """Divide `axis` into several axes with the lengths `shape`."""
        at = axis_of("unflatten", axis, self.ndim)
        return self.reshape((*self.shape[:at], *shape, *self.shape[at + 1 :]))

    def permute(self, *axes: int | tuple[int, ...]) -> T:
        """PyTorch's name for transpose with all axes given."""
        order: Any = axes[0] if len(axes) == 1 and isinstance(axes[0], tuple | list) else axes
        return self.transpose(tuple(order))

    def swapaxes(self, axis1: int, axis2: int) -> T:
        """Swap two axes."""
        order = list(range(self.ndim))
        i, j = axis_of("swapaxes", axis1, self.ndim), axis_of("swapaxes", axis2, self.ndim)
        if self.ndim:
            order[i], order[j] = j, i
        return self.transpose(tuple(order))

    def moveaxis(self, source: int, destination: int) -> T:
        """Move the axis `source` to `destination`; the others keep their order."""
        i, j = axis_of("moveaxis", source, self.ndim), axis_of("moveaxis", destination, self.ndim)
        order = [axis for axis in range(self.ndim) if axis != i]
        order.insert(j, i)
        return self.transpose(tuple(order[: self.ndim]))

    def flip(self, axis: Axis = None) -> T:
        """Reverse the elements along `axis` (one axis, several, or None for all)."""
        axes = axes_of("flip", axis, self.ndim)
        return self[tuple(slice(None, None, -1) if i in axes else slice(None) for i in range(self.ndim))]

    def roll(self, shift: int | tuple[int, ...], axis: Axis = None) -> T:
        """Shift the elements along `axis`; those past the end wrap around. axis None rolls the flattened tensor."""
        if axis is None:
            _check(isinstance(shift, int), f"roll: shift is {shift}; expected an integer if axis is None")
            return self.ravel().roll(shift, 0).reshape(self.shape) if self.size else self[...]
        axes = axes_of("roll", axis, self.ndim)
        shifts = (shift,) * len(axes) if isinstance(shift, int) else tuple(shift)
        _check(len(shifts) == len(axes), f"roll: {len(shifts)} shifts for {len(axes)} axes; expected one per axis")
        y = self[...]
        for along, by in zip(axes, shifts, strict=True):
            if n := self.shape[along]:
                before, cut = (slice(None),) * along, -by % n
                y = concatenate([y[(*before, slice(cut, None))], y[(*before, slice(cut))]], along)
        return y

    def broadcast_to(self, *shape: int | tuple[int, ...]) -> T:
        """Repeat x along axes of length 1 and along new leading axes. -1 keeps a length. Returns a read-only view."""
        wanted: Any = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        extra = len(wanted) - self.ndim
        lengths = tuple(self.shape[i - extra] if n == -1 and i >= extra else n for i, n in enumerate(wanted))
        fits = extra >= 0 and all(m in (1, n) for m, n in zip(self.shape, lengths[extra:], strict=True))
        _check(fits, f"broadcast_to: shape {self.shape} does not broadcast to {tuple(wanted)}")
        y = self.backend.np.broadcast_to(self.data, lengths)
        return self._record(y, (self,), _broadcast_to_backward, saved=(self.shape,))

    def expand(self, *shape: int | tuple[int, ...]) -> T:
        """PyTorch's name for broadcast_to."""
        return self.broadcast_to(*shape)

    def repeat(self, repeats: int | Sequence[int], axis: int | None = None) -> T:
        """Repeat each element along `axis`, or in the flattened tensor, as in NumPy. (PyTorch's repeat is `tile`.)"""
        if axis is None:
            return self.ravel().repeat(repeats, 0)
        x: Any = self.reshape(1) if self.ndim == 0 else self
        along = axis_of("repeat", axis, self.ndim)
        n = x.shape[along]
        counts = numpy.asarray(repeats)
        fits = counts.dtype.kind in "iu" and counts.shape in ((), (1,), (n,)) and (counts >= 0).all()
        _check(bool(fits), f"repeat: repeats is {repeats!r}; expected a count, or {n} counts, one per element")
        return x.take(numpy.repeat(numpy.arange(n), counts), along)

    def tile(self, *reps: int | tuple[int, ...]) -> T:
        """Repeat the tensor reps[i] times along axis i. Fewer reps than axes apply to the last axes."""
        given: Any = reps[0] if len(reps) == 1 and isinstance(reps[0], tuple | list) else reps
        ndim = max(len(given), self.ndim)
        counts = (1,) * (ndim - len(given)) + tuple(given)
        shape = (1,) * (ndim - self.ndim) + self.shape
        interleaved = self.reshape(tuple(m for n in shape for m in (1, n)))
        repeated = interleaved.broadcast_to(tuple(m for pair in zip(counts, shape, strict=True) for m in pair))
        return repeated.reshape(tuple(r * n for r, n in zip(counts, shape, strict=True)))

    def split(self, size: int | Sequence[int], axis: int = 0) -> tuple[T, ...]:
        """Split along `axis` into parts of length `size` (the last may be shorter), or of given lengths (PyTorch)."""
        along = axis_of("split", axis, self.ndim)
        n = self.shape[along] if self.ndim else 0
        _check(self.ndim > 0, "split: the tensor has shape (); expected an axis to split")
        if isinstance(size, int):
            _check(size > 0, f"split: size is {size}; expected 1 or more")
            size = [min(size, n - start) for start in range(0, n, size)] or [0]
        _check(
            sum(size) == n, f"split: the sizes {list(size)} sum to {sum(size)}; expected {n}, the length of axis {axis}"
        )
        ends = numpy.cumsum(size).tolist()
        return tuple(
            self[(*(slice(None),) * along, slice(end - length, end))] for end, length in zip(ends, size, strict=True)
        )

    def chunk(self, chunks: int, axis: int = 0) -> tuple[T, ...]:
        """Split along `axis` into at most `chunks` parts of equal length (the last may be shorter), as in PyTorch."""
        _check(chunks > 0, f"chunk: chunks is {chunks}; expected 1 or more")
        return self.split(max(1, -(-self.shape[axis_of("chunk", axis, self.ndim)] // chunks)) if self.ndim else 1, axis)

    def array_split(self, sections: int, axis: int = 0) -> tuple[T, ...]:
        """Split along `axis` into `sections` parts whose lengths differ by at most 1, longer ones first, like NumPy."""
        _check(sections > 0, f"array_split: sections is {sections}; expected 1 or more")
        along = axis_of("array_split", axis, self.ndim)
        each, longer = divmod(self.shape[along] if self.ndim else 0, sections)
        return self.split([each + (i < longer) for i in range(sections)], along)

    def pad(self, pad_width: Any, mode: str = "constant", constant_values: float = 0.0) -> T:
        """Add elements before and after each axis: pad_width is a count, (before, after), or one pair per axis.

        mode  "constant" (constant_values), or a mode of numpy.pad that copies elements: "edge", "reflect", "wrap", ...
        """
        try:
            widths = numpy.broadcast_to(numpy.asarray(pad_width, dtype=numpy.int64), (self.ndim, 2)).tolist()
        except (ValueError, TypeError):
            widths = [[-1, -1]]
        fits = all(n >= 0 for pair in widths for n in pair)
        _check(
            fits,
            f"pad: pad_width is {pad_width!r}; expected a count, or (before, after) for each of {self.ndim} axes",
        )
        if mode != "constant":
            y = self[...]
            for along, pair in enumerate(widths):
                y = y.take(_padded_indices(mode, self.shape[along], pair), along) if any(pair) else y
            return y
        inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, self.shape, strict=True))
        shape = tuple(n + sum(pair) for n, pair in zip(self.shape, widths, strict=True))
        y = self.backend.np.full(shape, constant_values, dtype=self.data.dtype)
        y[inner] = self.data
        return self._record(y, (self,), _pad_backward, saved=(inner,))

    # Elements ---------------------------------------------------------------------------------------------------------

    def take(self, indices: Any, axis: int | None = None) -> T:
        """x[..., indices, ...], with the indices (of any shape) at `axis`, or into the flattened tensor."""
        if axis is None:
            return self.ravel().take(indices, 0)
        along = axis_of("take", axis, self.ndim)
        _check(self.ndim > 0, "take: the tensor has shape (); expected an axis to take from")
        at = self._indices("take", indices, self.shape[along], negative=True)
        return self[(*(slice(None),) * along, at)]

    def gather(self, axis: int, index: Any) -> T:
        """y[i][j][k] = x[i][index[i][j][k]][k] for axis 1, and so on. y has the shape of index, as in PyTorch."""
        along = axis_of("gather", axis, self.ndim)
        at = self._indices("gather", index, self.shape[along] if self.ndim else 1)
        fits = at.ndim == self.ndim and all(
            i == along or m <= n for i, (m, n) in enumerate(zip(at.shape, self.shape, strict=True))
        )
        _check(fits, f"gather: index has shape {at.shape}; expected at most {self.shape}, except along axis {axis}")
        return self._gather(along, at)

    def _gather(self, axis: int, at: Any) -> T:
        """gather() for indices that are on this device and known to be in range."""
        if not self.ndim:
            return self[...]
        np, shape = self.backend.np, (1,) * self.ndim
        places = [np.arange(n, dtype="int64").reshape((*shape[:i], n, *shape[i + 1 :])) for i, n in enumerate(at.shape)]
        return self[(*places[:axis], at, *places[axis + 1 :])]

    def _indices(self, op: str, indices: Any, length: int, negative: bool = False) -> Any:
        """Convert `indices` to an int64 array of this tensor's backend. Raises IndexError if one is not in [0, length).

        negative  also allow -length to -1, which count from the end.
        """
        values = indices.data if isinstance(indices, Methods) else numpy.asarray(indices)
        if values.dtype.kind not in "iu" and values.size:
            raise TypeError(f"{op}: the indices have dtype {values.dtype}; expected integers")
        host = backend_of(values).to_host(values).astype(numpy.int64)
        lowest = -length if negative else 0
        if host.size and not lowest <= host.min() <= host.max() < length:
            worst = host.min() if host.min() < lowest else host.max()
            raise IndexError(f"{op}: index {worst} is out of range; expected integers in [{lowest}, {length})")
        return self.backend.upload(numpy.where(host < 0, host + length, host))

    def diagonal(self, offset: int = 0, axis1: int = 0, axis2: int = 1) -> T:
        """The elements x[i, i + offset] of two axes, as the last axis of the result."""
        i, j = axis_of("diagonal", axis1, self.ndim), axis_of("diagonal", axis2, self.ndim)
        _check(self.ndim > 1 and i != j, f"diagonal: axes {axis1} and {axis2} of shape {self.shape}; expected two axes")
        x = self.transpose((*(axis for axis in range(self.ndim) if axis not in (i, j)), i, j))
        rows = numpy.arange(max(0, -offset), max(min(x.shape[-2], x.shape[-1] - offset), max(0, -offset)))
        return x[(..., self.backend.upload(rows), self.backend.upload(rows + offset))]

    def diag(self, offset: int = 0) -> T:
        """The diagonal of a matrix, or a matrix with a vector on its diagonal."""
        _check(self.ndim in (1, 2), f"diag: the tensor has shape {self.shape}; expected a vector or a matrix")
        if self.ndim == 2:
            return self.diagonal(offset)
        n = self.size
        square = (
            (self.reshape(n, 1) * 0).broadcast_to(n, n).where(~self.backend.np.eye(n, dtype=bool), self.reshape(n, 1))
        )
        return square.pad(((max(0, -offset), max(0, offset)), (max(0, offset), max(0, -offset))))

    def trace(self, offset: int = 0) -> T:
        """The sum of the diagonal of the first two axes."""
        return self.diagonal(offset).sum(-1)

    def tril(self, k: int = 0) -> T:
        """The lower triangle of the last two axes: elements above diagonal k are set to 0."""
        return self._triangle("tril", k, lower=True)

    def triu(self, k: int = 0) -> T:
        """The upper triangle of the last two axes: elements below diagonal k are set to 0."""
        return self._triangle("triu", k - 1, lower=False)

    def _triangle(self, op: str, k: int, lower: bool) -> T:
        _check(self.ndim > 1, f"{op}: the tensor has shape {self.shape}; expected two axes or more")
        below = self.backend.np.tri(self.shape[-2], self.shape[-1], k, dtype=bool)
        return self.where(below if lower else ~below, 0)

    # Products ---------------------------------------------------------------------------------------------------------

    def tensordot(self, other: Any, axes: int | tuple[Any, Any] = 2) -> T:
        """The sum of products over pairs of axes. `axes` is n, for the last n axes of x and the first n of `other`, or
        a tuple (axes of x, axes of other)."""
        a, b = self._operands("tensordot", other, broadcast=False)
        pairs: Any = (range(a.ndim - axes, a.ndim), range(axes)) if isinstance(axes, int) else axes
        first, second = (
            axes_of("tensordot", tuple(p) if isinstance(p, Sequence | range) else p, t.ndim)
            for p, t in zip(pairs, (a, b), strict=True)
        )
        lengths = [a.shape[i] for i in first], [b.shape[i] for i in second]
        _check(
            lengths[0] == lengths[1],
            f"tensordot: the axes have lengths {lengths[0]} and {lengths[1]}; expected equal lengths",
        )
        free_a = [i for i in range(a.ndim) if i not in first]
        free_b = [i for i in range(b.ndim) if i not in second]
        count = math.prod(lengths[0])
        rows, columns = [a.shape[i] for i in free_a], [b.shape[i] for i in free_b]
        left = a.transpose((*free_a, *first)).reshape((math.prod(rows), count))
        right = b.transpose((*second, *free_b)).reshape((count, math.prod(columns)))
        return (left @ right).reshape((*rows, *columns))

    def dot(self, other: Any) -> T:
        """NumPy's dot: the sum of products over the last axis of x and the second-to-last (or only) axis of `other`."""
        a, b = self._operands("dot", other, broadcast=False)
        if a.ndim == 0 or b.ndim == 0:
            return a * b
        return a.tensordot(b, ((a.ndim - 1,), (max(0, b.ndim - 2),)))

    def inner(self, other: Any) -> T:
        """The sum of products over the last axes of both tensors."""
        a, b = self._operands("inner", other, broadcast=False)
        return a * b if a.ndim == 0 or b.ndim == 0 else a.tensordot(b, ((a.ndim - 1,), (b.ndim - 1,)))

    def outer(self, other: Any) -> T:
        """The products x_i other_j of the flattened operands."""
        a, b = self._operands("outer", other, broadcast=False)
        return a.reshape(a.size, 1) * b.reshape(1, b.size)


class Sorted(NamedTuple, Generic[T]):
    """The result of sort() and topk()."""

    values: T
    indices: T


def concatenate(tensors: Sequence[T], axis: int = 0) -> T:
    """Join tensors of the same dtype along `axis`. Their shapes must be equal except along `axis`."""
    first = tensors[0]
    along = axis_of("concatenate", axis, first.ndim)
    for i, x in enumerate(tensors):
        if x.ndim == 0 or x.ndim != first.ndim or _without(x.shape, along) != _without(first.shape, along):
            expected = f"{first.shape}, except along axis {axis}" if first.ndim else "one axis or more"
            raise ValueError(f"concatenate: tensor {i} has shape {x.shape}; expected {expected}")
    ends = numpy.cumsum([x.shape[along] for x in tensors]).tolist()
    places = tuple((*(slice(None),) * along, slice(start, end)) for start, end in zip([0, *ends], ends, strict=False))
    y = first.backend.np.concatenate([x.data for x in tensors], axis=along)
    return first._record(y, tuple(tensors), _concatenate_backward, saved=places)


def axis_of(op: str, axis: Any, ndim: int) -> int:
    """Convert `axis` to a nonnegative axis. If ndim is 0, 0 and -1 are allowed and give 0, as in PyTorch."""
    axes = axes_of(op, (axis,), ndim)
    return axes[0] if axes else 0


def _check(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


def _broadcast(op: str, *shapes: tuple[int, ...]) -> None:
    try:
        numpy.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(f"{op}: shapes {' and '.join(map(str, shapes))} do not broadcast") from None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _as(x: Array, value: float) -> Any:
    """A scalar of x's dtype. (np.where with Python floats would give float64.)"""
    return x.dtype.type(value)


def _padded_indices(mode: str, n: int, pair: list[int]) -> numpy.ndarray:
    try:
        return numpy.pad(numpy.arange(n), pair, mode=mode)  # type: ignore[call-overload]  # (any mode that copies)
    except ValueError as error:
        raise ValueError(f"pad: mode {mode!r}, {pair} elements at an axis of length {n}: {error}") from None


# Backward functions: see `record` in tensor.py ------------------------------------------------------------------------


class Slope:
    """The backward function of the elementwise operation `name`: dx = dy slope(np, x), or 0 without a slope."""

    __slots__ = ("__name__", "slope")

    def __init__(self, name: str, slope: Function | None):
        self.__name__ = name
        self.slope = slope

    def __call__(self, saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
        (of,) = saved
        np = backend_of(of).np
        return (np.zeros_like(of) if self.slope is None else dy * self.slope(np, of),)


def _maximum_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    """The larger operand gets dy. Equal operands get half each; if one is NaN, both get dy (as in PyTorch)."""
    a, b = saved
    np, unbroadcast = backend_of(dy).np, backend_of(dy).kernels.unbroadcast
    shared = np.where(a == b, dy / 2, dy)
    return unbroadcast(np.where(a < b, 0, shared), a.shape), unbroadcast(np.where(a > b, 0, shared), b.shape)


def _minimum_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    a, b = saved
    return _maximum_backward((-a, -b), dy, into)  # min(a, b) = -max(-a, -b)


def _where_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    chosen, a_shape, b_shape = saved
    np, unbroadcast = backend_of(dy).np, backend_of(dy).kernels.unbroadcast
    return unbroadcast(np.where(chosen, dy, 0), a_shape), unbroadcast(np.where(chosen, 0, dy), b_shape)


def _cumsum_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    """x_j is a term of y_i for every i >= j, so dx_j is the sum of these dy_i: a cumulative sum from the end."""
    (axis,) = saved
    np = backend_of(dy).np
    return (np.flip(np.cumsum(np.flip(dy, axis), axis=axis), axis),)


def _power_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    """The power rule for a. For b: y = e^(b ln a), so the derivative with respect to b is y ln a."""
    a, b, y, (base_wanted, exponent_wanted) = saved
    np, unbroadcast = backend_of(dy).np, backend_of(dy).kernels.unbroadcast
    da = db = None
    if base_wanted:
        constant = b == 0
        slope = np.where(constant, _as(b, 0.0), b * np.power(a, np.where(constant, b, b - 1)))
        da = unbroadcast(dy * slope, a.shape)
    if exponent_wanted:
        constant = (a == 0) & (b >= 0)
        db = unbroadcast(dy * np.where(constant, _as(b, 0.0), y * np.log(np.where(constant, _as(a, 1.0), a))), b.shape)
    return da, db


def _remainder_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    a, b = saved
    np, unbroadcast = backend_of(dy).np, backend_of(dy).kernels.unbroadcast
    return unbroadcast(dy, a.shape), unbroadcast(-dy * np.floor_divide(a, b), b.shape)


def _logaddexp_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    """The derivatives are e^a / (e^a + e^b) = 1 / (1 + e^(b - a)) and 1 / (1 + e^(a - b))."""
    a, b = saved
    np, unbroadcast = backend_of(dy).np, backend_of(dy).kernels.unbroadcast
    e = np.exp(-np.abs(a - b))
    larger, smaller = 1 / (1 + e), e / (1 + e)
    da, db = dy * np.where(a >= b, larger, smaller), dy * np.where(a >= b, smaller, larger)
    return unbroadcast(da, a.shape), unbroadcast(db, b.shape)


def _arctan2_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    a, b = saved
    np, unbroadcast = backend_of(dy).np, backend_of(dy).kernels.unbroadcast
    square = a * a + b * b
    g = np.where(square == 0, _as(square, 0.0), dy / np.where(square == 0, _as(square, 1.0), square))
    return unbroadcast(g * b, a.shape), unbroadcast(-g * a, b.shape)


def _hypot_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    a, b, y = saved
    unbroadcast = backend_of(dy).kernels.unbroadcast
    return unbroadcast(dy * (a / y), a.shape), unbroadcast(dy * (b / y), b.shape)


def _prod_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    """dx_j = dy times the product of all elements before and after x_j. This needs no division."""
    x, axes = saved
    np = backend_of(dy).np
    kept = [i for i in range(x.ndim) if i not in axes]
    order = (*kept, *axes)
    moved = x.transpose(order)
    rows = moved.reshape((*moved.shape[: len(kept)], math.prod(moved.shape[len(kept) :])))
    ones = np.ones((*rows.shape[:-1], 1), dtype=x.dtype)
    before = np.cumprod(np.concatenate([ones, rows[..., :-1]], axis=-1), axis=-1)
    after = np.cumprod(np.concatenate([ones, rows[..., :0:-1]], axis=-1), axis=-1)[..., ::-1]
    if not rows.shape[-1]:
        return (np.zeros_like(x),)
    dx = (dy.reshape(rows.shape[:-1])[..., None] * before * after).reshape(moved.shape)
    return (dx.transpose(tuple(order.index(i) for i in range(x.ndim))),)


def _broadcast_to_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    (shape,) = saved
    return (backend_of(dy).kernels.unbroadcast(dy, shape),)


def _pad_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    (inner,) = saved
    return (dy[inner],)


def _concatenate_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    return tuple(dy[place] for place in saved)
