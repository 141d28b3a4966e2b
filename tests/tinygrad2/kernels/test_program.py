"""kernels/program.py: each operation gives the same bits as the kernel of the same name."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

cpu = pytest.importorskip("tinygrad2.kernels.cpu")
from tinygrad2.kernels.program import Program  # noqa: E402

R = np.random.default_rng(0)
ROWS = pytest.mark.parametrize("rows", [1, 3, 32])


def array(*shape):
    return R.normal(size=shape).astype(np.float32)


def run(position=0, **operations):
    """Run a program of these operations, given as name=arguments."""
    program = Program()
    for name, arguments in operations.items():
        getattr(program, name)(*arguments)
    program.run(position)


@ROWS
@pytest.mark.parametrize("C", [64, 100])
def test_layernorm_equals_the_kernel(rows, C):
    x, delta, weight, bias, y = array(rows, C), array(rows, C), array(C), array(C), array(rows, C)
    expected, *_ = cpu.layernorm_forward(x, weight, bias, 1e-5)
    run(layernorm=(x, None, weight, bias, 1e-5, y))
    np.testing.assert_array_equal(y, expected)
    expected_sum, expected, *_ = cpu.add_layernorm_forward(x, delta, weight, bias, 1e-3)
    run(layernorm=(x, delta, weight, bias, 1e-3, y))
    np.testing.assert_array_equal(x, expected_sum)
    np.testing.assert_array_equal(y, expected)


@ROWS
@pytest.mark.parametrize("dtype", [np.float32, bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("N", [31, 64, 1000])
def test_linear_equals_the_kernel(rows, dtype, N, set_threads):
    set_threads(3)
    x, weight, bias, y = array(rows, 70), array(70, N).astype(dtype), array(N), array(rows, N)
    for w in (weight, np.asarray(weight, order="F")):
        for b in (bias, None):
            run(linear=(x, w, b, y))
            np.testing.assert_array_equal(y, cpu.linear_forward(x, w, b))


@ROWS
@pytest.mark.parametrize("N", [5, 2000, 3072])
def test_gelu_equals_the_kernel_also_in_place(rows, N, set_threads):
    set_threads(3)
    x, bias, y = 3 * array(rows, N), array(N), array(rows, N)
    expected = cpu.gelu_forward(x, bias)
    run(gelu=(x, bias, y))
    np.testing.assert_array_equal(y, expected)
    run(gelu=(x, bias, x))
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("position", [0, 9, cpu.CACHE_BLOCK, cpu.CACHE_BLOCK + 20])
def test_attention_cached_equals_the_kernel(position, set_threads):
    set_threads(3)
    qkv, cache, out = array(2, 3 * 64), array(2, 2, 2, cpu.CACHE_BLOCK + 30, 32), array(2, 64)
    other = cache.copy()
    expected = cpu.attention_cached(qkv[:, None], other, position, 2)[:, 0]
    run(position, attention_cached=(qkv, cache, 2, out))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(cache, other)


def test_a_program_runs_in_order_and_repeatedly():
    x, first, second = array(1, 64), array(64, 300), array(300, 64)
    hidden, y, bias = array(1, 300), array(1, 64), array(300)
    program = Program()
    program.linear(x, first, None, hidden)
    program.gelu(hidden, bias, hidden)
    program.linear(hidden, second, None, y)
    for _ in range(3):
        x[...] = array(1, 64)
        program.run(0)
        expected = cpu.linear_forward(cpu.gelu_forward(cpu.linear_forward(x, first, None), bias), second, None)
        np.testing.assert_array_equal(y, expected)


def test_supported_sizes():
    assert Program.supports(cpu.GEMV_ROWS, 64)
    assert not Program.supports(cpu.GEMV_ROWS + 1, 64)
    assert not Program.supports(1, 20)
