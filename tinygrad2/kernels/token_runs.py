"""The positions of each token in a batch, for the embedding's backward kernels; computed with NumPy on the host.

The positions are sorted by token, so positions of equal tokens form a run. Each run is summed in a fixed order.
"""

from __future__ import annotations

import numpy as np


def sort_tokens(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """order (N,), the positions in a stable sort by token, and tokens[order]."""
    tokens = tokens.reshape(-1)
    # NumPy sorts 16-bit integers with radix sort, which is 10 times faster.
    keys = tokens.astype(np.uint16) if tokens.max() < 1 << 16 else tokens
    order = np.argsort(keys, kind="stable")
    return order, tokens[order]


def token_runs(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """order (N,) from sort_tokens; first (U,), where each of the U runs begins in `order`; ids (U,), their tokens."""
    order, ordered = sort_tokens(tokens)
    first = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    return order, first, ordered[first]
