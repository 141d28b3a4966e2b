import gc
import weakref

import numpy as np
import pytest

from tinygrad2 import Tensor, autograd, nn, no_grad, ops, optim, recompute
from tinygrad2.gradcheck import CASES
from tinygrad2.params import Parameter
from tinygrad2.tensor import record


def leaf(values, dtype="float64"):
    return Tensor(np.array(values, dtype=dtype), requires_grad=True)


def scale(x, factor, seen=None):
    """factor * x. The backward pass uses into() if `seen` is None, else returns a gradient and appends it to `seen`."""

    def backward(saved, dy, into):
        if seen is None:
            buffer = into(0)
            buffer += factor * dy
            return (None,)
        seen.append(factor * dy)
        return (seen[-1],)

    return record(factor * x.data, (x,), backward)


def test_a_shared_subexpression_is_computed_once():
    calls = []
    x = leaf([2.0])
    shared = record(x.data**2, (x,), lambda saved, dy, into: (calls.append(dy.copy()) or 4.0 * dy,))
    (shared * 3 + shared * shared + shared).sum().backward()
    assert calls == [3 + 2 * 4 + 1]
    assert x.grad == 4 * 12


def test_a_diamond_of_diamonds():
    x = leaf([1.5])
    y = x
    for _ in range(40):  # 2^40 paths
        y = y + y
    y.sum().backward()
    assert x.grad == 2.0**40


@pytest.mark.parametrize("into", [False, True])
def test_using_the_same_tensor_twice(into):
    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    y = scale(x, 1.0) if into else x
    (y @ y).sum().backward()
    ones = np.ones((2, 2))
    np.testing.assert_array_equal(x.grad, ones @ x.data.T + x.data.T @ ones)


@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_a_borrowed_gradient_is_never_written_to(times):
    """Both operands of an addition share dy. Several contributions are summed in a separate array."""
    seen = []
    x = leaf([1.0, 2.0])
    h = scale(x, 1.0)
    branches = [scale(h, float(i + 1), seen) for i in range(times)]
    total = branches[0]
    for branch in branches[1:]:
        total = total + branch
    total.sum().backward()
    np.testing.assert_array_equal(sorted(array[0] for array in seen), np.arange(1.0, times + 1))
    np.testing.assert_array_equal(x.grad, [times * (times + 1) / 2] * 2)


def test_x_plus_x_does_not_change_the_incoming_gradient():
    x, dy = leaf([1.0, 2.0]), np.array([3.0, 5.0])
    h = scale(x, 1.0)
    (h + h).backward(dy)
    np.testing.assert_array_equal(dy, [3.0, 5.0])
    np.testing.assert_array_equal(x.grad, [6.0, 10.0])
    x.grad[...] = 0
    np.testing.assert_array_equal(dy, [3.0, 5.0])


def test_a_leaf_never_shares_memory_with_the_incoming_gradient():
    x, dy = leaf([1.0, 2.0]), np.array([3.0, 5.0])
    x.backward(dy)
    (x + 0).backward(dy)
    np.testing.assert_array_equal(x.grad, 2 * dy)
    np.testing.assert_array_equal(dy, [3.0, 5.0])
    assert not np.shares_memory(x.grad, dy)


def test_gradients_of_residual_connections():
    x, dy = leaf([1.0, 2.0]), np.array([1.0, -1.0])
    h = scale(x, 1.0)
    s = h + scale(h, 2.0)
    s = s + scale(s, 3.0, [])
    s.backward(dy)
    np.testing.assert_array_equal(x.grad, 12 * dy)
    np.testing.assert_array_equal(dy, [1.0, -1.0])


