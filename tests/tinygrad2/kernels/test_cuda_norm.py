"""layernorm.cu, gelu.cu and columns.cu on the simulator, against reference.py in float64 on the same inputs."""

import re
import types

import ml_dtypes
import numpy as np
import pytest

from tests.stand_ins import cudasim
from tinygrad2 import reference
from tinygrad2.kernels import cuda

pytestmark = pytest.mark.slow  # some dozen kernels are compiled; test_cuda.py runs each of them too

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
TOLERANCE = {BF16: 6e-3, F32: 3e-6}  # relative to the largest element: a bit of each type, and some rounding


def empty(shape, dtype):
    """What nothing has been written to is NaN."""
    return np.full(shape, np.nan, dtype)


class Array(np.ndarray):
    """With an address as CuPy's arrays have it."""

    data = property(lambda self: types.SimpleNamespace(ptr=self.ctypes.data))


def kernels(raw_module=cudasim.RawModule):
    library = types.SimpleNamespace(
        RawModule=raw_module,
        empty=empty,
        ascontiguousarray=lambda x: np.ascontiguousarray(x).view(Array),
        float32=np.float32,
    )
    return cuda.CudaKernels(library, reference)


def wide(x):
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x


def check(k, name, args, added=0):
    """Call a kernel and the reference on the same values, and compare what they return and the last `added` arguments,
    which are added to. Returns all results."""
    ours = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    theirs = [wide(a) for a in args]
    got, expected = getattr(k, name)(*ours), getattr(reference, name)(*theirs)
    got, expected = (list(r) if isinstance(r, tuple) else [r] for r in (got, expected))
    kept = len(args) - added
    for before, after in zip(args[:kept], ours[:kept], strict=True):
        assert not isinstance(before, np.ndarray) or before.tobytes() == after.tobytes()
    for i in range(kept, len(args)):
        if ours[i] is not None:
            got.append(ours[i])
            expected.append(theirs[i])
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        error = np.max(np.abs(wide(g) - e), initial=0) / max(np.max(np.abs(e), initial=0), 1e-3)
        assert error < TOLERANCE[g.dtype], f"{name}: {error}"
    return got


def normal(*shape, dtype=F32, seed=0, scale=1.0):
    return (scale * np.random.default_rng([seed, *shape]).normal(size=shape)).astype(dtype)


def layernorm_cases(rows, C, dtype):
    """(name, arguments, how many of the last are added to)."""
    x, delta, dy, ds = (normal(rows, C, dtype=dtype, seed=i) for i in range(4))
    x, delta = (np.round(8 * wide(a)).astype(dtype) / dtype.type(8) for a in (x, delta))  # their sum is exact
    weight, bias, dweight, dbias = (normal(C, seed=i) for i in range(4))
    x = x + dtype.type(2)  # a mean that matters
    _, mean, rstd = (a.astype(F32) for a in reference.layernorm_forward(wide(x), weight, bias, 1e-5))
    return [
        ("layernorm_forward", (x, weight, bias, 1e-5), 0),
        ("add_layernorm_forward", (x, delta, weight, bias, 1e-5), 0),
        ("layernorm_backward", (dy, x, weight, mean, rstd, dweight, dbias), 2),
        ("add_layernorm_backward", (ds, dy, x, weight, mean, rstd, dweight, dbias), 2),
    ]


def gelu_cases(rows, C, dtype, bias_dtype=None):
    x, dy = normal(rows, C, dtype=dtype, scale=3), normal(rows, C, dtype=dtype, seed=1)
    bias = None if bias_dtype is None else normal(C, dtype=bias_dtype)
    return [
        case
        for form in ("gelu", "gelu_exact")
        for case in [
            (f"{form}_forward", (x, bias), 0),
            (f"{form}_backward", (dy, x, bias, None if bias is None else normal(C, seed=2)), 1),
        ]
    ]


@pytest.mark.parametrize(
    ("rows", "C", "dtype"),
    [(19, 64, BF16), (5, 800, BF16), (3, 1600, BF16), (9, 21, BF16), (10, 36, F32)],
)
def test_layernorm(rows, C, dtype):
    for name, args, added in layernorm_cases(rows, C, dtype):
        check(kernels(), name, args, added)


