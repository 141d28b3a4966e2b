"""Precision: the types that a model computes in."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy
from numpy.typing import DTypeLike


@dataclass(frozen=True)
class Precision:
    """The types of what a model holds and computes. A model has one, and gives it to all of its layers.

    name         as users give it.
    parameters   dtype of the parameters, their gradients and the optimizer's state.
    activations  dtype of what the layers compute, and in which they read the parameters.
    matrices     dtype of the parameters with two or more axes, where it is not that of the others. They are converted
                 as they are read, and have no gradients: the model generates, but does not train.
    tf32         matrix products of float32 round their operands to 10 bits of mantissa.
    """

    name: str
    parameters: str
    activations: str
    matrices: str | None = None
    tf32: bool = False

    @staticmethod
    def of(value: PrecisionLike) -> Precision:
        """The precision of this name or dtype, or `value` itself. Raises ValueError where there is none."""
        if isinstance(value, Precision):
            return value
        name = value if isinstance(value, str) else numpy.dtype(value).name
        if name not in _BY_NAME:
            raise ValueError(f"dtype {name!r} is not supported; choose one of {', '.join(_BY_NAME)}")
        return _BY_NAME[name]

    @property
    def copies(self) -> str | None:
        """The dtype of the copies of the parameters that layers read, or None where they read the parameters."""
        return None if self.activations == self.parameters else self.activations

    @property
    def trains(self) -> bool:
        """Whether all parameters have gradients."""
        return self.matrices is None

    @property
    def parameter_bytes(self) -> int:
        return numpy.dtype(self.parameters).itemsize

    @property
    def activation_bytes(self) -> int:
        return numpy.dtype(self.activations).itemsize

    def dtype_of(self, ndim: int) -> str:
        """The dtype of a parameter with so many axes."""
        return self.matrices if self.matrices and ndim >= 2 else self.parameters


PrecisionLike = Precision | DTypeLike  # what Precision.of takes, such as "bfloat16"

FLOAT32 = Precision("float32", "float32", "float32")
TF32 = Precision("tf32", "float32", "float32", tf32=True)
BFLOAT16 = Precision("bfloat16", "float32", "bfloat16")
FLOAT64 = Precision("float64", "float64", "float64")
BFLOAT16_WEIGHTS = Precision("bfloat16_weights", "float32", "float32", matrices="bfloat16")

_BY_NAME = {p.name: p for p in (FLOAT32, TF32, BFLOAT16, FLOAT64, BFLOAT16_WEIGHTS)}
TRAINING = tuple(p.name for p in _BY_NAME.values() if p.trains)  # names of the precisions that models train in


def sum_dtype(dtype: numpy.dtype) -> numpy.dtype:
    """The dtype of sums of such numbers, of gradients and of LayerNorm's gains: float32, or `dtype` where wider."""
    return dtype if dtype.itemsize >= 4 else numpy.dtype(numpy.float32)
