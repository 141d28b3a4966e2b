import numpy as np
import pytest

from tinygrad2 import Tensor, ops
from tinygrad2.backend import get_backend
from tinygrad2.profiler import Profiler


def step(x):
    ops.gelu(Tensor(x, requires_grad=True)).sum().backward()


def test_the_time_of_a_step_is_attributed_to_its_operations(monkeypatch):
    backend = get_backend("cpu")
    before = dict(vars(backend.kernels))
    clock = iter(range(1000))
    monkeypatch.setattr(type(backend), "timestamp", lambda self: next(clock) / 1000)
    profiler = Profiler(backend)
    for _ in range(2):
        with profiler:
            step(np.ones((2, 3)))
    assert vars(backend.kernels) == before, "the kernels were not restored"
    rows = {line[:20].strip(): line[20:].split() for line in profiler.table()}
    # With this clock, each of the 4 kernels takes 1 ms, and so does each of the 5 gaps before, between and after them.
    assert rows["gelu"] == ["2", "1.00", "1.00", "22.2%"]
    assert rows["sum"] == ["2", "1.00", "1.00", "22.2%"]
    assert rows["outside kernels"] == ["5.00", "55.6%"]
    assert rows["step"] == ["9.00", "100.0%"]


def test_the_kernels_are_restored_after_an_error():
    backend = get_backend("cpu")
    before = dict(vars(backend.kernels))
    with pytest.raises(ZeroDivisionError), Profiler(backend):
        raise ZeroDivisionError
    assert vars(backend.kernels) == before
