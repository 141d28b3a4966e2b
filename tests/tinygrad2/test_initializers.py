"""tinygrad2/initializers.py: initial values that depend only on the structure of the model."""

import numpy as np
import pytest

from tests.tinygrad2.test_nn import MLP
from tinygrad2 import nn


class Chain(nn.Module):
    """A module that contains separately constructed modules."""

    def __init__(self, *modules):
        self.modules_in_order = list(modules)


class Nested(nn.Module):
    def __init__(self):
        self.inner = [MLP(), MLP()]
        self.head = nn.Linear(3, 4)


MAKERS = {
    "constructed inside the model": Nested,
    "passed to the model": lambda: Chain(nn.Linear(3, 4), nn.Linear(3, 4), nn.Embedding(3, 4), nn.Linear(3, 4)),
    "passed to nested models": lambda: Chain(Chain(nn.Linear(3, 4), nn.Linear(3, 4)), MLP(), MLP(), nn.Linear(3, 4)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_layers_without_an_initializer_have_different_values(make):
    weights = [p.data for p in make().parameters() if p.ndim == 2]
    directions = [w.reshape(-1)[:6] / np.linalg.norm(w.reshape(-1)[:6]) for w in weights]
    for i, first in enumerate(directions):
        for second in directions[:i]:
            assert np.abs(first - second).max() > 0.01


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_initial_values_do_not_depend_on_earlier_modules(make):
    first = make()
    kept = [nn.Linear(2, 2), MLP()]
    for p, q in zip(first.parameters(), make().parameters(), strict=True):
        np.testing.assert_array_equal(p.data, q.data)
    np.testing.assert_array_equal(kept[0].weight.data, nn.Linear(2, 2).weight.data)


def test_a_layer_keeps_values_assigned_before_it_became_part_of_a_model():
    layers = [nn.Linear(3, 4) for _ in range(3)]
    first = layers[0].weight.data.copy()
    layers[1].weight.data[...] = 7
    chain = Chain(*layers, layers[0])
    np.testing.assert_array_equal(chain.modules_in_order[0].weight.data, first)
    assert (layers[1].weight.data == 7).all()
    assert (layers[2].weight.data != first).all()


def test_a_constructor_that_fails_does_not_affect_later_modules():
    class Fails(nn.Module):
        def __init__(self):
            self.layer = nn.Linear(3, 4)
            raise KeyError

    expected = MLP()
    with pytest.raises(KeyError):
        Fails()
    for p, q in zip(expected.parameters(), MLP().parameters(), strict=True):
        np.testing.assert_array_equal(p.data, q.data)
