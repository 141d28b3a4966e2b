"""NumPy functions on Tensors: values as in NumPy, gradients compared with finite differences, and arguments."""

import inspect
import itertools

import numpy as np
import pytest

from tinygrad2 import Tensor, numpy_functions, protocols

R = np.random.default_rng(0)
MASK, PLACES = np.array([True, False, True]), np.array([[0, 1], [2, -1]])

SAME_ARGUMENTS = """
    positive real conjugate real_if_close copy fabs deg2rad rad2deg cbrt sinc fix nan_to_num abs exp2 log1p
    arcsin square ravel matrix_transpose flipud fliplr rot90 atleast_1d atleast_2d atleast_3d transpose squeeze
    sort unstack average ptp median nansum nanprod nanmax nanmin nanmean nanvar nanstd ediff1d gradient
    trapezoid cumsum cumprod diff diagonal trace tril triu sum mean prod var std max min zeros_like ones_like
    count_nonzero argmax isnan
"""
OPERATORS = """
    fmax fmin logaddexp2 float_power copysign arctan2 hypot add power maximum
"""
OF_ONE = {  # called with a matrix (2, 3) with elements between 0.1 and 0.9
    **{name: getattr(np, name) for name in SAME_ARGUMENTS.split()},
    "reshape": lambda x: np.reshape(x, (3, -1)),
    "reshape, order": lambda x: np.reshape(x, (3, 2), order="F"),
    "ravel, order": lambda x: np.ravel(x, order="F"),
    "expand_dims, axes": lambda x: np.expand_dims(x, (0, -1)),
    "rollaxis": lambda x: np.rollaxis(x, 1),
    "rollaxis, start": lambda x: np.rollaxis(x, 0, 2),
    "rot90, k": lambda x: np.rot90(x, k=3, axes=(1, 0)),
    "sort, axis": lambda x: np.sort(x, axis=0),
    "sort, flattened": lambda x: np.sort(x, axis=None),
    "split": lambda x: np.split(x, 3, axis=1),
    "split, bounds": lambda x: np.split(x, [1, 1, 2], 1),
    "array_split": lambda x: np.array_split(x, 2, axis=-1),
    "hsplit": lambda x: np.hsplit(x, 3),
    "vsplit": lambda x: np.vsplit(x, 2),
    "dsplit": lambda x: np.dsplit(x[None], [1]),
    "take_along_axis": lambda x: np.take_along_axis(x, PLACES, axis=1),
    "compress": lambda x: np.compress(MASK, x, axis=1),
    "partition": lambda x: np.partition(x, 1)[..., 1],
    "select": lambda x: np.select([MASK, x.shape[0] == 2], [x, 2 * x], 3 * x),
    "average, weights": lambda x: np.average(x, axis=1, weights=[1.0, 2.0, 3.0]),
    "median, axis": lambda x: np.median(x, axis=1, keepdims=True),
    "ptp, axis": lambda x: np.ptp(x, axis=0),
    "nanvar, ddof": lambda x: np.nanvar(np.where(MASK, x, np.nan), axis=1, ddof=1),
    "gradient, axis": lambda x: np.gradient(x, 0.5, axis=1),
    "trapezoid, x": lambda x: np.trapezoid(x, np.array([0.0, 1.0, 3.0])),
    "norm": np.linalg.norm,
    "norm, order 1": lambda x: np.linalg.norm(x, 1, axis=0),
    "norm, order 3": lambda x: np.linalg.norm(x, 3, axis=1, keepdims=True),
    "norm, infinite": lambda x: np.linalg.norm(x, np.inf, axis=1),
    "sum, dtype": lambda x: np.sum(x, axis=0, dtype=np.float64, keepdims=True),
    "clip": lambda x: np.clip(x, a_min=0.3, a_max=0.7),
    "diag": lambda x: np.diag(x, k=1),
    "full_like": lambda x: np.full_like(x, 2.0),
    "where, a number": lambda x: np.where(MASK, x, 0.0),
    "einsum": lambda x: np.einsum("ij,kj->ik", x, x, optimize=True),
}
OF_TWO = {  # called with operands of these shapes
    **{name: (getattr(np, name), [(), (3,), (2, 1)]) for name in OPERATORS.split()},
    "where": (lambda a, b: np.where(MASK, a, b), [(), (3,), (2, 1)]),
    "concatenate": (lambda a, b: np.concatenate((a, b), axis=1), [(2, 3), (2, 1)]),
    "append": (np.append, [(2, 3), (2,)]),
    "append, axis": (lambda a, b: np.append(a, b, axis=0), [(2, 3)]),
    "stack": (lambda a, b: np.stack([a, b], axis=-1), [(2, 3)]),
    "vstack": (lambda a, b: np.vstack([a, b]), [(2, 3), (3,)]),
    "hstack": (lambda a, b: np.hstack([a, b]), [(3,), (2,)]),
    "dstack": (lambda a, b: np.dstack([a, b]), [(2, 3)]),
    "column_stack": (lambda a, b: np.column_stack([a, b]), [(2,), (2, 2)]),
    "cross": (np.cross, [(3,), (4, 3)]),
    "convolve": (np.convolve, [(4,), (2,)]),
    "kron": (np.kron, [(2,), (2, 3)]),
    "vdot": (np.vdot, [(2, 3)]),
    "broadcast_arrays": (np.broadcast_arrays, [(3,), (2, 1)]),
    "meshgrid": (np.meshgrid, [(3,), (2,)]),
}


