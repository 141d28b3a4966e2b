"""kernels/cross_entropy.cu, which lm_head uses, on the simulator, compared with reference.py in float64."""

import types

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import cudasim
from tests.stand_ins.faults import inject_in
from tests.stand_ins.strict_cupy import device, library, ndarray
from tests.tinygrad2.kernels.on_device import TOLERANCE, error, make_kernels, on_device, schedules, wide
from tinygrad2 import reference
from tinygrad2.kernels import cuda

pytestmark = pytest.mark.slow  # compiles about a dozen kernels; test_cuda.py runs each of them too


@pytest.fixture
def kernels():
    device.reset()
    yield make_kernels()
    assert device.syncs == 0


def head(dtype, shape, C, V):
    R = np.random.default_rng(3)
    x, weight = R.normal(size=(*shape, C)).astype(dtype), R.normal(size=(V, C)).astype(dtype)
    return x, weight, R.integers(0, V, shape)


@pytest.mark.parametrize(
    ("dtype", "resident", "threads", "shape", "C", "V"),
    [
        (bfloat16, True, 2048, (2, 3), 8, 64),
        (bfloat16, True, 2048, (2,), 16, 17001),  # 2,126 accesses, up to three per thread
        (bfloat16, False, 1536, (2,), 16, 17001),
        (bfloat16, False, 2048, (3,), 8, 1003),
        ("float32", True, 2048, (5,), 8, 1003),
        ("float32", False, 1024, (2, 2), 8, 4099),
        ("float32", True, 2048, (3,), 4, 9),
    ],
)
def test_lm_head_agrees_with_numpy(kernels, dtype, resident, threads, shape, C, V):
    kernels.processor = cuda.Multiprocessor((228 << 10) * resident, threads)
    x, weight, targets = head(dtype, shape, C, V)
    x[..., 0] += 3
    logits = (x.reshape(-1, C).astype("f4") @ weight.astype("f4").T).astype(dtype).astype("d")
    largest = logits.max(axis=1, keepdims=True)
    lse = largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    row, target = np.arange(len(logits)), targets.reshape(-1)
    correct = np.exp(logits - lse)
    correct[row, target] -= 1
    correct /= len(logits)

    arguments = on_device(x, weight, targets)
    loss, dlogits = schedules(lambda: kernels.lm_head_forward(*arguments))
    assert (loss.shape, loss.dtype, dlogits.shape, dlogits.dtype) == ((), "float32", (len(logits), V), dtype)
    assert error(loss, np.mean(lse[:, 0] - logits[row, target])) < 1e-6
    assert error(dlogits, correct) < TOLERANCE[dlogits.dtype.name]
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


