"""Matrix products through cuBLASLt's interface, with the stand-in tests/stand_ins/cublaslt.cpp, compared with NumPy."""

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import strict_cupy
from tests.stand_ins.faults import inject
from tinygrad2 import reference
from tinygrad2.kernels import gemm as gemm_module
from tinygrad2.kernels.cuda import CudaKernels
from tinygrad2.kernels.gemm import Gemm

SOURCE = Path(__file__).parents[2] / "stand_ins" / "cublaslt.cpp"
GEMM = Path(gemm_module.__file__).read_text(encoding="utf-8")
ERROR = {bfloat16: 6e-3, np.float32: 2e-6}  # relative to the largest element
rng = np.random.default_rng(0)


class Poisoned(strict_cupy.Library):
    """The stand-in for CuPy. New arrays are filled with NaN."""

    def empty(self, shape, dtype):
        return device(np.full(shape, 0xFF if np.dtype(dtype).kind == "u" else np.nan, dtype=dtype))


device = strict_cupy.ndarray


@pytest.fixture
def gemm(fake_cublaslt):
    return Gemm(Poisoned(), fake_cublaslt)


def normal(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def wide(x, stride):
    """A view with the values of x and this row stride, with NaN between the rows."""
    rows = np.full((x.shape[0], stride), np.nan, dtype=x.dtype)
    rows[:, : x.shape[1]] = x
    return rows[:, : x.shape[1]]


def assert_close(got, want, error):
    got = got._a.astype(np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= error * max(1, np.abs(want).max())


def f64(x):
    return x.astype(np.float64)


@pytest.mark.parametrize("dtype", [bfloat16, np.float32])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_products_are_correct_for_every_transpose_dtype_and_scale(gemm, dtype, accumulate, strided):
    options = itertools.product((0, 1), (0, 1), {dtype, np.float32}, (None, 0.375), ((5, 7, 11), (1, 24, 8), (9, 1, 3)))
    for ta, tb, out_dtype, scale, (m, n, k) in options:
        a, b, out = normal(*((k, m) if ta else (m, k)), dtype=dtype), None, normal(m, n, dtype=out_dtype)
        b = normal(*((n, k) if tb else (k, n)), dtype=dtype)
        want = (scale or 1) * (f64(a).T if ta else f64(a)) @ (f64(b).T if tb else f64(b)) + accumulate * f64(out)
        if strided:
            a, b, out = wide(a, a.shape[1] + 3), wide(b, 40), wide(out, 33)
        if not accumulate:
            out[...] = np.nan
        before, factor = (a.copy(), b.copy()), None if scale is None else device(np.full((), scale, dtype=np.float32))
        y = device(out)
        assert gemm(device(a), device(b), y, transpose_a=ta, transpose_b=tb, accumulate=accumulate, scale=factor) is y
        assert_close(y, want, ERROR[out_dtype])
        assert np.array_equal(a, before[0])
        assert np.array_equal(b, before[1])
        assert not strided or np.isnan(f64(out.base)[:, n:]).all()


def test_each_transpose_of_the_same_memory_has_its_own_plan(gemm):
    a, b, y = (device(normal(8, 8)) for _ in range(3))
    for ta, tb in itertools.product((False, True), repeat=2):
        want = f64(a._a.T if ta else a._a) @ f64(b._a.T if tb else b._a)
        assert_close(gemm(a, b, y, transpose_a=ta, transpose_b=tb), want, 2e-6)


def test_column_major_views_are_read_in_place_and_others_are_copied(gemm):
    a, b = normal(6, 5, dtype=bfloat16), normal(8, 6, dtype=bfloat16)
    want = f64(a).T @ f64(b).T
    strict_cupy.device.reset()
    assert_close(gemm(device(a).T, device(b).T), want, ERROR[bfloat16])
    assert_close(gemm(device(a).T, device(b), transpose_b=True), want, ERROR[bfloat16])
    assert strict_cupy.device.syncs == 0
    assert_close(gemm(device(np.repeat(a, 2, axis=1)[:, ::2]).T, device(b[::-1])[::-1].T), want, ERROR[bfloat16])


def test_tf32_rounds_float32_operands_only(gemm):
    a, b = normal(16, 64), normal(64, 16)
    want, exact = f64(a) @ f64(b), gemm(device(a), device(b))._a
    half = [device(x.astype(bfloat16)) for x in (a, b)]
    before = gemm(*half)._a
    error = np.abs(gemm(device(a), device(b), tf32=True)._a - want).max()
    assert np.abs(exact - want).max() < 2e-5 < error < 2e-2
    assert np.array_equal(gemm(*half, tf32=True)._a, before)
    assert np.array_equal(gemm(device(a), device(b))._a, exact)  # the two products have different plans


@pytest.mark.parametrize("dtype", [bfloat16, np.float32])
def test_a_bias_is_added(gemm, dtype):
    a, b, bias = normal(6, 10, dtype=dtype), normal(10, 16, dtype=dtype), normal(16, dtype=dtype)
    y = gemm(device(a), device(b), bias=device(bias))
    assert_close(y, f64(a) @ f64(b) + f64(bias), 2 * ERROR[dtype])


def test_plans_are_cached_by_alignment_and_workspaces_by_stream(gemm):
    memory = np.zeros(4096, dtype=np.uint8)
    start = -memory.ctypes.data % 256
    a, b = normal(4, 8, dtype=bfloat16), normal(8, 8, dtype=bfloat16)
    for offset, plans in ((0, 1), (256, 1), (2, 2), (16, 3), (2, 3)):
        bias = memory[start + 2048 + offset :][:16].view(bfloat16)
        bias[:] = offset
        assert_close(gemm(device(a), device(b), bias=device(bias)), f64(a) @ f64(b) + offset, 2 * ERROR[bfloat16])
        assert len(gemm._plans) >= plans
    with strict_cupy.Stream(non_blocking=True) as other:
        gemm(device(a), device(b))
    assert set(gemm._workspaces) == {0, other.ptr}


def test_invalid_arguments_are_rejected_before_cublas_is_called(gemm):
    f, h = device(normal(8, 8)), device(normal(8, 8, dtype=bfloat16))
    row, bias = device(normal(8)), device(normal(7))
    for args, options, message in (
        ((f, h), {}, "cannot multiply float32 by bfloat16 into float32"),
        ((f, f, h), {}, "into bfloat16"),
        ((device(normal(8, 8).astype("f8")), f), {}, "cannot multiply float64"),
        ((f, device(normal(7, 8))), {}, "cannot multiply"),
        ((device(normal(0, 8)), f), {}, "is empty"),
        ((f, f, device(normal(8, 8).T)), {}, "row-major"),
        ((row, f), {}, "2 axes"),
        ((f, f), {"bias": bias}, "bias"),
        ((h, h), {"bias": row}, "bias"),
        ((f, f), {"scale": row}, "one float32"),
    ):
        with pytest.raises(ValueError, match=message):
            gemm(*args, **options)


def test_a_missing_library_and_a_failing_call_are_reported(gemm, tmp_path):
    f = device(normal(2, 2))
    with pytest.raises(ValueError, match="cuBLASLt was not found"):
        Gemm(Poisoned(), str(tmp_path / "none.so"))(f, f)
    gemm(f, f)
    preference = gemm._new("MatmulPreferenceCreate")
    with pytest.raises(RuntimeError, match=r"MatmulPreferenceSetAttribute failed: invalid value \(status 7\)"):
        gemm._call("MatmulPreferenceSetAttribute", preference, 99, ctypes.byref(ctypes.c_int()), 4)


def test_creating_a_handle_is_retried(gemm, monkeypatch):
    call, failed = Gemm._call, []

    def once_busy(self, name, *args):
        if name == "Create" and not failed:
            failed.append(name)
            raise RuntimeError("cublasLtCreate failed: no memory (status 3)")
        call(self, name, *args)

    monkeypatch.setattr(Gemm, "_call", once_busy)
    f = device(normal(2, 2))
    with pytest.raises(RuntimeError, match="no memory"):
        gemm(f, f)
    assert_close(gemm(f, f), f64(f._a) @ f64(f._a), 2e-6)


# Launchers


@pytest.fixture
def kernels(fake_cublaslt):
    kernels = CudaKernels(Poisoned(), reference)
    kernels.gemm = Gemm(Poisoned(), fake_cublaslt)
    return kernels


@pytest.mark.parametrize("dtype", [bfloat16, np.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_agrees_with_the_reference(kernels, dtype, has_bias):
    x, dy = normal(2, 5, 12, dtype=dtype), normal(2, 5, 7, dtype=dtype)
    weight, bias = normal(12, 7, dtype=dtype), normal(7, dtype=dtype) if has_bias else None
    error = 2 * ERROR[dtype]
    for w in (device(weight), device(np.ascontiguousarray(weight.T)).T):
        y = kernels.linear_forward(device(x), w, None if bias is None else device(bias))
        assert y.dtype == dtype
        assert_close(y, reference.linear_forward(f64(x), f64(weight), None if bias is None else f64(bias)), error)
        dweight, dbias = normal(12, 7), normal(7)
        want = [f64(dweight), f64(dbias)]
        got = [device(dweight), device(dbias) if has_bias else None]
        dx = kernels.linear_backward(device(dy), device(x), w, *got)
        assert_close(dx, reference.linear_backward(f64(dy), f64(x), f64(weight), *want), error)
        assert_close(got[0], want[0], 2e-6)
        if has_bias:
            assert_close(got[1], want[1], 2e-6)
    kernels.linear_backward(device(dy), device(x), device(weight), None, None)


def test_bfloat16_weights_are_converted_to_float32(kernels):
    x, weight, bias = normal(3, 8), normal(8, 5, dtype=bfloat16), normal(5, dtype=bfloat16)
    want = f64(x) @ f64(weight) + f64(bias)
    assert_close(kernels.linear_forward(device(x), device(weight), device(bias)), want, 2e-6)


FAULTS = [
    ("__call__", "for x in (b, a, out)]", "for x in (a, b, out)]"),
    ("_plan", "TRANSA, c_int(transpose_b)", "TRANSA, c_int(transpose_a)"),
    ("_plan", "BIAS_TYPE, c_int(out.type)", "BIAS_TYPE, c_int(14 - out.type)"),
    ("_plan", "REDUCTION_COMPUTE_TYPE))", "7))"),
    ("__call__", "self._one if accumulate else self._zero", "self._zero"),
    ("__call__", "ptr + 4 * accumulate", "ptr"),
    ("_plan", "c_int(device_scalars)", "c_int(2 * device_scalars)"),
    ("__call__", "_alignment(bias_address)", "_alignment(256)"),
    ("__call__", "if bias_address:", "if False:"),
    ("__call__", "transpose_a, transpose_b, tf32", "tf32"),
    ("_matrix", "_row_stride(x)", "x.shape[1]"),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(fake_cublaslt, fault):
    text = inject(GEMM, *fault)
    module = {"__name__": gemm_module.__name__, "__file__": ""}
    exec(compile(text, "faulty", "exec"), module)
    faulty = module["Gemm"](Poisoned(), fake_cublaslt)

    def run():
        for dtype, accumulate in itertools.product((bfloat16, np.float32), (False, True)):
            test_products_are_correct_for_every_transpose_dtype_and_scale(faulty, dtype, accumulate, True)
            test_a_bias_is_added(faulty, dtype)
        test_each_transpose_of_the_same_memory_has_its_own_plan(faulty)
        test_plans_are_cached_by_alignment_and_workspaces_by_stream(faulty)

    with pytest.raises((AssertionError, RuntimeError)):
        run()