@pytest.mark.parametrize("order", [(True, False), (False, True), (True, True), (False, False, True, True)])
def test_buffers_and_returned_gradients_are_summed(order):
    x = leaf([1.0, 2.0])
    h = scale(x, 1.0)
    parts = [scale(h, 10.0**i, [] if returned else None) for i, returned in enumerate(order)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    total.sum().backward()
    np.testing.assert_array_equal(x.grad, [sum(10.0**i for i in range(len(order)))] * 2)


def test_backward_through_a_deep_graph_does_not_recurse():
    x = leaf([1.0])
    y = x
    for _ in range(20_000):
        y = y + 1
    y.sum().backward()
    assert x.grad == 1


def test_freeing_a_deep_graph_does_not_recurse():
    y = leaf([1.0])
    for _ in range(50_000):
        y = scale(y, 1.0)
    del y


def test_a_second_backward_raises_a_helpful_error():
    x = leaf([1.0])
    h = x * 2
    y, z = h * 3, h * 5
    y.sum().backward()
    with pytest.raises(RuntimeError, match=r"an earlier backward\(\).*run the forward pass again, or add the losses"):
        z.sum().backward()
    assert x.grad == 6  # the failed backward pass has added nothing


def test_gradients_of_several_backward_passes_are_summed():
    x = leaf([1.0])
    for factor in (2, 3):
        (x * factor).sum().backward()
    assert x.grad == 5


def test_saved_data_is_freed_by_the_backward_pass():
    x = leaf([1.0])
    big = np.ones(1000)
    alive = weakref.ref(big)
    y = record(x.data * 1, (x,), lambda saved, dy, into: (dy,), saved=(big,))
    del big
    y.backward()
    assert alive() is None


def test_no_grad_records_nothing():
    x = leaf([1.0])
    with no_grad():
        y = x * 2
        z = ops.softmax(x)
    assert not y.requires_grad
    assert not z.requires_grad
    with pytest.raises(RuntimeError, match="nothing is recorded here"):
        y.backward()


def test_no_grad_is_reset_after_an_exception_and_can_be_nested():
    x = leaf([1.0])
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (x * 2).requires_grad
    with no_grad():
        with no_grad():
            pass
        assert not autograd.is_recording()
    assert autograd.is_recording()


def test_operations_on_constants_are_not_recorded():
    a = Tensor(np.ones(3))
    assert not (a * a + 1).requires_grad


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operations_create_no_reference_cycle(case):
    """Freeing the last Tensor frees the arrays, without the garbage collector."""
    random = np.random.default_rng(0)
    inputs = [Tensor(np.array(case.draw(random, shape), float), requires_grad=True) for shape in case.shapes]
    gc.disable()
    try:
        y = case.fn(*inputs)
        results = y if isinstance(y, tuple) else (y,)
        alive = [weakref.ref(result.data) for result in results]
        del y, results
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()


def test_a_hook_runs_once_after_the_last_contribution():
    x, unused = leaf([1.0, 2.0]), leaf([1.0])
    events = []
    x.leaf.on_final = lambda: events.append(x.grad.copy())
    unused.leaf.on_final = lambda: events.append("unused")
    (x * 2 + scale(x, 3.0) + scale(scale(x, 1.0), 4.0, [])).sum().backward()
    np.testing.assert_array_equal(events, [[9.0, 9.0]])
    x.sum().backward()
    np.testing.assert_array_equal(events, [[9.0, 9.0], [10.0, 10.0]])
    x.backward(np.ones(2))
    assert len(events) == 3


def test_a_hook_runs_for_a_leaf_whose_branch_has_no_gradient():
    x = leaf([1.0, 2.0])
    events = []
    x.leaf.on_final = lambda: events.append(x.grad)
    first, second = record((x.data * 1, x.data * 2), (x,), lambda saved, dy, into: (None,))
    assert second.requires_grad
    first.sum().backward()
    assert events == [None]


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1), (1, 1)])
def test_the_gradient_of_an_unused_result_is_none(used):
    got = []

    def backward(saved, dy, into):
        got.append([None if g is None else g.copy() for g in dy])
        return (sum(g for g in dy if g is not None),)

    x = leaf([1.0, 2.0])
    results = record((x.data + 0, x.data + 0), (x,), backward)
    total = results[used[0]].sum()
    for i in used[1:]:
        total = total + results[i].sum()
    total.backward()
    expected = [used.count(i) or None for i in range(2)]
    assert [None if g is None else g[0] for g in got[0]] == expected
    np.testing.assert_array_equal(x.grad, [len(used)] * 2)


@pytest.mark.parametrize("times", [2, 3, 4])
def test_zero_d_gradients_are_summed(times):
    x = leaf(3.0)
    h = scale(x, 1.0, [])
    total = h
    for _ in range(times - 1):
        total = total + h
    total.backward()
    assert x.grad == times
    assert x.grad.shape == ()
    assert isinstance(x.grad, np.ndarray)


