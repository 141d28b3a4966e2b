"""kernels/gelu.cu on the simulator, compared with reference.py in float64 on the same inputs."""

import numpy as np
import pytest

from tests.stand_ins.faults import inject_in
from tests.tinygrad2.kernels.against_reference import (
    BF16,
    F32,
    bits_in,
    check,
    check_fallback,
    check_unaligned,
    fault_is_caught,
    kernels,
    normal,
    wide,
)
from tinygrad2 import reference
from tinygrad2.kernels import cuda

pytestmark = pytest.mark.slow  # compiles about a dozen kernels; test_cuda.py runs each of them too


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
    ("rows", "C", "dtype", "bias_dtype"),
    [(21, 264, BF16, BF16), (70, 21, BF16, F32), (9, 36, F32, F32), (5, 64, BF16, None)],
)
def test_gelu_agrees_with_the_reference(rows, C, dtype, bias_dtype):
    for case in gelu_cases(rows, C, dtype, bias_dtype):
        check(kernels(), *case)


def test_gelu_of_large_arguments():
    """The relative error is below 2e-5 even for tiny values; the limits are correct if the exponential overflows."""
    u = np.linspace(-8, 8, 1008, dtype=F32).reshape(-1, 36)
    y = kernels().gelu_forward(u, np.zeros(36, F32))
    e = np.exp(-2 * reference._GELU_SCALE * (wide(u) + reference._GELU_CUBIC * wide(u) ** 3))
    np.testing.assert_allclose(y, wide(u) / (1 + e), rtol=2e-5, atol=1e-37)
    far = np.repeat(np.array([-1e4, -50, 50, 1e4], dtype=F32), 9)[None]
    assert np.array_equal(kernels().gelu_forward(far, np.zeros(36, F32)), np.maximum(far, 0))
    assert np.array_equal(kernels().gelu_backward(np.ones_like(far), far, np.zeros(36, F32), None), far > 0)


def test_float64_uses_the_reference():
    check_fallback(gelu_cases(3, 8, F32, F32))


def test_unaligned_matrices_give_the_same_results():
    check_unaligned(gelu_cases(101, 264, BF16, BF16))


def run():
    return [r for case in gelu_cases(101, 264, BF16, BF16) for r in check(kernels(), *case)]


def test_results_are_bit_identical_with_every_schedule(monkeypatch):
    monkeypatch.setattr(cuda, "PROCESSORS", 1)
    first = bits_in(0, run)
    assert all(bits_in(schedule, run) == first for schedule in (1, 2, 3))


FAULTS = {
    "a row is skipped": ("gelu", "forward", "row += AHEAD * step", "row += (AHEAD + 1) * step"),
    "a row is added twice": ("gelu", "backward", "row += ROWS * step", "row += step"),
    "a missing barrier": ("gelu", "store_partial", "__syncthreads(); int c = blockIdx.x", "int c = blockIdx.x"),
    "a warp is skipped": ("gelu", "store_partial", "warp < WARPS; warp++", "warp < WARPS - 1; warp++"),
    "no bias": ("gelu", "bias_of", "f32(bias[c])", "0.f * f32(bias[c])"),
    "the last columns are skipped": ("gelu", "backward", "c < C) {", "c < C - 8) {"),
    "a wrong coefficient": ("gelu", "CUBIC", "0.044715f", "0.0047f"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(monkeypatch, fault):
    monkeypatch.setattr(cuda, "PROCESSORS", 1)
    family, *edit = FAULTS[fault]
    assert fault_is_caught(lambda: inject_in(monkeypatch, family, tuple(edit)), run)