def test_the_sum_that_is_normalised_is_the_rounded_one():
    _, (x, _, *rest), _ = layernorm_cases(19, 64, BF16)[1]
    delta = normal(19, 64, dtype=BF16)
    s, *normalised = kernels().add_layernorm_forward(x, delta, *rest)
    assert s.tobytes() == (x + delta).tobytes()
    plain = kernels().layernorm_forward(s, *rest)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(normalised, plain, strict=True))


def test_layernorm_walks_many_rows_and_keeps_shapes(monkeypatch):
    monkeypatch.setattr(cuda, "PROCESSORS", 1)  # 4 and 2 blocks for 150 rows
    for name, args, added in layernorm_cases(150, 64, BF16) + layernorm_cases(31, 1600, BF16):
        shaped = [a.reshape(1, *a.shape) if isinstance(a, np.ndarray) and a.ndim == 2 else a for a in args]
        check(kernels(), name, shaped, added)


def test_layernorm_of_gradients_that_nobody_wants():
    (_, args, _) = layernorm_cases(9, 64, BF16)[2]
    dx = kernels().layernorm_backward(*args)
    for dweight, dbias in [(None, None), (args[5].copy(), None), (None, args[6].copy())]:
        assert check(kernels(), "layernorm_backward", (*args[:5], dweight, dbias), 2)[0].tobytes() == dx.tobytes()


@pytest.mark.parametrize(
    ("rows", "C", "dtype", "bias_dtype"),
    [(21, 264, BF16, BF16), (70, 21, BF16, F32), (9, 36, F32, F32), (5, 64, BF16, None)],
)
def test_gelu(rows, C, dtype, bias_dtype):
    for case in gelu_cases(rows, C, dtype, bias_dtype):
        check(kernels(), *case)


def test_gelu_in_its_tails():
    """Right to 2e-5 of each single value, however small, and the right limits where it overflows."""
    u = np.linspace(-8, 8, 1008, dtype=F32).reshape(-1, 36)
    y = kernels().gelu_forward(u, np.zeros(36, F32))
    e = np.exp(-2 * reference._GELU_SCALE * (wide(u) + reference._GELU_CUBIC * wide(u) ** 3))
    np.testing.assert_allclose(y, wide(u) / (1 + e), rtol=2e-5, atol=1e-37)
    far = np.repeat(np.array([-1e4, -50, 50, 1e4], dtype=F32), 9)[None]
    assert np.array_equal(kernels().gelu_forward(far, np.zeros(36, F32)), np.maximum(far, 0))
    assert np.array_equal(kernels().gelu_backward(np.ones_like(far), far, np.zeros(36, F32), None), far > 0)


@pytest.mark.parametrize(("rows", "C", "dtype"), [(700, 64, BF16), (33, 264, BF16), (50, 21, BF16), (9, 36, F32)])
def test_column_sums(rows, C, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "PROCESSORS", 2)
    x, into = normal(rows, C, dtype=dtype), normal(C, seed=1)
    expected = into + wide(x).sum(axis=0)
    kernels()._column_sums(x, into)
    np.testing.assert_allclose(into, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_partial_sums_are_added_however_many_there_are():
    for parts in (1, 31, 300):
        partials, targets = normal(2, parts, 40), [normal(40, seed=1), normal(40, seed=2)]
        expected = [target + part.sum(axis=0, dtype="d") for target, part in zip(targets, partials, strict=True)]
        kernels()._add_partials(partials, *targets)
        np.testing.assert_allclose(targets, expected, rtol=0, atol=1e-5)


def test_arrays_that_begin_anywhere():
    def shifted(array):
        if not isinstance(array, np.ndarray) or array.ndim != 2:
            return array
        room = np.empty(array.size + 1, array.dtype)
        room[1:] = array.reshape(-1)
        return room[1:].reshape(array.shape)

    k = kernels()
    for name, args, _ in all_cases():
        whole, apart = ([a.copy() if isinstance(a, np.ndarray) else a for a in args] for _ in range(2))
        results = [getattr(k, name)(*given) for given in (whole, map(shifted, apart))]
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            assert a.tobytes() == b.tobytes()
    into = [np.zeros(64, F32) for _ in range(2)]
    for target, x in zip(into, (normal(9, 64), shifted(normal(9, 64))), strict=True):
        k._column_sums(x, target)
    assert np.array_equal(*into)


def all_cases():
    return layernorm_cases(21, 800, BF16) + gelu_cases(101, 264, BF16, BF16)


def results_in(order, k):
    cudasim.schedule = order
    try:
        return [[r.tobytes() for r in check(k, *case)] for case in all_cases()]
    finally:
        cudasim.schedule = 0


def test_the_same_bits_in_every_order(monkeypatch):
    monkeypatch.setattr(cuda, "PROCESSORS", 1)
    first = results_in(0, kernels())
    assert all(results_in(order, kernels()) == first for order in (1, 2, 3))


def test_float64_and_mixed_types_go_to_the_reference():
    for name, args, added in layernorm_cases(3, 8, F32) + gelu_cases(3, 8, F32, F32):
        args = [wide(a) for a in args]
        theirs = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
        got, expected = getattr(kernels(), name)(*args), getattr(reference, name)(*theirs)
        for g, e in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True):
            assert g.dtype == np.float64
            assert np.array_equal(g, e)
        for g, e in zip(args[len(args) - added :], theirs[len(args) - added :], strict=True):
            assert np.array_equal(g, e)


