import itertools
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from tinygrad2 import blas

R = np.random.default_rng(0)


def matrix(rows, columns, layout, dtype):
    """Random values: row-major, column-major, part of a larger matrix, or with gaps that BLAS does not support."""
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
def test_products_in_every_layout(shape, dtype):
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


def test_only_the_output_view_is_written():
    memory = np.zeros((6, 8), dtype=np.float32)
    blas.gemm(np.ones((2, 3), np.float32), np.ones((3, 4), np.float32), memory[1:3, 2:6])
    assert memory.sum() == 2 * 4 * 3
    assert (memory[1:3, 2:6] == 3).all()


def test_numpy_is_used_if_no_library_is_found(monkeypatch):
    monkeypatch.setattr(blas, "_chosen", blas.Library("numpy", "none", {}, False))
    a, b, out = R.normal(size=(3, 4)), R.normal(size=(4, 5)), np.ones((3, 5))
    blas.gemm(a, b, out, accumulate=True)
    np.testing.assert_allclose(out, 1 + a @ b)


def test_numpys_library_is_found():
    """NumPy's wheels contain OpenBLAS. If its address were not found, attention would use the reference."""
    assert set(blas.NUMPYS.calls) == {np.dtype("float32"), np.dtype("float64")}
    assert all(address for address, _ in blas.NUMPYS.calls.values())
    assert blas.NUMPYS.title.startswith("OpenBLAS 0.")


def test_mkl_is_not_considered_if_it_is_not_installed(monkeypatch):
    def missing(name):
        raise blas.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(blas.metadata, "files", missing)
    monkeypatch.setattr(blas.metadata, "version", missing)
    assert blas._mkl() is None
    assert blas._fastest() is blas.NUMPYS
    monkeypatch.setattr(blas.metadata, "files", lambda name: None)  # installed without a list of its files
    monkeypatch.setattr(blas.metadata, "version", lambda name: "1.2")
    assert blas._mkl() is None
    assert blas._fastest() is blas.NUMPYS


# The choice between two libraries, which have NumPy's functions and the speeds that a test specifies ------------------


@pytest.fixture
def set_rates(monkeypatch, tmp_path):
    """set_rates(numpy, mkl) sets the measured rates in GFLOP/s, and returns counts of measurements and loads of MKL."""
    mkl = replace(blas.NUMPYS, name="mkl", title="MKL 9.9")
    monkeypatch.setenv("TINYGRAD2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TINYGRAD2_BLAS", raising=False)
    monkeypatch.setattr(blas, "_chosen", None)
    version = blas.metadata.version
    monkeypatch.setattr(blas.metadata, "version", lambda name: "9.9" if name == "mkl" else version(name))
    counts = {"measured": 0, "loaded": 0}

    def load():
        counts["loaded"] += 1
        return mkl

    def inject(numpy_rate, mkl_rate):
        def measured(libraries):
            counts["measured"] += 1
            return {library.title: {"numpy": numpy_rate, "mkl": mkl_rate}[library.name] * 1e9 for library in libraries}

        monkeypatch.setattr(blas, "measure", measured)
        return counts

    monkeypatch.setattr(blas, "_mkl", load)
    return inject


@pytest.mark.parametrize(
    ("mkl_rate", "name"), [(50, "numpy"), (100, "numpy"), (109, "numpy"), (111, "mkl"), (200, "mkl")]
)
def test_another_library_is_chosen_if_it_is_faster_by_a_tenth(set_rates, mkl_rate, name):
    set_rates(100, mkl_rate)
    assert blas.chosen().name == name
    assert blas.considered() == {blas.chosen().title: max(100, mkl_rate if name == "mkl" else 0) * 1e9} | {
        blas.NUMPYS.title: 100e9,
        "MKL 9.9": mkl_rate * 1e9,
    }


def test_a_measurement_is_cached_by_processor_and_versions(set_rates, monkeypatch):
    counts = set_rates(100, 50)
    for _ in range(3):
        assert blas.chosen() is blas.NUMPYS
        monkeypatch.setattr(blas, "_chosen", None)  # as in a new process
    assert counts == {"measured": 1, "loaded": 1}  # MKL is not loaded if NumPy's library was faster
    monkeypatch.setattr(blas, "NUMPYS", replace(blas.NUMPYS, title="OpenBLAS 1"))
    assert blas.chosen().title == "OpenBLAS 1"
    assert counts["measured"] == 2
    monkeypatch.setattr(blas, "_chosen", None)
    monkeypatch.setattr(blas.machine, "processor_model", lambda: "another")
    set_rates(100, 120)
    assert blas.chosen().name == "mkl"
    assert counts["measured"] == 3
    assert json.loads(blas._file().read_text()).keys() == {"another", *json.loads(blas._file().read_text())}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 3}', '"' + "x" * 9 + '"'])
def test_a_damaged_cache_is_measured_again(set_rates, text):
    counts = set_rates(100, 150)
    blas._file().parent.mkdir(parents=True)
    blas._file().write_text(text)
    assert blas.chosen().name == "mkl"
    assert counts["measured"] == 1
    assert blas._cached_rates()["MKL 9.9"] == 150e9


def test_without_a_writable_cache_every_process_measures(set_rates, monkeypatch, tmp_path):
    counts = set_rates(100, 150)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TINYGRAD2_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        monkeypatch.setattr(blas, "_chosen", None)
        assert blas.chosen().name == "mkl"
    assert counts["measured"] == 2


def test_an_environment_variable_selects_the_library(set_rates, monkeypatch):
    counts = set_rates(100, 150)
    monkeypatch.setenv("TINYGRAD2_BLAS", "numpy")
    assert blas.chosen() is blas.NUMPYS
    assert not blas.use("mkl")  # a checkpoint's library does not override it
    assert blas.use("numpy")
    assert counts == {"measured": 0, "loaded": 0}
    for name, message in (("atlas", "TINYGRAD2_BLAS is 'atlas'; expected numpy or mkl"), ("mkl", "not installed")):
        monkeypatch.setattr(blas, "_chosen", None)
        monkeypatch.setattr(blas, "_mkl", lambda: None)
        monkeypatch.setenv("TINYGRAD2_BLAS", name)
        with pytest.raises(ValueError, match=message):
            blas.chosen()


def test_a_library_can_be_selected_by_name(set_rates, monkeypatch):
    counts = set_rates(100, 50)
    assert blas.use("mkl")
    assert blas.chosen().name == "mkl"
    assert counts["measured"] == 0
    assert blas.use("numpy")
    assert not blas.use("atlas")
    monkeypatch.setattr(blas, "_mkl", lambda: None)
    assert not blas.use("mkl")
    assert blas.chosen() is blas.NUMPYS


def test_the_measurement_is_short():
    started = time.perf_counter()
    found = blas.measure([blas.NUMPYS])
    assert found[blas.NUMPYS.title] > 1e8
    assert time.perf_counter() - started < 30
    assert blas.NUMPYS.title in blas.description()


def test_matrices_in_layouts_that_blas_does_not_support():
    """Strides that are not a multiple of the element size, and swapped byte order."""
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