def test_the_product_for_the_weight_gradient_has_a_size_that_hopper_supports(kernels, monkeypatch):
    gemm, products = kernels.gemm, []

    def spy(a, b, out, **options):
        products.append((out.shape, bool(options.get("accumulate"))))
        return gemm(a, b, out, **options)

    x, weight, targets = on_device(*head(bfloat16, (4,), 16, 1001))
    _, dlogits = kernels.lm_head_forward(x, weight, targets)
    monkeypatch.setattr(kernels, "gemm", spy)
    kernels.lm_head_backward(ndarray(np.ones((), "f4")), dlogits, x, weight, ndarray(np.zeros((1001, 16), "f4")))
    assert products == [((1000, 16), True), ((1, 16), True), ((4, 16), False)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_inputs_give_a_nan_loss(kernels, bad):
    x, weight, targets = head("float32", (3,), 8, 70)
    x[1, 0] = bad
    loss, _ = kernels.lm_head_forward(*on_device(x, weight, targets))
    assert np.isnan(loss._a)


def test_logits_with_a_large_range(kernels):
    x, weight = np.array([[1.0]], bfloat16), np.zeros((70, 1), bfloat16)
    weight[3], weight[5], weight[7] = 3e4, -np.inf, 3e4
    loss, dlogits = kernels.lm_head_forward(*on_device(x, weight, np.array([3])))
    assert abs(float(loss._a) - np.log(2)) < 1e-2  # the rounding error of 3e4 in float32
    correct = np.zeros((1, 70))
    correct[0, 3], correct[0, 7] = -0.5, 0.5
    np.testing.assert_array_equal(wide(dlogits), correct)


@pytest.mark.parametrize(
    ("kilobytes", "threads", "resident"),
    # multiprocessors of an H200, an A100, an L4 or GeForce RTX, and a T4
    [(228, 2048, True), (164, 2048, False), (100, 1536, False), (64, 1024, False)],
)
def test_two_blocks_fit_on_a_multiprocessor(kernels, monkeypatch, kilobytes, threads, resident):
    """The threads of two blocks always fit, and so do their rows if the rows are resident in shared memory."""
    monkeypatch.setattr(cudasim, "shared_memory", kilobytes - 1 << 10)
    kernels.processor = cuda.Multiprocessor(kilobytes << 10, threads)
    x, weight, targets = head(bfloat16, (1,), 1, 50257)
    loss, _ = kernels.lm_head_forward(*on_device(x, weight, targets))
    assert error(loss, reference.lm_head_forward(x.astype("d"), weight.astype("d"), targets)[0]) < 1e-3
    constants = [dict(key[2:]) for key in kernels._functions]
    assert {(row["RESIDENT"], row["THREADS"]) for row in constants} == {(resident, threads // 2)}


def test_multiprocessor_resources_are_read_from_the_device(kernels):
    assert kernels.processor == (228 << 10, 2048)


def test_the_mean_of_many_rows(kernels):
    x, weight, targets = head("float32", (2500,), 2, 9)
    loss, _ = kernels.lm_head_forward(*on_device(x, weight, targets))
    assert error(loss, reference.lm_head_forward(x.astype("d"), weight.astype("d"), targets)[0]) < 1e-6


def test_float64_uses_the_reference():
    calls = []
    fallback = types.SimpleNamespace(
        **{name: lambda *_, name=name: calls.append(name) for name in ("lm_head_forward", "lm_head_backward")}
    )
    table = cuda.CudaKernels(library, fallback)
    x, weight, targets = on_device(np.ones((3, 8)), np.ones((9, 8)), np.zeros(3, int))
    table.lm_head_forward(x, weight, targets)
    table.lm_head_backward(None, x, x, weight, None)
    assert len(set(calls)) == 2


def test_cross_entropy_of_bfloat16_is_computed_in_float32():
    table = cuda.CudaKernels(None, reference)
    R = np.random.default_rng(5)
    logits, targets = R.normal(size=(4, 9)).astype(bfloat16), R.integers(0, 9, 4)
    loss, lse = table.cross_entropy_forward(logits, targets)
    correct, correct_lse = reference.cross_entropy_forward(logits.astype("d"), targets)
    assert lse.dtype == "float32"
    np.testing.assert_allclose(loss, correct, rtol=1e-6)
    dlogits = table.cross_entropy_backward(np.float32(2), logits, targets, lse)
    assert dlogits.dtype == bfloat16
    correct = reference.cross_entropy_backward(2, logits.astype("d"), targets, correct_lse)
    np.testing.assert_allclose(dlogits.astype("d"), correct, atol=2e-3)


FAULTS = [
    ("cross_entropy", "__syncthreads(); s.largest", "s.largest"),
    ("cross_entropy", "cp_async_wait<1>", "cp_async_wait<2>"),
    ("cross_entropy", "cp_async_wait<0>", "cp_async_wait<1>"),
    ("Logits", "padded &&", "false &&"),
    ("Softmax", "total *= exp_difference(before, largest);", ""),
    ("Softmax", "total * exp_difference(before, largest)", "total"),
    ("cross_entropy", "i == FULL ?", "false ?"),
    ("cross_entropy", "target / Vec::N % THREADS == threadIdx.x", "threadIdx.x == 0"),
    ("block_sum", "__syncthreads(); return threadIdx.x < 32", "return threadIdx.x < 32"),
]


CASES = [(bfloat16, (2,), 8, 17001), ("float32", (40,), 2, 9)]  # one for the gradient, one for the mean of the losses


def is_correct(kernels, dtype, shape, C, V):
    x, weight, targets = head(dtype, shape, C, V)
    weight[-1] = x[0]  # gives the last token, which is next to the padding, a high probability
    arguments = on_device(x, weight, targets)
    loss, dlogits = schedules(lambda: kernels.lm_head_forward(*arguments))
    correct_loss, correct = reference.lm_head_forward(x.astype("d"), weight.astype("d"), targets)
    return error(loss, correct_loss) < 2e-3 and error(dlogits, correct) < 1e-2 and not dlogits._a.base[:, V:].any()


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(kernels, monkeypatch, fault):
    inject_in(monkeypatch, "cross_entropy", fault)
    try:
        correct = all(is_correct(kernels, *case) for case in CASES)
    except (RuntimeError, AssertionError):
        correct = False
    device.reset()  # pytest's report of a failed assertion prints arrays, which counts as a sync
    assert not correct


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_check_passes_without_a_fault(kernels, case):
    assert is_correct(kernels, *case)
