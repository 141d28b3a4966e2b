"""Which rows of a batch hold the same token: what the embedding's backward kernels need. Found with NumPy, on the host.

Sorted by token, the rows of equal tokens follow each other, in runs: each run is summed by itself, in a fixed order.
"""

from __future__ import annotations

import numpy as np


def sort_tokens(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """order (N,), the positions sorted by token, of equal tokens the first first; and tokens[order]."""
    tokens = tokens.reshape(-1)
    keys = (
        tokens.astype(np.uint16) if tokens.max() < 1 << 16 else tokens
    )  # 16 bits are sorted by radix: 10 times faster
    order = np.argsort(keys, kind="stable")
    return order, tokens[order]


def token_runs(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """order (N,) as above; for each of the U runs, first (U,), where in `order` it begins, and ids (U,), its token."""
    order, ordered = sort_tokens(tokens)
    first = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    return order, first, ordered[first]
