"""examples/name_gru.py, and its network compared with PyTorch's GRU."""

import re

import numpy as np
import pytest

from examples import name_gru
from tinygrad2 import Tensor


@pytest.mark.slow
def test_name_gru_learns(run, losses):
    printed = run("name_gru", "--steps", 60)
    assert losses(printed)[0] == pytest.approx(3.30, abs=0.05)
    assert float(re.search(r"(\S+) on words that it has not seen", printed)[1]) < 2.7  # single letters: 2.85
    assert re.search(r"\d+ of 40 words are new: [a-z]+, [a-z]+", printed)


def test_words_are_encoded_with_start_and_end():
    rows = name_gru.encode(["abc", "z" * 12])
    assert rows[0].tolist() == [0, 1, 2, 3, 0] + [-1] * 9
    assert rows[1].tolist() == [0] + [26] * 12 + [0]


def test_words_are_found_in_pydoc():
    words = name_gru.find_words()
    assert len(words) > 1500
    assert {"function", "statement", "operator"} <= set(words)
    assert all(re.fullmatch("[a-z]{4,12}", word) for word in words)


def test_padding_does_not_affect_the_loss():
    model = name_gru.GRU(width=8)
    short, padded = (name_gru.encode(["word"])[:, :n] for n in (6, 14))
    assert model.loss(padded).item() == pytest.approx(model.loss(short).item(), rel=1e-6)


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_gru_equals_pytorch():
    import torch

    model = name_gru.GRU(width=8)
    theirs = torch.nn.GRU(32, 8, batch_first=True)
    z, r, n = np.split(np.arange(24), 3)
    order = np.concatenate([r, z, n])  # PyTorch's order of the gates
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.tensor(model.of_input.weight.numpy()[:, order].T))
        theirs.weight_hh_l0.copy_(torch.tensor(model.of_state.weight.numpy()[:, order].T))
        theirs.bias_ih_l0.zero_()
        theirs.bias_hh_l0.zero_()
        ids = np.random.default_rng(0).integers(27, size=(3, 7))
        states, _ = theirs(torch.tensor(model.embedding(ids).numpy()))
    expected = model.output(Tensor(states.numpy())).numpy()
    np.testing.assert_allclose(model(ids).numpy(), expected, rtol=0, atol=1e-5)