FAULTS = {
    "the gains are read before they are there": (r"(gains\[c\] = weight\[c\];)\n  __syncthreads\(\);", r"\1"),
    "a row's sums are read before they are there": (r"(slots\[warp\]\[n\] = v\[n\];)\n  __syncthreads\(\);", r"\1"),
    "one set of slots in backward": (r"row_sums\(sums, slots\[turn\]\)", "row_sums(sums, slots[0])"),
    "a row's first warp alone": (r"w < ROW_WARPS", "w < 1"),
    "groups add at once": (r"__syncthreads\(\);  // what the row held", "// what the row held"),
    "a row of sums is stored too early": (r"__syncthreads\(\);\n(  for \(int c = threadIdx.x; .* partial)", r"\1"),
    "rows left out": (r"first \+= gridDim.x \* ROWS\)", "first += rows)"),
    "the last row left out": (r"row < rows \? C", "row < rows - 1 ? C"),
    "no mean of g": (r" - g_mean", ""),
    "no ds": (r"ADD \? skip\[k\]", "false ? skip[k]"),
    "ds is read before it is there": (r"if \(ADD\) cp_async_wait<0>\(\);", ""),
    "the ds of another warp": (r"skips\[i \* WARPS \* 32 \+ threadIdx.x\]", "skips[i * WARPS * 32 + lane]"),
    "a row ahead left out": (r"row \+= AHEAD \* step", "row += (AHEAD + 1) * step"),
    "a row ahead added twice": (r"row \+= ROWS \* step", "row += step"),
    "warps add at once": (r"__syncthreads\(\);\n  int c = blockIdx.x \* WIDTH", "int c = blockIdx.x * WIDTH"),
    "a warp left out": (r"warp < WARPS; warp\+\+", "warp < WARPS - 1; warp++"),
    "parts added at once": (r"sums\[warp\]\[lane\] = sum;\n  __syncthreads\(\);", "sums[warp][lane] = sum;"),
    "into is set": (r"into\[c\] \+= sum", "into[c] = sum"),
    "the wrong target": (r"blockIdx.y \? second : first", "first"),
    "no bias": (r"f32\(bias\[c\]\)", "0.f * f32(bias[c])"),
    "the last columns left out": (r"c < C\) \{", "c < C - 8) {"),
    "a wrong cubic": (r"0.044715f", "0.0047f"),
}  # fmt: skip


@pytest.mark.slow  # each is compiled
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    monkeypatch.setattr(cuda, "PROCESSORS", 1)
    changed = []

    def faulty(code, options):
        planted = re.sub(*FAULTS[fault], code)
        changed.append(planted != code)
        return cudasim.RawModule(planted, options)

    def is_caught(order):
        try:
            return results_in(order, kernels(faulty)) != right
        except (AssertionError, RuntimeError):
            return True

    right = results_in(0, kernels())
    assert any(is_caught(order) for order in range(4))
    assert any(changed)