def test_into_is_none_if_no_gradient_is_needed():
    buffers = []

    def backward(saved, dy, into):
        buffers.append(into(1))
        return dy, dy

    x, constant = leaf([1.0]), Tensor(np.ones(1))
    record(x.data + constant.data, (x, constant), backward).backward()
    assert buffers == [None]
    assert x.grad == 1


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda dy: (dy,), ValueError, r"returned 1 gradients; expected a tuple with a gradient or None for each of 2"),
        (lambda dy: [dy, dy, dy], ValueError, r"returned 3 gradients"),
        (lambda dy: dy * 2, TypeError, r"returned ndarray; expected a tuple .* of 2 parents, as in `return dx,`$"),
        (lambda dy: None, TypeError, r"returned NoneType"),
        (lambda dy: (dy, dy[:1]), ValueError, r"for parent 1 a gradient of shape \(1, 2\); expected \(2, 2\), the"),
        (lambda dy: (dy[0], dy), ValueError, r"for parent 0 a gradient of shape \(2,\); expected \(2, 2\)"),
        (lambda dy: (dy.sum(), dy), ValueError, r"for parent 0 a gradient of shape \(\)"),
        (lambda dy: (dy, dy.astype(int)), TypeError, r"for parent 1 a gradient of dtype int64; expected float64"),
        (
            lambda dy: (dy.astype("float32"), dy),
            TypeError,
            r"for parent 0 a gradient of dtype float32; expected float64",
        ),
        (lambda dy: (1.0, dy), TypeError, r"for parent 0 an object of type float; expected an array of shape \(2, 2\)"),
        (lambda dy: (Tensor(dy), dy), TypeError, r"for parent 0 an object of type Tensor"),
    ],
)
@pytest.mark.parametrize("of_a_leaf", [False, True])
def test_the_results_of_a_backward_function_are_checked(returned, error, message, of_a_leaf):
    def fold_backward(saved, dy, into):
        return returned(dy)

    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    h = x if of_a_leaf else x * 1.0
    y = record(x.data * 1, (h, h), fold_backward)
    with pytest.raises(error, match=rf"^fold: backward (returned )?{message}"):
        y.sum().backward()


def test_a_backward_function_may_return_a_scalar_for_a_zero_d_tensor():
    x = leaf(3.0)
    record(x.data * 1, (x,), lambda saved, dy, into: (np.float64(2.0),)).backward()
    assert x.grad == 2
    assert isinstance(x.grad, np.ndarray)


def test_the_fixture_saved_is_read_only_detects_writes():
    x = leaf([1.0, 2.0])
    inner = np.ones(2)

    def writes(where):
        def backward(saved, dy, into):
            target = {"saved": lambda: saved[0], "nested": lambda: saved[1][0], "dy": lambda: dy}[where]()
            target += 1
            return (dy,)

        return backward

    for where in ("saved", "nested", "dy"):
        y = record(x.data * 1, (x,), writes(where), saved=(x.data, (inner,)))
        with pytest.raises(ValueError, match="read-only"):
            y.backward(np.ones(2))
    x.data[...] = 5  # only the views are read-only, not their memory


CHANGES = {
    "data": lambda p, optimizer: setattr(p, "data", np.ones(p.shape, "float32")),
    "step": lambda p, optimizer: optimizer.step(),
}


