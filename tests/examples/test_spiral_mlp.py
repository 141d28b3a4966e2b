"""examples/spiral_mlp.py."""

import re

import numpy as np
import pytest

from examples import spiral_mlp


def test_spiral_mlp_classifies_new_points(run):
    printed = run("spiral_mlp")
    seen, new = re.search(r"accuracy (\S+) on 600 training points, (\S+) on 600 new ones", printed).groups()
    assert float(seen) == pytest.approx(0.998, abs=0.005)  # as stated in the script's docstring
    assert float(new) == pytest.approx(0.980, abs=0.01)


@pytest.mark.slow
def test_output_is_reproducible(run):
    assert run("spiral_mlp", "--steps", 20) == run("spiral_mlp", "--steps", 20)


def test_points_of_the_spiral():
    x, y = spiral_mlp.spiral(10, np.random.default_rng(0))
    assert (x.shape, x.dtype, y.tolist()) == ((30, 2), np.float32, [0] * 10 + [1] * 10 + [2] * 10)
    np.testing.assert_allclose(np.hypot(*x.T), np.tile(np.linspace(0.05, 1, 10), 3), rtol=1e-6)
