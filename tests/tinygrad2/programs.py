"""Random programs, computed with this project, NumPy and PyTorch in float64.

A program has a few leaves of any shape, and operations on earlier results, so that results are used several times,
directly and through views. A function draw(choices) makes the random choices. It can use hypothesis, which shrinks
failing programs, or a random number generator, which is faster.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad2 import Tensor, functional

Draw = Callable[[Sequence[Any]], Any]  # returns one of the choices
LENGTHS = (1, 2, 3, 0)
LARGE = 1e3  # larger values are reduced by tanh, so that programs do not lose precision


class Operation(NamedTuple):
    """An operation: ours(x..., *drawn), theirs(torch, x..., *drawn), and in_numpy(x..., *drawn), or None.

    draws  draws(draw, x...) -> the other arguments, or None if the operation does not support these operands.
    """

    name: str
    count: int
    draws: Callable[..., tuple[Any, ...] | None]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    in_numpy: Callable[..., Any] | None = None


def _nothing(draw: Draw, *x: np.ndarray) -> tuple[Any, ...]:
    return ()


def _axis(draw: Draw, x: np.ndarray) -> tuple[Any, ...] | None:
    return (draw(range(-x.ndim, x.ndim)),) if x.ndim else None


def _nonempty_axis(draw: Draw, x: np.ndarray) -> tuple[Any, ...] | None:
    axes = [i for i in range(-x.ndim, x.ndim) if x.shape[i]]
    return (draw(axes),) if axes else None


def _axes(draw: Draw, x: np.ndarray) -> tuple[Any, ...]:
    """Some or all axes in any order, and keepdims."""
    chosen = tuple(i for i in range(x.ndim) if draw((True, False)))
    return (chosen or tuple(range(x.ndim)))[:: draw((1, -1))], draw((False, True))


def _nonempty_axes(draw: Draw, x: np.ndarray) -> tuple[Any, ...] | None:
    axes, keepdims = _axes(draw, x)
    return (axes, keepdims) if all(x.shape[i] for i in axes) and axes else None


def _number(draw: Draw, x: np.ndarray) -> tuple[Any, ...]:
    return (draw((2.0, -0.5, 3, 0, 0.25)),)


def _broadcastable(draw: Draw, *x: np.ndarray) -> tuple[Any, ...] | None:
    try:
        np.broadcast_shapes(*(a.shape for a in x))
    except ValueError:
        return None
    return ()


def _mask_of_both(draw: Draw, a: np.ndarray, b: np.ndarray) -> tuple[Any, ...] | None:
    if _broadcastable(draw, a, b) is None:
        return None
    shape = draw((np.broadcast_shapes(a.shape, b.shape), a.shape, ()))
    return (_mask(draw, shape),)


def _mask(draw: Draw, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.random.default_rng(draw(range(8))).random(shape) < 0.5)


def _matrices(draw: Draw, a: np.ndarray, b: np.ndarray) -> tuple[Any, ...] | None:
    try:
        np.matmul(a, b)
    except ValueError:
        return None
    return ()


def _same_but_one(draw: Draw, a: np.ndarray, b: np.ndarray) -> tuple[Any, ...] | None:
    if not a.ndim or a.ndim != b.ndim:
        return None
    axes = [
        i for i in range(a.ndim) if all(m == n for j, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if j != i)
    ]
    return (draw(axes) - draw((0, a.ndim)),) if axes else None


def _same_shape(draw: Draw, a: np.ndarray, b: np.ndarray) -> tuple[Any, ...] | None:
    return (draw(range(-a.ndim - 1, a.ndim + 1)),) if a.shape == b.shape else None


def _order(draw: Draw, x: np.ndarray) -> tuple[Any, ...]:
    rest, order = list(range(x.ndim)), []
    while rest:
        order.append(rest.pop(draw(range(len(rest)))))
    return (tuple(order),)


def _new_shape(draw: Draw, x: np.ndarray) -> tuple[Any, ...]:
    """Another shape with the same number of elements: with a new axis of length 1, with two axes merged, or flat."""
    shape = list(x.shape)
    if draw((True, False)):
        shape.insert(draw(range(len(shape) + 1)), 1)
    elif len(shape) > 1:
        i = draw(range(len(shape) - 1))
        shape[i : i + 2] = [shape[i] * shape[i + 1]]
    else:
        shape = [x.size]
    return (tuple(shape),)


def _broadcast_shape(draw: Draw, x: np.ndarray) -> tuple[Any, ...]:
    leading = (draw((2, 1, 0)),) * draw((0, 1))
    return ((*leading, *(draw((3, 1)) if n == 1 else n for n in x.shape)),)


def _index(draw: Draw, x: np.ndarray) -> tuple[Any, ...]:
    """Any kind of index that PyTorch supports: without negative steps, and with arrays instead of lists."""
    if draw((False, False, True)):
        return (_mask(draw, x.shape[: draw(range(x.ndim + 1))]),)
    items: list[Any] = []
    arrays = draw(((), (2,), (2, 1), ()))
    for n in x.shape[: draw(range(x.ndim + 1))]:
        kind = draw(("slice", "integer", "array", "all"))
        if kind == "integer" and n:
            items.append(draw(range(-n, n)))
        elif kind == "array" and n:
            items.append(np.random.default_rng(draw(range(8))).integers(-n, n, arrays))
        elif kind == "slice":
            items.append(slice(draw((None, 1, -2, 5)), draw((None, 2, -1)), draw((None, 2))))
        else:
            items.append(slice(None))
    if draw((False, True)):
        items.insert(draw(range(len(items) + 1)), None)
    if draw((False, True)):
        items.append(Ellipsis)
    return (tuple(items),)


def _gather_indices(draw: Draw, x: np.ndarray) -> tuple[Any, ...] | None:
    axes = [i for i in range(x.ndim) if x.shape[i]]
    if not axes:
        return None
    axis = draw(axes)
    shape = tuple(draw((2, 1, 4)) if i == axis else n for i, n in enumerate(x.shape))
    return axis, np.random.default_rng(draw(range(8))).integers(x.shape[axis], size=shape)


def _for_torch(t: Any, index: Any) -> Any:
    """Convert an index for PyTorch.

    PyTorch applies an integer before the arrays of the index. NumPy treats it as one of these arrays, which gives a
    different order of axes for x[0, :, [1, 2]]. Both libraries treat an array of one element in the same way.
    """
    if isinstance(index, tuple):
        if any(isinstance(i, np.ndarray) and i.ndim for i in index):
            index = tuple(np.array([i]) if isinstance(i, int) else i for i in index)
        return tuple(_for_torch(t, i) for i in index)
    return t.as_tensor(index) if isinstance(index, np.ndarray) else index


def _elementwise() -> list[Operation]:
    names = (
        "abs sign square exp expm1 sin cos tanh arctan arcsinh sigmoid softplus relu silu mish elu celu leaky_relu "
        "relu6 softsign logsigmoid hardtanh erf floor trunc"
    )
    of_numpy = ("abs", "sign", "square", "exp", "expm1", "sin", "cos", "tanh", "arctan", "arcsinh", "floor", "trunc")
    rows = []
    for name in names.split():

        def theirs(t: Any, x: Any, name: str = name) -> Any:
            return (getattr(t, name, None) or getattr(t.nn.functional, name))(x)

        in_numpy = getattr(np, name) if name in of_numpy else None
        rows.append(Operation(name, 1, _nothing, getattr(functional, name), theirs, in_numpy))
    return rows


def _same(name: str, count: int, draws: Any, function: Callable[..., Any], of_numpy: bool = True) -> Operation:
    """An operation with the same code for all three libraries."""
    return Operation(name, count, draws, function, lambda t, *a: function(*a), function if of_numpy else None)


def _reduction(name: str, torch_name: str, draws: Any = _axes, **options: Any) -> Operation:
    def theirs(t: Any, x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
        return getattr(x, torch_name)(axes, keepdim=keepdims, **options) if x.ndim else _zero_d(x, torch_name, options)

    return Operation(
        name,
        1,
        draws,
        lambda x, axes, keepdims: getattr(x, name)(axes, keepdims),
        theirs,
        lambda x, axes, keepdims: getattr(np, name)(x, axis=axes, keepdims=keepdims),
    )


def _zero_d(x: Any, name: str, options: dict[str, Any]) -> Any:
    return getattr(x.reshape(1), name)(0, **options)


OPERATIONS = [
    *_elementwise(),
    _same("+ number", 1, _number, lambda x, c: x + c),
    _same("number -", 1, _number, lambda x, c: c - x),
    _same("* number", 1, _number, lambda x, c: c * x),
    _same("** 2", 1, _nothing, lambda x: x**2),
    _same("** 3", 1, _nothing, lambda x: x**3),
    _same("/ (x^2 + 1)", 1, _nothing, lambda x: x / (x * x + 1.0)),
    _same("sqrt, of positive", 1, _nothing, lambda x: (x * x + 0.5) ** 0.5),
    _same("+", 2, _broadcastable, lambda a, b: a + b),
    _same("-", 2, _broadcastable, lambda a, b: a - b),
    _same("*", 2, _broadcastable, lambda a, b: a * b),
    _same("/", 2, _broadcastable, lambda a, b: a / (b * b + 1.0)),
    _same("tensor ** tensor", 2, _broadcastable, lambda a, b: (a * a + 0.5) ** b),
    _same("* comparison", 2, _broadcastable, lambda a, b: a * (a > b)),
    _same("@", 2, _matrices, lambda a, b: a @ b),
    Operation("maximum", 2, _broadcastable, lambda a, b: a.maximum(b), lambda t, a, b: t.maximum(a, b), np.maximum),
    Operation("minimum", 2, _broadcastable, lambda a, b: a.minimum(b), lambda t, a, b: t.minimum(a, b), np.minimum),
    Operation(
        "logaddexp", 2, _broadcastable, lambda a, b: a.logaddexp(b), lambda t, a, b: t.logaddexp(a, b), np.logaddexp
    ),
    Operation(
        "where",
        2,
        _mask_of_both,
        lambda a, b, m: a.where(m, b),
        lambda t, a, b, m: t.where(t.as_tensor(m), a, b),
        lambda a, b, m: np.where(m, a, b),
    ),
    Operation("clip", 1, _nothing, lambda x: x.clip(-1, 0.5), lambda t, x: x.clip(-1, 0.5), lambda x: x.clip(-1, 0.5)),
    _reduction("sum", "sum"),
    _reduction("mean", "mean", _nonempty_axes),
    _reduction("max", "amax", _nonempty_axes),
    _reduction("min", "amin", _nonempty_axes),
    _reduction("var", "var", _nonempty_axes, correction=0),
    Operation("prod", 1, _axis, lambda x, i: x.prod(i), lambda t, x, i: x.prod(i), lambda x, i: x.prod(i)),
    Operation("cumsum", 1, _axis, lambda x, i: x.cumsum(i), lambda t, x, i: x.cumsum(i), lambda x, i: x.cumsum(i)),
    Operation("cumprod", 1, _axis, lambda x, i: x.cumprod(i), lambda t, x, i: x.cumprod(i), np.cumprod),
    Operation("softmax", 1, _axis, lambda x, i: x.softmax(i), lambda t, x, i: x.softmax(i)),
    Operation("log_softmax", 1, _axis, lambda x, i: x.log_softmax(i), lambda t, x, i: x.log_softmax(i)),
    Operation("logsumexp", 1, _nonempty_axis, lambda x, i: x.logsumexp(i), lambda t, x, i: x.logsumexp(i)),
    Operation(
        "transpose", 1, _order, lambda x, o: x.transpose(o), lambda t, x, o: x.permute(o), lambda x, o: x.transpose(o)
    ),
    _same("reshape", 1, _new_shape, lambda x, shape: x.reshape(shape)),
    Operation(
        "broadcast_to",
        1,
        _broadcast_shape,
        lambda x, s: x.broadcast_to(s),
        lambda t, x, s: x.broadcast_to(s),
        lambda x, s: np.broadcast_to(x, s),
    ),
    Operation("squeeze", 1, _nothing, lambda x: x.squeeze(), lambda t, x: x.squeeze(), lambda x: x.squeeze()),
    Operation("flip", 1, _axis, lambda x, i: x.flip(i), lambda t, x, i: x.flip(i), np.flip),
    Operation("roll", 1, _axis, lambda x, i: x.roll(2, i), lambda t, x, i: x.roll(2, i), lambda x, i: np.roll(x, 2, i)),
    Operation(
        "repeat",
        1,
        _axis,
        lambda x, i: x.repeat(2, i),
        lambda t, x, i: x.repeat_interleave(2, i),
        lambda x, i: x.repeat(2, i),
    ),
    Operation("[]", 1, _index, lambda x, i: x[i], lambda t, x, i: x[_for_torch(t, i)], lambda x, i: x[i]),
    Operation(
        "gather",
        1,
        _gather_indices,
        lambda x, i, at: x.gather(i, at),
        lambda t, x, i, at: x.gather(i, t.as_tensor(at)),
        lambda x, i, at: np.take_along_axis(x, at, i),
    ),
    Operation(
        "concatenate",
        2,
        _same_but_one,
        lambda a, b, i: functional.concatenate([a, b], i),
        lambda t, a, b, i: t.cat([a, b], i),
        lambda a, b, i: np.concatenate([a, b], i),
    ),
    Operation(
        "stack",
        2,
        _same_shape,
        lambda a, b, i: functional.stack([a, b], i),
        lambda t, a, b, i: t.stack([a, b], i),
        lambda a, b, i: np.stack([a, b], i),
    ),
]


class Step(NamedTuple):
    operation: Operation
    operands: tuple[int, ...]  # numbers of leaves and earlier results
    drawn: tuple[Any, ...]
    bounded: bool  # whether tanh is applied to the result


class Program(NamedTuple):
    leaves: list[np.ndarray]
    steps: list[Step]

    def __repr__(self) -> str:
        lines = [
            f"x{i} = {np.array2string(x, separator=', ')}  # {x.dtype} {x.shape}" for i, x in enumerate(self.leaves)
        ]
        for i, (operation, operands, drawn, bounded) in enumerate(self.steps, len(self.leaves)):
            given = ", ".join([*(f"x{j}" for j in operands), *map(repr, drawn)])
            lines.append(f"x{i} = {'tanh of ' * bounded}{operation.name}({given})")
        return "\n".join(lines)


def draw_program(draw: Draw) -> Program:
    """Up to 3 leaves and 8 operations. Values come from a seed: continuous, or small integers for ties and zeros."""
    leaves = []
    for _ in range(draw((2, 1, 3))):
        shape = tuple(draw(LENGTHS) for _ in range(draw((2, 1, 3, 0))))
        generator, kind = np.random.default_rng(draw(range(64))), draw(("float", "float", "integral", "int64", "bool"))
        values = generator.normal(size=shape) if kind == "float" else generator.integers(-2, 3, shape)
        leaves.append(np.asarray(values, dtype=kind if kind in ("int64", "bool") else np.float64))
    if all(x.dtype != np.float64 for x in leaves):
        leaves[0] = leaves[0].astype(np.float64)
    values = [x.astype(np.float64) for x in leaves]  # as they are used; see `failure`
    steps: list[Step] = []
    for _ in range(draw(range(1, 9))):
        operation = draw(OPERATIONS)
        operands = tuple(draw(range(len(values))) for _ in range(operation.count))
        x = [values[i] for i in operands]
        drawn = operation.draws(draw, *x)
        if drawn is None:
            continue
        y = operation.ours(*(Tensor(a) for a in x), *drawn).numpy()
        bounded = bool((np.abs(y) > LARGE).any())
        values.append(np.tanh(y) if bounded else y)
        steps.append(Step(operation, operands, drawn, bounded))
    return Program(leaves, steps)


def run(program: Program, leaves: Sequence[Any], apply: Callable[..., Any]) -> list[Any]:
    """The leaves, and the result of every step."""
    values = list(leaves)
    for operation, operands, drawn, bounded in program.steps:
        y = apply(operation, *(values[i] for i in operands), *drawn)
        values.append(y.tanh() if bounded else y)
    return values


def failure(program: Program, torch: Any | None) -> str | None:
    """A description of the first wrong value (or gradient, if PyTorch is given) of this project, or None.

    Integers and booleans are multiplied by 1.0, which promotes them to floats.
    """
    leaves = [Tensor(x, requires_grad=True) if x.dtype == np.float64 else Tensor(x) for x in program.leaves]
    inputs = [x if x.requires_grad else x * np.float64(1) for x in leaves]
    values = run(program, inputs, lambda operation, *given: operation.ours(*given))
    names = [f"x{i}" for i in range(len(leaves))] + [step.operation.name for step in program.steps]
    for step, y in zip(program.steps, values[len(leaves) :], strict=True):
        if step.operation.in_numpy is not None:
            given = [values[i].numpy() for i in step.operands]
            expected = np.asarray(step.operation.in_numpy(*given, *step.drawn))
            if reason := difference(y.numpy(), np.tanh(expected) if step.bounded else expected):
                return f"{step.operation.name}, compared with NumPy: {reason}"
    if torch is None:
        return None
    theirs = [torch.tensor(x.data, requires_grad=x.requires_grad) for x in leaves]
    promoted = [x if x.requires_grad else x.double() for x in theirs]
    others = run(program, promoted, lambda operation, *given: operation.theirs(torch, *given))
    for name, y, z in zip(names, values, others, strict=True):
        if reason := difference(y.numpy(), z.detach().numpy()):
            return f"{name}, compared with PyTorch: {reason}"
    weights = [np.linspace(0.5, 1.5, y.size).reshape(y.shape) for y in values]
    functools.reduce(operator.add, [(y * w).sum() for y, w in zip(values, weights, strict=True)]).backward()
    torch.stack([(z * torch.as_tensor(w)).sum() for z, w in zip(others, weights, strict=True)]).sum().backward()
    for i, (x, z) in enumerate(zip(leaves, theirs, strict=True)):
        if x.requires_grad and (reason := difference(x.grad, z.grad.numpy())):
            return f"gradient of x{i}: {reason}"
    return None


def difference(got: np.ndarray, expected: np.ndarray) -> str | None:
    """How two arrays differ (in shape, in dtype, or by more than rounding errors), or None if they agree."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {got.shape}; expected {expected.dtype} {expected.shape}"
    scale = max(1.0, np.nanmax(np.abs(expected), initial=0.0))
    if not np.allclose(got, expected, rtol=1e-9, atol=1e-11 * scale, equal_nan=True):
        return f"{got.tolist()}; expected {expected.tolist()}"
    return None


def from_generator(generator: np.random.Generator) -> Draw:
    """A function draw(choices) that uses a random number generator."""
    return lambda choices: choices[int(generator.integers(len(choices)))]
