"""kernels/embedding.cu and cross_entropy.cu on the simulator, against reference.py in float64 on the same numbers."""

import re
import types

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import cudasim
from tests.stand_ins.strict_cupy import device, library, ndarray
from tinygrad2 import reference
from tinygrad2.kernels import cuda

pytestmark = pytest.mark.slow  # some dozen kernels are compiled; test_cuda.py runs each of them too

TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}  # of the norm; bfloat16 rounds at 2^-9


class Simulated(type(library)):
    """The stand-in for CuPy, with kernels. New arrays hold NaN."""

    RawModule = cudasim.RawModule

    def empty(self, shape, dtype):
        return ndarray(np.full(shape, np.nan, dtype))


def gemm(a, b, out=None, *, transpose_a=False, transpose_b=False, accumulate=False, scale=None):
    """CudaKernels._gemm, by NumPy."""
    a, b = (x._a.astype("f4").T if turned else x._a.astype("f4") for x, turned in ((a, transpose_a), (b, transpose_b)))
    with np.errstate(invalid="ignore"):
        product = a @ b * (1 if scale is None else scale._a)
    out._a[...] = product + out._a if accumulate else product
    return out


@pytest.fixture
def kernels():
    table = cuda.CudaKernels(Simulated(), reference)
    table._gemm = gemm
    device.reset()
    yield table
    assert device.syncs == 0


def on_device(*arrays):
    return [ndarray(np.array(array)) for array in arrays]


def wide(array):
    return array._a.astype("d")


def error(array, right):
    """The distance, of the right result's norm; infinite where there is a NaN."""
    distance = np.linalg.norm(wide(array) - right) / (np.linalg.norm(right) or 1)
    return distance if np.isfinite(distance) else np.inf


def schedules(compute):
    """The results of `compute`, which must be the same bits however the threads take turns."""
    results = []
    for cudasim.schedule in range(4):
        results.append(compute())
    cudasim.schedule = 0
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a._a.tobytes() == b._a.tobytes(), "depends on the schedule"
    return results[0]


# Embedding ------------------------------------------------------------------------------------------------------------


