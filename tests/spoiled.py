"""GPT-2 training steps that fail: a user-defined operation whose gradient is not finite."""

import numpy as np

from gpt2.model import MLP
from tinygrad2 import record
from tinygrad2.backend import backend_of

LAYER = 2


def spoil(x, value=np.nan, index=7):
    """Return x; the backward pass replaces one element of its gradient by `value`."""

    def spoil_backward(saved, dy, into):
        dx = dy.copy()
        dx.reshape(-1)[index] = backend_of(dx).asarray(np.asarray(value, dtype="float32"))
        return (dx,)

    return record(x.data, (x,), spoil_backward)


def spoil_steps(monkeypatch, *steps, value=np.nan):
    """Spoil the gradient of the MLP output in layer LAYER in the given steps, counted from 0."""
    call = MLP.__call__

    def spoiled(self, x, key, site):
        y = call(self, x, key, site)
        return spoil(y, value) if key is not None and key.step in steps and site == 3 * LAYER + 3 else y

    monkeypatch.setattr(MLP, "__call__", spoiled)