def check(function, arrays, are_tensors):
    """Compare values, and the derivative in a random direction with respect to the operands that are Tensors."""
    operands = [Tensor(a, requires_grad=True) if w else a for a, w in zip(arrays, are_tensors, strict=True)]
    results, expected = function(*operands), function(*arrays)
    results, expected = (list(y) if isinstance(y, list | tuple) else [y] for y in (results, expected))
    assert len(results) == len(expected)
    weights = [R.normal(size=np.shape(y)) for y in expected]
    for y, want in zip(results, expected, strict=True):
        assert isinstance(y, Tensor)
        np.testing.assert_allclose(y.numpy(), want, rtol=1e-12, atol=1e-14)
    directions = [R.normal(size=a.shape) if w else np.zeros(a.shape) for a, w in zip(arrays, are_tensors, strict=True)]

    def at(step):
        y = function(*(a + step * d for a, d in zip(arrays, directions, strict=True)))
        y = list(y) if isinstance(y, list | tuple) else [y]
        return sum(float(np.sum(part * w)) for part, w in zip(y, weights, strict=True))

    parts = [(y * w).sum() for y, w in zip(results, weights, strict=True) if y.requires_grad]
    for part in parts[:1]:
        for other in parts[1:]:
            part = part + other
        part.backward()
    gradients = [x.grad if isinstance(x, Tensor) and x.grad is not None else np.zeros(1) for x in operands]
    found = sum(float(np.sum(g * d)) for g, d in zip(gradients, directions, strict=True))
    assert found == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", OF_ONE)
def test_a_function_with_one_operand(name):
    check(OF_ONE[name], [R.uniform(0.1, 0.9, (2, 3))], [True])


@pytest.mark.parametrize("name", OF_TWO)
def test_a_function_with_two_operands_that_are_tensors_or_arrays(name):
    function, shapes = OF_TWO[name]
    for pair in itertools.product(shapes, shapes):
        try:
            function(*map(np.ones, pair))
        except ValueError:
            continue  # NumPy does not support these shapes
        for are_tensors in ((True, True), (True, False), (False, True)):
            check(function, [R.uniform(1, 2, pair[0]), R.uniform(2.1, 3, pair[1])], are_tensors)


def test_every_function_is_in_a_table():
    tested = {name.split(",")[0] for name in (*OF_ONE, *OF_TWO)}
    assert {function.__name__ for function in protocols._functions()} - tested == set()
    public = [f for name, f in vars(numpy_functions).items() if inspect.isfunction(f) and not name.startswith("_")]
    own = {f.__name__ for f in public if f.__module__ == numpy_functions.__name__}
    assert own <= {f.__name__ for f in protocols._functions().values()}


def test_unsupported_arguments_are_rejected():
    x = Tensor(np.ones((2, 2)))
    for call, message in (
        (lambda: np.linalg.norm(x, "nuc"), "norm: ord is 'nuc'"),
        (lambda: np.cross(x, x), "cross: shapes"),
        (lambda: np.split(x, 3), "split: length 2 cannot be split into 3 equal parts"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"np\.unwrap does not support Tensors"):
        np.unwrap(x)
    with pytest.raises(TypeError, match="sum: unknown argument where; expected axis, keepdims"):
        np.sum(x, where=x.numpy() > 0)
