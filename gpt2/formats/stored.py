"""An array in a model file, read on demand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
from safetensors import SafetensorError


@dataclass(frozen=True)
class Stored:
    """An array in a file. Its shape and the NumPy name of its dtype are known; its values are read on demand."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """The size of its values in bytes. Raises TypeError for a dtype that NumPy does not support."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def rows(self, count: int) -> Stored:
        """The first `count` rows."""
        return Stored((count, *self.shape[1:]), self.dtype, lambda: self.read()[:count])

    def transposed(self) -> Stored:
        """The transpose, as a contiguous array."""
        return Stored(self.shape[::-1], self.dtype, lambda: np.ascontiguousarray(self.read().T))

    def cast(self, dtype: str) -> Stored:
        """The array converted to `dtype`."""
        return Stored(self.shape, dtype, lambda: self.read().astype(dtype, copy=False))


def read_at(path: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read the array of this shape that starts at byte `offset` of a file. Raises ValueError if the file is
    truncated."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.fromfile(path, np.uint8, count, offset=offset)
    if len(memory) != count:
        raise ValueError(f"it is truncated: {count - len(memory):,} bytes are missing")
    return memory.view(dtype).reshape(shape)


@contextmanager
def naming_file(file: Path) -> Iterator[None]:
    """A context that adds the file's name to errors about its contents, and makes the message a single printable line,
    since it may quote the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
            text = f"it is not valid JSON ({error})"
        text = "".join(c if c.isprintable() else " " for c in text)
        raise ValueError(f"{file}: {text if len(text) < 500 else text[:500] + ' ...'}") from None
