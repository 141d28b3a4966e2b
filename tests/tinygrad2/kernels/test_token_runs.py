"""kernels/token_runs.py gives the order and the runs of a stable sort."""

import numpy as np
import pytest

from tinygrad2.kernels.token_runs import sort_tokens, token_runs


@pytest.mark.parametrize("vocabulary", [1, 40, 1 << 16, 1 << 17])  # up to 16 bits are sorted differently
def test_equal_tokens_form_runs_in_a_stable_order(vocabulary):
    tokens = np.random.default_rng(0).integers(vocabulary, size=(30, 70))
    tokens[0, 0] = vocabulary - 1
    flat = tokens.reshape(-1)
    order, ordered = sort_tokens(tokens)
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(ordered, np.sort(flat))
    order_of_runs, first, ids = token_runs(tokens)
    np.testing.assert_array_equal(order_of_runs, order)
    for found, expected in zip((ids, first), np.unique(ordered, return_index=True), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert {array.dtype for array in (order, ordered, first, ids)} == {np.dtype(np.int64)}
