"""kernels/embedding.cu on the simulator, compared with reference.py in float64 on the same numbers."""

import types

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins.faults import inject_in
from tests.stand_ins.strict_cupy import device, library, ndarray
from tests.tinygrad2.kernels.on_device import TOLERANCE, error, make_kernels, on_device, schedules
from tinygrad2 import reference
from tinygrad2.kernels import cuda

pytestmark = pytest.mark.slow  # compiles about a dozen kernels; test_cuda.py runs each of them too


@pytest.fixture
def kernels():
    device.reset()
    yield make_kernels()
    assert device.syncs == 0


def batch(B, T, V, seed=0):
    """Random tokens, about a third of which are the same, so that a large batch has a run of many chunks."""
    R = np.random.default_rng(seed)
    tokens = R.integers(0, V, (B, T))
    return np.where(R.random((B, T)) < 0.3, V // 2, tokens)


@pytest.mark.parametrize("dtype", ["float32", bfloat16])
@pytest.mark.parametrize(("B", "T", "C", "positions"), [(2, 5, 24, True), (3, 7, 13, True), (2, 9, 16, False)])
def test_embedding_forward_agrees_with_the_reference(kernels, dtype, B, T, C, positions):
    R = np.random.default_rng(1)
    tokens, wte, wpe = batch(B, T, 11), R.normal(size=(11, C)).astype(dtype), R.normal(size=(T + 4, C)).astype(dtype)
    arguments = on_device(tokens, wte, wpe)
    if not positions:
        wpe = arguments[2] = None
    correct = reference.embedding_forward(tokens, wte.astype("d"), wpe if wpe is None else wpe.astype("d"), 3)
    (y,) = schedules(lambda: [kernels.embedding_forward(*arguments, 3)])
    assert y.dtype == dtype
    assert error(y, correct) < TOLERANCE[y.dtype.name]
    for before, after in zip((tokens, wte, wpe), arguments, strict=True):
        assert before is None or before.tobytes() == after._a.tobytes()


def test_embedding_forward_accepts_a_single_token(kernels):
    wte = np.arange(24, dtype="f4").reshape(3, 8)
    y = kernels.embedding_forward(*on_device(np.int64(2), wte), None, 0)
    np.testing.assert_array_equal(y._a, wte[2])


def embedding_gradients(kernels, tokens, dtype, C, offset=0):
    """Return a function that computes the gradients, which start at element `offset`, and the expected gradients."""
    R = np.random.default_rng(2)
    (B, T), V, first = tokens.shape, 50, 2
    dy = R.normal(size=(B, T, C)).astype(dtype)
    grads = [R.normal(size=(rows, C)).astype("f4") for rows in (V, T + 3)]
    correct = [grad.astype("d") for grad in grads]
    reference.embedding_backward(dy.astype("d"), tokens, first, *correct)

    def compute():
        given = ndarray(dy.copy())
        places = [np.zeros(grad.size + offset, "f4")[offset:].reshape(grad.shape) for grad in grads]
        for place, grad in zip(places, grads, strict=True):
            place[...] = grad
        results = [ndarray(place) for place in places]
        kernels.embedding_backward(given, tokens, first, *results)
        assert given._a.tobytes() == dy.tobytes()
        return results

    return compute, correct


@pytest.mark.parametrize("dtype", ["float32", bfloat16])
@pytest.mark.parametrize(("B", "T", "C", "offset"), [(1, 1, 8, 0), (4, 32, 24, 0), (5, 111, 16, 1), (3, 67, 13, 0)])
def test_embedding_backward_agrees_with_the_reference(kernels, dtype, B, T, C, offset):
    compute, correct = embedding_gradients(kernels, batch(B, T, 50), dtype, C, offset)
    for result, expected in zip(schedules(compute), correct, strict=True):
        assert error(result, expected) < 1e-6  # gradients are float32 for every dtype of dy


@pytest.mark.parametrize(
    "tokens",
    [
        np.full((3, 128), 7),  # one run that ends with a chunk
        np.full((5, 129), 7),  # one run of more chunks than are read at once
        np.repeat([4, 7, 9], 64)[None],  # each run is one chunk
        np.repeat([4, 7, 9, 11], [63, 66, 127, 1])[None],  # runs that end before, at and after a chunk boundary
        np.arange(50)[None],
        np.repeat([4, 7, 9], [10, 200, 3])[None],
    ],
)
def test_embedding_backward_at_chunk_boundaries(kernels, tokens):
    compute, correct = embedding_gradients(kernels, tokens, bfloat16, 8)
    for result, expected in zip(compute(), correct, strict=True):
        assert error(result, expected) < 1e-6


def test_embedding_backward_skips_gradients_that_are_not_needed(kernels):
    kernels.embedding_backward(ndarray(np.ones((1, 3, 8), "f4")), np.zeros((1, 3), int), 0, None, None)


def test_float64_uses_the_reference():
    calls = []
    fallback = types.SimpleNamespace(
        **{name: lambda *_, name=name: calls.append(name) for name in ("embedding_forward", "embedding_backward")}
    )
    table = cuda.CudaKernels(library, fallback)
    tokens, rows = on_device(np.zeros(3, int), np.ones((9, 8)))
    table.embedding_forward(tokens, rows, None, 0)
    table.embedding_backward(rows, None, 0, None, None)
    assert len(set(calls)) == 2


FAULTS = [
    ("embedding_forward", "row % T", "row"),
    ("embedding_forward", "(first_position + row", "(row"),
    ("embedding_backward", "start > 0 && tokens[start - 1] == tokens[start]", "false"),
    ("embedding_backward", "i + k < rows ? tokens", "i + k < stop ? tokens"),
    ("embedding_backward", "if (began_earlier) sum.store(pieces); else", ""),
    ("embedding_backward", "began_earlier ? pieces : pieces + C", "pieces"),
    ("embedding_backward_long", "|| start > 0 && tokens[start - 1] == token", ""),
    ("embedding_backward_long", "&& tokens[next + k * BLOCK_ROWS] == token", ""),
    ("embedding_backward_long", "more = same_token[AHEAD - 1]", "more = false"),
    ("embedding_backward_positions", "(size_t)b * T + t", "(size_t)t * B + b"),
]


def forward_is_correct(kernels):
    R = np.random.default_rng(6)
    tokens, wte, wpe = batch(2, 5, 11), R.normal(size=(11, 8)).astype("f4"), R.normal(size=(9, 8)).astype("f4")
    y = kernels.embedding_forward(*on_device(tokens, wte, wpe), 3)
    return error(y, reference.embedding_forward(tokens, wte.astype("d"), wpe.astype("d"), 3)) < 1e-6


def backward_is_correct(kernels):
    # Some chunk boundaries are at the ends of runs, others are inside runs.
    tokens = np.repeat([4, 7, 9, 11], [64, 60, 68, 768]).reshape(3, 320)
    compute, correct = embedding_gradients(kernels, tokens, bfloat16, 16)
    return all(error(*pair) < 1e-6 for pair in zip(schedules(compute), correct, strict=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(kernels, monkeypatch, fault):
    inject_in(monkeypatch, "embedding", fault)
    try:
        correct = forward_is_correct(kernels) and backward_is_correct(kernels)
    except (RuntimeError, AssertionError):
        correct = False
    device.reset()  # pytest's report of a failed assertion prints arrays, which counts as a sync
    assert not correct


def test_the_check_passes_without_a_fault(kernels):
    assert forward_is_correct(kernels)
    assert backward_is_correct(kernels)