class TestChangedData:
    """If saved data is changed in place before the backward pass, an error names the operation."""

    @staticmethod
    def parameter(*shape):
        model = nn.Module()
        model.p = Parameter(np.full(shape, 2.0, "float32"))
        return model.p, optim.AdamW(model)

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize(
        ("operation", "function"),
        [
            ("multiply", lambda p: p * p),
            ("power", lambda p: p**2),
            ("linear", lambda p: ops.linear(Tensor(np.ones((1, 2), "float32"), requires_grad=True), p)),
            ("multiply", lambda p: p.reshape(4) * Tensor([1.0, 2.0, 3.0, 4.0])),  # saves a view
            ("matmul", lambda p: p.T[:1] @ p),
            ("recompute", lambda p: recompute(lambda x: x * p, Tensor(np.ones((2, 2), "float32"), requires_grad=True))),
            ("recompute", lambda p: recompute(lambda x: x * x, p)),
        ],
    )
    def test_raises(self, operation, function, change):
        p, optimizer = self.parameter(2, 2)
        y = function(p).sum()
        CHANGES[change](p, optimizer)
        message = (
            rf"^backward: {operation}: .*was changed since the forward pass \(by an optimizer's step, or an assign"
        )
        with pytest.raises(RuntimeError, match=message):
            y.backward()
        function(p).sum().backward()  # a new forward pass is correct

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize(
        "function",
        [
            lambda p: p + 1.0,
            lambda p: p.sum(),
            lambda p: p * 3.0,
            lambda p: ops.embedding([1, 0], p),
            lambda p: p.exp(),  # saves its result
            lambda p: p[0],
        ],
    )
    def test_does_not_affect_operations_that_did_not_save_it(self, function, change):
        gradients = []
        for changed in (False, True):
            p, optimizer = self.parameter(2, 2)
            y = function(p).sum()
            if changed:
                CHANGES[change](p, optimizer)
            y.backward()
            gradients.append(p.grad.copy())
        np.testing.assert_array_equal(*gradients)

    def test_before_the_forward_pass_is_allowed(self):
        p, optimizer = self.parameter(2, 2)
        for _ in range(3):
            optimizer.zero_grad()
            (p * p).sum().backward()
            optimizer.step()

    def test_of_another_parameter_is_allowed(self):
        p, _ = self.parameter(2, 2)
        q, optimizer = self.parameter(2, 2)
        y = (p * p).sum()
        optimizer.step()
        q.data = 1 + q.data
        y.backward()
        np.testing.assert_array_equal(p.grad, 2 * p.data)

    def test_assigning_another_array_to_a_tensor_does_not_affect_its_graph(self):
        x = leaf([1.0, 2.0])
        y = (x * x).sum()
        x.data = np.array([7.0, 7.0])
        y.backward()
        np.testing.assert_array_equal(x.grad, [2, 4])


def test_second_order_gradients_are_rejected():
    x = leaf([1.0, 2.0])
    with pytest.raises(NotImplementedError, match=r"^backward: create_graph: second-order gradients are not supp"):
        (x * x).sum().backward(create_graph=True)
    (x * x).sum().backward()
    with pytest.raises(RuntimeError, match=r"nothing is recorded here.*second-order gradients are not supported"):
        (Tensor(x.grad) ** 2).sum().backward()


@pytest.mark.parametrize("kind", [Tensor, Parameter])
def test_an_assigned_grad_is_copied(kind):
    for value in (np.float64(0.5), 0.5, np.array(0.5), Tensor(0.5), np.array(1, int)):
        x = (
            Tensor(np.array(2.0, "float32"), requires_grad=True)
            if kind is Tensor
            else Parameter(np.array(2.0, "float32"))
        )
        x.grad = value
        (x * 3).backward()
        assert isinstance(x.grad, np.ndarray)
        assert (x.grad.dtype, float(x.grad)) == (np.float32, float(value) + 3)
    g = np.ones(2)
    y = leaf([1.0, 2.0])
    y.grad = g
    (y * 3).sum().backward()
    np.testing.assert_array_equal(g, [1, 1])


@pytest.mark.parametrize("index", [None, ..., (), np.array(True), (None, ...)], ids=str)
def test_a_zero_d_result_that_is_used_several_times(index):
    x = leaf(2.0)
    y = x * 1
    z = y[index]
    (z.sum() + (y + y)).backward()
    assert x.grad == 3


def test_a_gradient_buffer_for_a_zero_d_result():
    def scale_by_backward(saved, dy, into):
        factors, gain = saved
        dgain = into(1)
        dgain += np.sum(dy * factors)
        return dy * gain, None

    gain, factors = leaf(2.0), Tensor(np.ones(3))
    h = gain * 1
    y = record(factors.data * h.data, (factors, h), scale_by_backward, saved=(factors.data, h.data))
    (y.sum() + h + h).backward()
    assert gain.grad == 5
