import itertools

import numpy as np
import pytest

from tinygrad2 import blas

R = np.random.default_rng(0)


def matrix(rows, columns, layout, dtype):
    """Random values, row-major, column-major, in a wider matrix, or with gaps that BLAS does not support."""
    if layout == "rows":
        return R.normal(size=(rows, columns)).astype(dtype)
    if layout == "columns":
        return R.normal(size=(columns, rows)).astype(dtype).T
    if layout == "part":
        return R.normal(size=(rows + 3, columns + 5)).astype(dtype)[2 : 2 + rows, 4 : 4 + columns]
    return R.normal(size=(rows, 2 * columns)).astype(dtype)[:, ::2]


LAYOUTS = ("rows", "columns", "part", "gaps")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (1, 9, 4), (6, 1, 1), (33, 65, 17), (4, 0, 3)], ids=str)
def test_a_product_in_every_layout(shape, dtype):
    m, k, n = shape
    for left, right, result in itertools.product(LAYOUTS, LAYOUTS, LAYOUTS):
        a, b, out = matrix(m, k, left, dtype), matrix(k, n, right, dtype), matrix(m, n, result, dtype)
        a.flags.writeable = b.flags.writeable = False
        expected = a.astype("float64") @ b.astype("float64")
        accumulated = out + expected
        blas.gemm(a, b, out, accumulate=True)
        np.testing.assert_allclose(out, accumulated, rtol=0, atol=1e-4 if dtype == "float32" else 1e-12)
        blas.gemm(a, b, out)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 if dtype == "float32" else 1e-12)


def test_only_the_part_is_written():
    whole = np.zeros((6, 8), dtype=np.float32)
    blas.gemm(np.ones((2, 3), np.float32), np.ones((3, 4), np.float32), whole[1:3, 2:6])
    assert whole.sum() == 2 * 4 * 3
    assert (whole[1:3, 2:6] == 3).all()


def test_numpy_is_used_if_no_library_is_found(monkeypatch):
    monkeypatch.setattr(blas, "_functions", {})
    a, b, out = R.normal(size=(3, 4)), R.normal(size=(4, 5)), np.ones((3, 5))
    blas.gemm(a, b, out, accumulate=True)
    np.testing.assert_allclose(out, 1 + a @ b)


def test_the_library_of_numpy_is_found():
    """NumPy's wheels contain OpenBLAS; without its address, attention would use the reference."""
    assert set(blas.ADDRESSES) == {"float32", "float64"}


def test_mkl_is_used_only_if_it_is_installed(monkeypatch):
    def missing(name):
        raise blas.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(blas.metadata, "files", missing)
    assert blas._mkl() is None
    monkeypatch.setattr(blas.metadata, "files", lambda name: None)  # installed, but its files are unknown
    assert blas._mkl() is None


def test_mkl_can_be_disabled(monkeypatch):
    def loaded(name):
        raise AssertionError("it searched for MKL")

    monkeypatch.setattr(blas.metadata, "files", loaded)
    monkeypatch.setenv("TINYGRAD2_BLAS", "numpy")
    assert blas._mkl() is None


def test_matrices_in_layouts_that_blas_does_not_support():
    """Strides that are not a multiple of the element size, and the other byte order."""
    records = np.zeros(5, dtype=[("row", np.float32, (6,)), ("mark", np.int16)])
    records["row"] = np.arange(30).reshape(5, 6)
    b = np.arange(24, dtype=np.float32).reshape(6, 4)
    expected = np.arange(30).reshape(5, 6) @ np.arange(24).reshape(6, 4)
    for a, right in ((records["row"], b), (records["row"].astype(">f4"), b), (records["row"], b.astype(">f4"))):
        out = np.ones((5, 4), dtype=np.float32)
        blas.gemm(a, right, out)
        np.testing.assert_array_equal(out, expected)
        blas.gemm(a, right, out, accumulate=True)
        np.testing.assert_array_equal(out, 2 * expected)
