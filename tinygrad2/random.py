"""Stateless random numbers: every number is a pure function of (seed, step, site, element).

A counter-based generator has no state to save, restore or share. Numbers do not depend on earlier draws. They are
therefore the same when a batch is split into micro-steps or across machines, when a run is resumed, and on any device.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Philox4x32-10, Random123).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinygrad2.array import Array

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # the round multipliers of the paper
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # the key increments: golden ratio, sqrt(3) - 1


Word = Any  # 32-bit values, as np.uint64 scalars or uint64 arrays of any library


def philox4x32(c0: Word, c1: Word, c2: Word, c3: Word, k0: Word, k1: Word) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: a counter of four 32-bit words and a key of two -> four random 32-bit words.

    Every argument is a uint64 scalar or array of 32-bit values, so that 32 x 32-bit products fit. Arrays of any library
    can be used, and broadcast. The function uses only arithmetic, so that NumPy, CuPy and Numba can run it.
    """
    for _ in range(10):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _WORD, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _WORD
        k0 = (k0 + _W0) & _WORD
        k1 = (k1 + _W1) & _WORD
    return c0, c1, c2, c3


# Sites separate the streams of random numbers. Dropout in a model uses the sites 0, 1, 2, ...
SAMPLING_SITE = 1 << 30  # sampling of the next token
LAYER_SITES = 1 << 31  # the first site for layers without their own initializer
DATA_SITE = 2**32 - 1  # the order of samples; the step is the epoch
INIT_STEP = 2**32 - 1  # the step for a model's initial values, which training never reaches


@dataclass(frozen=True)
class Key:
    """Identifies one stream of random numbers.

    seed          64 bits, chosen by the user.
    step          the training step (or the epoch, for the data order).
    first_sample  the position of the first sample in the *global* batch. It shifts the element index, so that part of
                  a batch gets the same numbers as in the full batch.
    site          the operation of the model that uses the stream (see `at`).

    The Philox counter is (element / 4 low, element / 4 high, site, step), and its key is the seed. Element e uses word
    e % 4.
    """

    seed: int
    step: int = 0
    first_sample: int = 0
    site: int = 0

    def __post_init__(self) -> None:
        for name, bits in (("seed", 64), ("step", 32), ("site", 32), ("first_sample", 48)):
            value = getattr(self, name)
            if not hasattr(value, "__index__"):
                raise TypeError(f"Key: {name} is {value!r}; expected an integer")
            if not 0 <= value < 1 << bits:
                raise ValueError(f"Key: {name} is {value}; expected 0 to 2**{bits} - 1")

    def at(self, site: int) -> Key:
        """The same key at another site."""
        return replace(self, site=site)


def check_key(op: str, key: object) -> None:
    """Raise TypeError for anything but a Key."""
    if not isinstance(key, Key):
        raise TypeError(f"{op}: the key has type {type(key).__name__}; expected a Key, as in Key(seed=0)")


def draw(key: Key, group: Word) -> tuple[Array, Array, Array, Array]:
    """The words of elements 4 * group ... 4 * group + 3. `group` is a uint64 array of any library and shape."""
    seed, site, step = np.uint64(key.seed), np.uint64(key.site), np.uint64(key.step)
    return philox4x32(group & _WORD, group >> _SHIFT, site, step, seed & _WORD, seed >> _SHIFT)


def _words(key: Key, first_group: int, groups: int) -> np.ndarray:
    check_key("random", key)
    index = np.arange(first_group, first_group + groups, dtype=np.uint64)
    return np.stack(draw(key, index), axis=-1)


def bits64(key: Key, count: int) -> np.ndarray:
    """`count` uniform 64-bit integers, as a uint64 array on the host."""
    words = _words(key, 0, (count + 1) // 2)
    return ((words[:, 0::2] << _SHIFT) | words[:, 1::2]).reshape(-1)[:count]


def uniform(key: Key, count: int) -> np.ndarray:
    """`count` float64 values in [0, 1) with 53 random bits each, on the host."""
    return (bits64(key, count) >> np.uint64(11)) * 2.0**-53


def permutation(key: Key, n: int) -> np.ndarray:
    """A uniformly random permutation of 0 ... n-1 (int64, on the host), obtained by sorting random 64-bit integers."""
    return np.argsort(bits64(key, n), kind="stable")


def normal(key: Key, shape: tuple[int, ...], std: float = 1.0) -> np.ndarray:
    """Normal(0, std) values of shape `shape` (float64, on the host), by the Box-Muller transform (1958).

    Two uniform values u, v give sqrt(-2 ln u) cos(2 pi v) and sqrt(-2 ln u) sin(2 pi v). Four words give two pairs.
    """
    count = int(np.prod(shape, dtype=np.int64))
    out = np.empty((-(-count // 4), 4))
    chunk = 1 << 14  # groups processed at a time, so that temporary arrays stay in cache
    for first in range(0, len(out), chunk):
        rows = out[first : first + chunk]
        u = (_words(key, first, len(rows)) + 0.5) * 2.0**-32  # in (0, 1), so that the logarithm is finite
        radius = std * np.sqrt(-2.0 * np.log(u[:, :2]))
        angle = 2.0 * np.pi * u[:, 2:]
        rows[:, :2] = radius * np.cos(angle)
        rows[:, 2:] = radius * np.sin(angle)
    return out.reshape(-1)[:count].reshape(shape)
