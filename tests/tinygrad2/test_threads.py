"""tinygrad2/threads.py: the division of work, and the number of BLAS threads, which is restored."""

import subprocess
import sys

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from tinygrad2 import threads


@pytest.fixture(autouse=True)
def restored():
    before = threads.count()
    yield
    threads.set_count(before)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 17, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_cover_every_index_once(n, count):
    threads.set_count(count)
    for grain in (1, 4, 2000):
        pieces = threads.parts(n, grain)
        assert len(pieces) <= count
        assert [i for a, b in pieces for i in range(a, b)] == list(range(n))
        assert len(pieces) == 1 or min(b - a for a, b in pieces) >= grain


def test_importing_and_computing_do_not_change_blas():
    code = (
        "import numpy, threadpoolctl\n"
        "count = lambda: {i['filepath']: i['num_threads'] for i in threadpoolctl.threadpool_info()}\n"
        "before = count()\n"
        "import tinygrad2\n"
        "from tinygrad2 import Tensor, ops\n"
        "x = Tensor(numpy.ones((300, 300), 'f'), requires_grad=True)\n"
        "ops.linear(x, x).sum().backward()\n"
        "assert count() | before == count(), (before, count())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_set_count_rejects_zero():
    with pytest.raises(ValueError, match="expected 1 to 1,024"):
        threads.set_count(0)


def test_a_product_that_is_divided_into_parts_is_correct():
    cpu = pytest.importorskip("tinygrad2.kernels.cpu")
    R = np.random.default_rng(0)
    for count in (1, 2, 3):
        threads.set_count(count)
        for m, k, n in ((200, 64, 300), (300, 64, 200), (1, 500, 2000), (2000, 500, 1), (64, 1, 64)):
            x, dy, dweight = R.normal(size=(k, m)), R.normal(size=(k, n)), np.ones((m, n))
            cpu.linear_backward(dy, x, np.zeros((m, n)), dweight, None)
            np.testing.assert_allclose(dweight, 1 + x.T @ dy, rtol=1e-12, atol=1e-12)


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_the_blas_threads_are_restored_after_several_threads_limited_them():
    """The second caller finds BLAS limited to one thread, and must not restore this limit."""
    threads.set_count(2)
    before = blas_threads()
    first, second = threads.blas_on_one_thread(), threads.blas_on_one_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(blas_threads()) == {1}
    second.__exit__(None, None, None)
    assert blas_threads() == before
    assert max(before) == 2


@pytest.mark.parametrize("set_again", [False, True])
def test_an_interrupt_does_not_leave_blas_on_one_thread(set_again):
    threads.set_count(2)
    lost = threads.blas_on_one_thread()
    lost.__enter__()
    del lost  # as after Ctrl-C just before its __exit__
    if set_again:
        threads.set_count(2)
        assert max(blas_threads()) == 2
    with threads.blas_on_one_thread():
        assert set(blas_threads()) == {1}
    assert max(blas_threads()) == 2
