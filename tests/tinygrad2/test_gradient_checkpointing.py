import weakref

import numpy as np
import pytest

from tinygrad2 import Key, Tensor, no_grad, ops, recompute


class TestRecompute:
    """recompute(f, x) gives the same bits as f(x)."""

    @staticmethod
    def function(weight):
        def f(x, y):
            h = ops.dropout(ops.gelu(ops.linear(x, weight)), 0.5, Key(1, site=4))
            return h + y, h * 2  # the second result may be unused

        return f

    @pytest.mark.parametrize("use_second", [False, True])
    @pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
    def test_results_and_gradients_are_bit_identical(self, use_second, wanted):
        results = []
        for recomputed in (False, True):
            rng = np.random.default_rng(0)
            weight = Tensor(rng.normal(size=(4, 4)), requires_grad=True)
            x, y = (Tensor(rng.normal(size=(3, 4)), requires_grad=grad) for grad in wanted)
            f = self.function(weight)
            first, second = recompute(f, x * 1.0, y * 1.0) if recomputed else f(x * 1.0, y * 1.0)
            total = first.sum() + second.sum() if use_second else first.sum()
            if any(wanted) or not recomputed:
                total.backward()
            results.append([total.data, *(t.grad for t in (x, y)), weight.grad if any(wanted) else None])
        for ours, theirs in zip(*results, strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_only_the_inputs_are_saved(self):
        kept = []

        def f(x):
            inner = x * 2
            kept.append(weakref.ref(inner.data))
            return inner * inner

        x = Tensor(np.ones(3), requires_grad=True)
        y = recompute(f, x)
        assert kept[0]() is None
        y.sum().backward()
        np.testing.assert_array_equal(x.grad, [8, 8, 8])

    def test_backward_inside_no_grad(self):
        x = Tensor(np.ones(3), requires_grad=True)
        y = recompute(lambda x: x * x, x).sum()
        with no_grad():
            y.backward()
        np.testing.assert_array_equal(x.grad, [2, 2, 2])

    def test_nothing_is_recorded_inside_no_grad(self):
        x = Tensor(np.ones(3), requires_grad=True)
        with no_grad():
            assert not recompute(lambda x: x * x, x).requires_grad

    def test_nested_calls(self):
        x = Tensor(np.full(3, 2.0), requires_grad=True)
        recompute(lambda x: recompute(lambda x: x * x, x) * x, x).sum().backward()
        np.testing.assert_array_equal(x.grad, 3 * x.data**2)