def batch(B, T, V, seed=0):
    """Tokens of which one fills a third: a run of many chunks, where there are as many rows."""
    R = np.random.default_rng(seed)
    tokens = R.integers(0, V, (B, T))
    return np.where(R.random((B, T)) < 0.3, V // 2, tokens)


@pytest.mark.parametrize("dtype", ["float32", bfloat16])
@pytest.mark.parametrize(("B", "T", "C", "positions"), [(2, 5, 24, True), (3, 7, 13, True), (2, 9, 16, False)])
def test_embedding_forward(kernels, dtype, B, T, C, positions):
    R = np.random.default_rng(1)
    tokens, wte, wpe = batch(B, T, 11), R.normal(size=(11, C)).astype(dtype), R.normal(size=(T + 4, C)).astype(dtype)
    arguments = on_device(tokens, wte, wpe)
    if not positions:
        wpe = arguments[2] = None
    right = reference.embedding_forward(tokens, wte.astype("d"), wpe if wpe is None else wpe.astype("d"), 3)
    (y,) = schedules(lambda: [kernels.embedding_forward(*arguments, 3)])
    assert y.dtype == dtype
    assert error(y, right) < TOLERANCE[y.dtype.name]
    for before, after in zip((tokens, wte, wpe), arguments, strict=True):
        assert before is None or before.tobytes() == after._a.tobytes()


def test_embedding_forward_takes_one_token(kernels):
    wte = np.arange(24, dtype="f4").reshape(3, 8)
    y = kernels.embedding_forward(*on_device(np.int64(2), wte), None, 0)
    np.testing.assert_array_equal(y._a, wte[2])


def embedding_gradients(kernels, tokens, dtype, C, offset=0):
    """The results and what they should be; the gradients begin `offset` numbers into their memory."""
    R = np.random.default_rng(2)
    (B, T), V, first = tokens.shape, 50, 2
    dy = R.normal(size=(B, T, C)).astype(dtype)
    grads = [R.normal(size=(rows, C)).astype("f4") for rows in (V, T + 3)]
    right = [grad.astype("d") for grad in grads]
    reference.embedding_backward(dy.astype("d"), tokens, first, *right)

    def compute():
        given = ndarray(dy.copy())
        places = [np.zeros(grad.size + offset, "f4")[offset:].reshape(grad.shape) for grad in grads]
        for place, grad in zip(places, grads, strict=True):
            place[...] = grad
        results = [ndarray(place) for place in places]
        kernels.embedding_backward(given, tokens, first, *results)
        assert given._a.tobytes() == dy.tobytes()
        return results

    return compute, right


@pytest.mark.parametrize("dtype", ["float32", bfloat16])
@pytest.mark.parametrize(("B", "T", "C", "offset"), [(1, 1, 8, 0), (4, 32, 24, 0), (5, 111, 16, 1), (3, 67, 13, 0)])
def test_embedding_backward(kernels, dtype, B, T, C, offset):
    compute, right = embedding_gradients(kernels, batch(B, T, 50), dtype, C, offset)
    for result, expected in zip(schedules(compute), right, strict=True):
        assert error(result, expected) < 1e-6  # float32, whatever dy is


@pytest.mark.parametrize(
    "tokens",
    [
        np.full((3, 128), 7),  # one run, to the end of a chunk
        np.full((5, 129), 7),  # of more chunks than are read at once
        np.repeat([4, 7, 9], 64)[None],  # runs that are chunks
        np.repeat([4, 7, 9, 11], [63, 66, 127, 1])[None],  # runs that end on either side of a border
        np.arange(50)[None],
        np.repeat([4, 7, 9], [10, 200, 3])[None],
    ],
)
def test_runs_and_the_borders_of_chunks(kernels, tokens):
    compute, right = embedding_gradients(kernels, tokens, bfloat16, 8)
    for result, expected in zip(compute(), right, strict=True):
        assert error(result, expected) < 1e-6


def test_embedding_backward_leaves_out_what_is_not_wanted(kernels):
    kernels.embedding_backward(ndarray(np.ones((1, 3, 8), "f4")), np.zeros((1, 3), int), 0, None, None)


# The language-model head ----------------------------------------------------------------------------------------------


def head(dtype, shape, C, V):
    R = np.random.default_rng(3)
    x, weight = R.normal(size=(*shape, C)).astype(dtype), R.normal(size=(V, C)).astype(dtype)
    return x, weight, R.integers(0, V, shape)


@pytest.mark.parametrize(
    ("dtype", "resident", "shape", "C", "V"),
    [
        (bfloat16, True, (2, 3), 8, 64),
        (bfloat16, True, (2,), 16, 17001),  # 2126 accesses: up to three for a thread
        (bfloat16, False, (3,), 8, 1003),
        ("float32", True, (5,), 8, 1003),
        ("float32", False, (2, 2), 8, 4099),
        ("float32", True, (3,), 4, 9),
    ],
)
def test_lm_head(kernels, dtype, resident, shape, C, V):
    kernels._shared_memory = (228 << 10) * resident
    x, weight, targets = head(dtype, shape, C, V)
    x[..., 0] += 3
    logits = (x.reshape(-1, C).astype("f4") @ weight.astype("f4").T).astype(dtype).astype("d")
    largest = logits.max(axis=1, keepdims=True)
    lse = largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    row, target = np.arange(len(logits)), targets.reshape(-1)
    right = np.exp(logits - lse)
    right[row, target] -= 1
    right /= len(logits)

    arguments = on_device(x, weight, targets)
    loss, dlogits = schedules(lambda: kernels.lm_head_forward(*arguments))
    assert (loss.shape, loss.dtype, dlogits.shape, dlogits.dtype) == ((), "float32", (len(logits), V), dtype)
    assert error(loss, np.mean(lse[:, 0] - logits[row, target])) < 1e-6
    assert error(dlogits, right) < TOLERANCE[dlogits.dtype.name]
    padding = dlogits._a.base[:, V:]
    assert padding.shape[1] == -V % 64
    assert not padding.any()

    tight = ndarray(dlogits._a.copy())
    scale, dweight = np.float32(0.7), np.random.default_rng(4).normal(size=(V, C)).astype("f4")
    d, rows = dlogits._a.astype("d"), x.reshape(-1, C).astype("d")
    for given in (dlogits, tight):
        into = ndarray(dweight.copy())
        dx = kernels.lm_head_backward(ndarray(np.asarray(scale)), given, arguments[0], arguments[1], into)
        assert (dx.shape, dx.dtype) == (x.shape, dtype)
        assert error(dx, scale * (d @ weight.astype("d")).reshape(x.shape)) < TOLERANCE[dx.dtype.name]
        assert error(into, dweight + scale * d.T @ rows) < 1e-6
        kernels.lm_head_backward(ndarray(np.asarray(scale)), given, arguments[0], arguments[1], None)
    for before, after in zip((x, weight, targets), arguments, strict=True):
        assert before.tobytes() == after._a.tobytes()


def test_the_weights_gradient_is_made_of_columns_that_hopper_takes(kernels, monkeypatch):
    gemm, products = kernels._gemm, []

    def spy(a, b, out, **options):
        products.append((out.shape, bool(options.get("accumulate"))))
        return gemm(a, b, out, **options)

    x, weight, targets = on_device(*head(bfloat16, (4,), 16, 1001))
    _, dlogits = kernels.lm_head_forward(x, weight, targets)
    monkeypatch.setattr(kernels, "_gemm", spy)
    kernels.lm_head_backward(ndarray(np.ones((), "f4")), dlogits, x, weight, ndarray(np.zeros((1001, 16), "f4")))
    assert products == [((1000, 16), True), ((1, 16), True), ((4, 16), False)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_the_loss(kernels, bad):
    x, weight, targets = head("float32", (3,), 8, 70)
    x[1, 0] = bad
    loss, _ = kernels.lm_head_forward(*on_device(x, weight, targets))
    assert np.isnan(loss._a)


def test_logits_far_apart(kernels):
    x, weight = np.array([[1.0]], bfloat16), np.zeros((70, 1), bfloat16)
    weight[3], weight[5], weight[7] = 3e4, -np.inf, 3e4
    loss, dlogits = kernels.lm_head_forward(*on_device(x, weight, np.array([3])))
    assert abs(float(loss._a) - np.log(2)) < 1e-2  # 2^-24 of 3e4
    right = np.zeros((1, 70))
    right[0, 3], right[0, 7] = -0.5, 0.5
    np.testing.assert_array_equal(wide(dlogits), right)


@pytest.mark.parametrize(
    ("kilobytes", "resident"),
    [(228, True), (164, False), (100, False)],  # of a multiprocessor of an H100, an A100, an L4 or a GeForce
)
def test_a_row_is_resident_where_two_of_them_fit_a_multiprocessor(kernels, monkeypatch, kilobytes, resident):
    monkeypatch.setattr(cudasim, "shared_memory", kilobytes - 1 << 10)
    kernels._shared_memory = kilobytes << 10
    x, weight, targets = head(bfloat16, (1,), 1, 50257)
    loss, _ = kernels.lm_head_forward(*on_device(x, weight, targets))
    assert error(loss, reference.lm_head_forward(x.astype("d"), weight.astype("d"), targets)[0]) < 1e-3
    assert {dict(key[3:])["RESIDENT"] for key in kernels._functions} == {resident}


def test_the_device_says_how_much_shared_memory_it_has(kernels):
    assert kernels._shared_memory == 228 << 10


def test_the_mean_of_many_rows(kernels):
    x, weight, targets = head("float32", (2500,), 2, 9)
    loss, _ = kernels.lm_head_forward(*on_device(x, weight, targets))
    assert error(loss, reference.lm_head_forward(x.astype("d"), weight.astype("d"), targets)[0]) < 1e-6


def test_float64_goes_to_the_reference(kernels):
    x, weight, targets = (np.asarray(a, "d") for a in head("float32", (3,), 8, 9))
    calls = []
    kernels._reference = types.SimpleNamespace(
        **{
            name: lambda *_, name=name: calls.append(name)
            for name in ("lm_head_forward", "lm_head_backward", "embedding_forward", "embedding_backward")
        }
    )
    given = on_device(x, weight, targets)
    kernels.lm_head_forward(*given)
    kernels.lm_head_backward(None, given[0], *given[:2], None)
    kernels.embedding_forward(given[2], given[1], None, 0)
    kernels.embedding_backward(given[0], None, 0, None, None)
    assert len(set(calls)) == 4


def test_cross_entropy_of_bfloat16_is_computed_in_float32():
    table = cuda.CudaKernels(None, reference)
    R = np.random.default_rng(5)
    logits, targets = R.normal(size=(4, 9)).astype(bfloat16), R.integers(0, 9, 4)
    loss, lse = table.cross_entropy_forward(logits, targets)
    right, right_lse = reference.cross_entropy_forward(logits.astype("d"), targets)
    assert lse.dtype == "float32"
    np.testing.assert_allclose(loss, right, rtol=1e-6)
    dlogits = table.cross_entropy_backward(np.float32(2), logits, targets, lse)
    assert dlogits.dtype == bfloat16
    right = reference.cross_entropy_backward(2, logits.astype("d"), targets, right_lse)
    np.testing.assert_allclose(dlogits.astype("d"), right, atol=2e-3)


# Planted faults: each must be seen -----------------------------------------------------------------------------------

FAULTS = [
    ("cross_entropy", r"__syncthreads\(\);\n  s\.largest", "s.largest"),
    ("cross_entropy", r"cp_async_wait<1>", "cp_async_wait<2>"),
    ("cross_entropy", r"cp_async_wait<0>", "cp_async_wait<1>"),
    ("cross_entropy", r"padded && ", "false && "),
    ("cross_entropy", r"total \*= exp2f\(before - largest\);", ""),
    ("cross_entropy", r"total \* exp2f\(before - largest\)", "total"),
    ("cross_entropy", r"i == FULL \? ", "false ? "),
    ("cross_entropy", r"target / Vec::N % THREADS == threadIdx.x", "threadIdx.x == 0"),
    ("mean_loss", r"__syncthreads\(\);\n  return threadIdx.x < 32", "return threadIdx.x < 32"),
    ("embedding_forward", r"row % T", "row"),
    ("embedding_forward", r"\(first_position \+ row", "(row"),
    ("embedding_backward", r"start > 0 && tokens\[start - 1\] == tokens\[start\]", "false"),
    ("embedding_backward", r"i \+ k < rows \? tokens", "i + k < stop ? tokens"),
    ("embedding_backward", r"if \(began_earlier\) sum.store\(pieces\);\n\s+else ", ""),
    ("embedding_backward", r"began_earlier \? pieces : pieces \+ C", "pieces"),
    ("embedding_backward", r" \|\| start > 0 && tokens\[start - 1\] == token", ""),
    ("embedding_backward", r" && tokens\[next \+ k \* CHUNK\] == token", ""),
    ("embedding_backward", r"more = there\[AHEAD - 1\]", "more = false"),
    ("embedding_backward", r"\(size_t\)b \* T \+ t", "(size_t)t * B + b"),
]


def all_is_well(kernels, kernel):
    """A small case of a kernel, with what the faults need to show."""
    if kernel == "embedding_backward":
        tokens = np.repeat([4, 7, 9, 11], [64, 60, 68, 768]).reshape(3, 320)  # chunks end inside, at and after runs
        compute, right = embedding_gradients(kernels, tokens, bfloat16, 16)
        return all(error(*pair) < 1e-6 for pair in zip(schedules(compute), right, strict=True))
    if kernel == "embedding_forward":
        R = np.random.default_rng(6)
        tokens, wte, wpe = batch(2, 5, 11), R.normal(size=(11, 8)).astype("f4"), R.normal(size=(9, 8)).astype("f4")
        y = kernels.embedding_forward(*on_device(tokens, wte, wpe), 3)
        return error(y, reference.embedding_forward(tokens, wte.astype("d"), wpe.astype("d"), 3)) < 1e-6
    dtype, shape, C, V = {"cross_entropy": (bfloat16, (2,), 8, 17001), "mean_loss": ("float32", (40,), 2, 9)}[kernel]
    x, weight, targets = head(dtype, shape, C, V)
    weight[-1] = x[0]  # the last token, beside the padding, is a likely one
    arguments = on_device(x, weight, targets)
    loss, dlogits = schedules(lambda: kernels.lm_head_forward(*arguments))
    right_loss, right = reference.lm_head_forward(x.astype("d"), weight.astype("d"), targets)
    return error(loss, right_loss) < 2e-3 and error(dlogits, right) < 1e-2 and not dlogits._a.base[:, V:].any()


@pytest.mark.slow  # each is compiled
@pytest.mark.parametrize(("kernel", "pattern", "replacement"), FAULTS)
def test_faults_are_seen(kernels, monkeypatch, kernel, pattern, replacement):
    family = "embedding" if kernel.startswith("embedding") else "cross_entropy"
    text, count = re.subn(pattern, replacement, cuda.source(family), count=1)
    assert count == 1
    monkeypatch.setattr(cuda, "source", lambda family: text)
    try:
        well = all_is_well(kernels, kernel)
    except (RuntimeError, AssertionError):
        well = False
    device.reset()  # pytest's account of a failed assertion shows arrays
    assert not well


@pytest.mark.parametrize("kernel", ["embedding_forward", "embedding_backward", "cross_entropy", "mean_loss"])
def test_without_a_fault_all_is_well(kernels, kernel):
    assert all_is_well(kernels, kernel)
