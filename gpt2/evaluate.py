"""Evaluation: the loss on validation data."""

from __future__ import annotations

import numpy as np

from gpt2.dataset import TokenDataset
from gpt2.model import GPT2
from tinygrad2 import no_grad


def mean_loss(model: GPT2, data: TokenDataset, batch_size: int, block_size: int, batches: int) -> float:
    """The mean loss in nats per token over the first `batches` batches of windows, always the same ones.

    Fewer where the data set ends before; every window counts alike, in a last batch that is not full too.
    """
    windows = min(data.windows(block_size), batches * batch_size)
    total = 0.0
    with no_grad():
        for first in range(0, windows, batch_size):
            indices = np.arange(first, min(first + batch_size, windows))
            total += model.loss(*data.batch(indices, block_size)).item() * len(indices)
    return total / windows
