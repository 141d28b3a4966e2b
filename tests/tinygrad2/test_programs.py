"""Random programs (see programs.py), compared with NumPy and PyTorch. tests/benchmarks/programs.py runs 10,000."""

import numpy as np
import pytest

from tests.benchmarks import programs as benchmark
from tests.tinygrad2 import programs
from tests.tinygrad2.programs import OPERATIONS, Program, Step, draw_program, failure, from_generator
from tinygrad2 import Tensor, tensor

hypothesis = pytest.importorskip("hypothesis")
SETTINGS = {"deadline": None, "derandomize": True, "database": None, "print_blob": False}


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def check_programs(count, torch):
    """Check programs drawn by hypothesis. A failing program is shrunk, and the error message shows it."""

    @hypothesis.settings(max_examples=count, suppress_health_check=list(hypothesis.HealthCheck), **SETTINGS)
    @hypothesis.given(hypothesis.strategies.data())
    def check(data):
        program = draw_program(lambda choices: data.draw(hypothesis.strategies.sampled_from(choices)))
        reason = failure(program, torch)
        assert reason is None, f"{reason}\n{program}"

    check()


def test_values_of_random_programs_equal_numpys():
    check_programs(40, None)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.extras("torch")
def test_values_and_gradients_of_random_programs_equal_pytorchs():
    import torch

    check_programs(400, torch)


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_operation_agrees_with_pytorch(operation):
    import torch

    seen = 0
    for seed in range(400):
        draw = from_generator(np.random.default_rng(seed))
        leaves = [np.random.default_rng(seed + i).normal(size=(2, 3)[: seed % 3]) for i in range(operation.count)]
        if operation.name == "@":
            leaves = [leaves[0].reshape(-1, 1) if leaves[0].ndim < 2 else leaves[0].T, np.ones((2, 3))[:, :2].T[:1]]
            leaves[1] = np.ones((leaves[0].shape[1], 2))
        drawn = operation.draws(draw, *leaves)
        if drawn is not None:
            program = Program(leaves, [Step(operation, tuple(range(operation.count)), drawn, False)])
            assert failure(program, torch) is None, program
            seen += 1
        if seen == 6:
            return
    raise AssertionError(f"{operation.name} was drawn {seen} times")


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_a_wrong_gradient_is_detected(monkeypatch):
    import torch

    found = []
    original = tensor._scale_backward
    monkeypatch.setattr(tensor, "_scale_backward", lambda saved, dy, into: (1.001 * original(saved, dy, into)[0],))
    for seed in range(100):
        reason = failure(draw_program(from_generator(np.random.default_rng(seed))), torch)
        found += [reason] if reason else []
    assert found
    assert all(reason.startswith("gradient of x") for reason in found)


def test_a_wrong_value_is_detected(monkeypatch):
    monkeypatch.setattr(Tensor, "cumsum", lambda x, axis: x * 1.0)
    program = Program([np.ones(3)], [Step(next(o for o in OPERATIONS if o.name == "cumsum"), (0,), (0,), False)])
    assert failure(program, None) == "cumsum, compared with NumPy: [1.0, 1.0, 1.0]; expected [1.0, 2.0, 3.0]"


def test_the_benchmark_counts_failures(monkeypatch, capsys):
    assert benchmark.main(["--count", "3"]) == 0
    assert "3 programs compared with NumPy" in capsys.readouterr().out
    monkeypatch.setattr(programs, "difference", lambda got, expected: "wrong")
    assert benchmark.main(["--count", "3", "--first", "5"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("seed 5: ")
    assert ": 3 failures\n" in out
