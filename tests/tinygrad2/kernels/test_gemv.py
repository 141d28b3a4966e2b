"""kernels/gemv.py: products with few rows, compared with float64, for all edge cases, layouts and dtypes of weights."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tinygrad2 import threads

gemv = pytest.importorskip("tinygrad2.kernels.gemv")
cpu = pytest.importorskip("tinygrad2.kernels.cpu")
from numba import cfunc  # noqa: E402

from tinygrad2.kernels import pool  # noqa: E402

ROOT = Path(__file__).parents[3]
DTYPES = pytest.mark.parametrize("dtype", [np.float32, bfloat16], ids=["float32", "bfloat16"])
LAYOUTS = pytest.mark.parametrize("layout", ["C", "F"], ids=["rows", "columns"])
SHAPES = [(1, 1), (1, 300), (300, 1), (3, 5), (4, 16), (5, 17), (31, 33), (64, 64), (131, 257), (127, 1100), (770, 47)]


@pytest.fixture(params=["native", "without AVX-512"])
def lanes(request, monkeypatch):
    """Test both vector widths. Code for the narrow one is not cached on disk."""
    if "without" in request.param:
        monkeypatch.setattr(gemv, "LANES", 8)
        monkeypatch.setattr(gemv, "ROWS", 2)
        monkeypatch.setattr(pool, "cfunc", lambda signature, cache: cfunc(signature))
        monkeypatch.setattr(gemv, "_tasks", NARROW)


NARROW: dict = {}


def matrices(M, K, N, dtype, layout, seed=0):
    R = np.random.default_rng(seed)
    x, y = R.normal(size=(M, K)).astype(np.float32), R.normal(size=(M, N)).astype(np.float32)
    return x, np.asarray(R.normal(size=(K, N)).astype(np.float32).astype(dtype), order=layout), y


def check(x, w, y):
    wide = [a.astype(np.float64) for a in (x, w, y)]
    before = x.copy(), w.copy()
    gemv.add_product(x, w, y)
    expected = wide[2] + wide[0] @ wide[1]
    scale = np.abs(wide[2]) + np.abs(wide[0]) @ np.abs(wide[1])  # sums of the absolute values
    assert (np.abs(y - expected) <= 2e-7 * (4 + x.shape[1] / 8) * scale).all()
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(w, before[1])


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_agree_with_float64(shape, dtype, layout, lanes):
    for M in (1, 2, 3, 5, 6, 7, 13, 32, 33):
        check(*matrices(M, *shape, dtype, layout))


@DTYPES
@LAYOUTS
def test_products_with_any_number_of_rows(dtype, layout):
    for M in range(34):
        check(*matrices(M, 37, 29, dtype, layout))


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("shape", [(37, 0), (0, 37)])
def test_empty_products_change_nothing(shape, dtype, layout):
    x, w, y = matrices(3, *shape, dtype, layout)
    before = y.copy()
    gemv.add_product(x, w, y)
    np.testing.assert_array_equal(y, before)


@DTYPES
@LAYOUTS
def test_a_row_does_not_depend_on_the_number_of_threads_or_on_other_rows(dtype, layout, set_threads, monkeypatch):
    monkeypatch.setattr(gemv, "GRAIN", 1)  # many parts even for a small matrix
    for K, N in ((131, 1013), (16, 4001)):
        x, w, y = matrices(7, K, N, dtype, layout)
        results = []
        for count in (1, 2, 3, 5):
            set_threads(count)
            assert len(threads.parts(-(-N // gemv.LANES), 64 // gemv.LANES)) == count
            result = y.copy()
            gemv.add_product(x, w, result)
            results.append(result)
        alone = y.copy()
        for row in range(len(x)):
            gemv.add_product(x[row : row + 1], w, alone[row : row + 1])
        for result in (*results[1:], alone):
            np.testing.assert_array_equal(result, results[0])


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_propagate(dtype, layout, bad):
    K, N = 37, 85
    for k, j in ((0, 0), (36, 3), (5, 84), (36, 84), (17, 40)):
        x, w, y = matrices(7, K, N, dtype, layout)
        w[k, j] = bad
        gemv.add_product(x, w, y)
        assert not np.isfinite(y[:, j]).any()
        assert np.isfinite(np.delete(y, j, axis=1)).all()
        x, w, y = matrices(7, K, N, dtype, layout)
        x[2, k] = bad
        gemv.add_product(x, w, y)
        assert not np.isfinite(y[2]).any()
        assert np.isfinite(np.delete(y, 2, axis=0)).all()


@pytest.mark.parametrize("layout", ["C", "F"])
def test_every_bfloat16_value_is_read_exactly(layout):
    """All 65,536 values, including zeros, denormals and infinities, are converted as in ml_dtypes."""
    every = np.arange(1 << 16, dtype=np.uint16).view(bfloat16)
    w = np.asarray(every.reshape(1, -1) if layout == "C" else np.repeat(every.reshape(1, -1), 2, axis=0), order=layout)
    x, y = np.ones((1, 1), np.float32), np.zeros((1, 1 << 16), np.float32)
    if layout == "F":
        x = np.array([[1, 0]], np.float32)
    gemv.add_product(x, w, y)
    expected = every.astype(np.float32)
    if layout == "F":  # infinity times 0 is NaN
        expected = np.where(np.isinf(expected), np.nan, expected)
    np.testing.assert_array_equal(y[0], expected)


def test_supported_weights():
    x = np.ones((2, 6), np.float32)
    w = np.ones((6, 8), np.float32)
    assert gemv.supports(x, w)
    assert gemv.supports(x, w.astype(bfloat16))
    assert gemv.supports(x, np.ones((8, 6), bfloat16).T)
    assert not gemv.supports(x, w[:, ::2])
    assert not gemv.supports(x, w[:, :5])
    assert not gemv.supports(x, np.ones((12, 8), bfloat16)[::2])
    assert not gemv.supports(x, w.astype(np.float64))
    assert not gemv.supports(x, w.astype(np.float16))
    assert not gemv.supports(x, w.astype(">f4"))
    assert not gemv.supports(x.astype(np.float64), w)


@DTYPES
@pytest.mark.parametrize("rows", [1, 7, cpu.GEMV_ROWS, cpu.GEMV_ROWS + 1, 100])
@pytest.mark.parametrize(
    "cut", [(slice(None), slice(None)), (slice(None), slice(None, None, 2)), (slice(0, 32), slice(0, 40))]
)
def test_linear_supports_any_weights_and_any_number_of_rows(dtype, rows, cut):
    """Tests few and many rows, weights that gemv does and does not support, and contiguous and strided x."""
    R = np.random.default_rng(0)
    with_onednn = dtype == bfloat16 and cpu.onednn.library() is not None  # rounds x to bfloat16
    for w in (R.normal(size=(50, 90)).astype(dtype)[cut], R.normal(size=(90, 50)).astype(dtype).T[cut]):
        wide, bias = w.astype(np.float64), R.normal(size=w.shape[1]).astype(np.float32)
        for x in (
            R.normal(size=(rows, len(w))).astype(np.float32),
            R.normal(size=(rows, 2 * len(w))).astype(np.float32)[:, ::2],
        ):
            y = cpu.linear_forward(x, w, bias)
            assert y.dtype == np.float32
            rounded = with_onednn and not (rows <= cpu.GEMV_ROWS and gemv.supports(x, w))
            read = (x.astype(bfloat16) if rounded else x).astype(np.float64)
            np.testing.assert_allclose(y, read @ wide + bias, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_the_next_process_uses_the_cached_code(tmp_path):
    script = (
        "import numpy as np\n"
        "from tinygrad2.kernels import gemv\n"
        "for order in 'CF':\n"
        "    gemv.add_product(np.ones((1, 8), 'f'), np.ones((8, 8), 'f', order=order), np.zeros((1, 8), 'f'))\n"
        "print([task.cache_hits for task in gemv._tasks.values()])\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert outputs == ["[0, 0]\n", "[1, 1]\n"]
