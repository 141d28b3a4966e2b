"""tracing() reports operations with their values. Outside its context, nothing is called."""

import threading

import numpy as np
import pytest

from tinygrad2 import Tensor, no_grad, ops, recompute, record, tracer, tracing


def forward(x, weight):
    return ops.gelu(ops.linear(x, weight)) + x


@pytest.fixture
def operands():
    rng = np.random.default_rng(0)
    return Tensor(rng.normal(size=(2, 3))), Tensor(rng.normal(size=(3, 3)), requires_grad=True)


@pytest.mark.parametrize("gradients", [True, False])
def test_every_operation_is_reported_with_its_parents_and_results(operands, gradients):
    found = []
    x, weight = operands
    expected = forward(x, weight).numpy()
    with tracing(found.append):
        if gradients:
            y = forward(x, weight)
        else:
            with no_grad():
                y = forward(x, weight)
    assert [operation.name for operation in found] == ["linear", "gelu", "add"]
    assert found[0].parents == (x, weight)
    assert found[1].parents == found[0].results
    assert found[2].parents == (*found[1].results, x)
    assert found[2].results[0] is y
    assert np.array_equal(y.numpy(), expected)


def test_operations_with_several_results_and_user_defined_operations_are_reported(operands):
    x, _ = operands
    ones = Tensor(np.ones(3))

    def square_backward(saved, dy, into):
        return (2 * saved[0] * dy,)

    found = []
    with tracing(found.append):
        total, normalized = ops.add_layernorm(x, x, ones, ones)
        record(x.data**2, (x,), square_backward, saved=(x.data,))
        record(x.data**2, (x,), lambda saved, dy, into: (dy,))
    assert found[0].name == "add_layernorm"
    assert found[0].results == (total, normalized)
    assert (found[1].name, found[1].saved) == ("square", (x.data,))
    assert found[2].name == "<lambda>"


def test_operations_inside_recompute_are_reported(operands):
    found = []
    with tracing(found.append):
        recompute(forward, *operands)
    assert [operation.name for operation in found] == ["linear", "gelu", "add", "recompute"]


def test_nothing_is_called_outside_the_context_or_in_another_thread(operands, monkeypatch):
    found = []
    thread = threading.Thread(target=forward, args=operands)
    with tracing(found.append):
        thread.start()
        thread.join()
    with pytest.raises(ZeroDivisionError), tracing(found.append):
        raise ZeroDivisionError
    monkeypatch.setattr(tracer, "report", lambda *_: pytest.fail("an operation was reported"))
    forward(*operands).sum().backward()
    assert found == []


def test_contexts_can_be_nested(operands):
    outer, inner = [], []
    with tracing(outer.append):
        with tracing(inner.append):
            ops.linear(*operands)
        ops.gelu(operands[0])
    assert [operation.name for operation in outer] == ["gelu"]
    assert [operation.name for operation in inner] == ["linear"]
